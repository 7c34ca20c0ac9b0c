//! The result codes this driver can answer with, and their names and texts.

use std::ffi::CStr;

/// A `CUresult`.
pub type Code = u32;

/// What a call came to, before it is turned into a [`Code`].
pub(crate) type Answer = Result<(), Code>;

/// The call did what was asked.
pub const SUCCESS: Code = 0;
/// A null pointer, a bad flag, size or address.
pub const INVALID_VALUE: Code = 1;
/// Device memory or page-locked memory is used up.
pub const OUT_OF_MEMORY: Code = 2;
/// `cuInit` was not called or did not succeed.
pub const NOT_INITIALIZED: Code = 3;
/// `cuInit` found no device.
pub const NO_DEVICE: Code = 100;
/// There is no device with this number.
pub const INVALID_DEVICE: Code = 101;
/// The calling thread has no current context.
pub const INVALID_CONTEXT: Code = 201;
/// A handle that does not exist (any more), or an event that cannot answer the question.
pub const INVALID_HANDLE: Code = 400;
/// The module has no such function.
pub const NOT_FOUND: Code = 500;
/// The work is still under way.
pub const NOT_READY: Code = 600;
/// The current context's last reference was released.
pub const CONTEXT_IS_DESTROYED: Code = 709;
/// A part of the range is already registered.
pub const ALREADY_REGISTERED: Code = 712;
/// The address is no registered range.
pub const NOT_REGISTERED: Code = 713;
/// A kernel failed; every later call repeats this code.
pub const LAUNCH_FAILED: Code = 719;

/// A code's name and text.
pub(crate) struct Description {
    pub(crate) name: &'static CStr,
    pub(crate) text: &'static CStr,
}

/// Describes `code`, or `None` if this driver does not know it.
pub(crate) fn describe(code: Code) -> Option<Description> {
    let &(_, name, text) = TABLE.iter().find(|row| row.0 == code)?;
    Some(Description { name, text })
}

// Names and texts as driver 13.0 gives them: its own answers, and failures worth injecting.
const TABLE: [(Code, &CStr, &CStr); 37] = [
    (0, c"CUDA_SUCCESS", c"no error"),
    (1, c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
    (2, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
    (3, c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
    (4, c"CUDA_ERROR_DEINITIALIZED", c"driver shutting down"),
    (34, c"CUDA_ERROR_STUB_LIBRARY", c"CUDA driver is a stub library"),
    (46, c"CUDA_ERROR_DEVICE_UNAVAILABLE", c"CUDA-capable device(s) is/are busy or unavailable"),
    (100, c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected"),
    (101, c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
    (200, c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"),
    (201, c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
    (214, c"CUDA_ERROR_ECC_UNCORRECTABLE", c"uncorrectable ECC error encountered"),
    (218, c"CUDA_ERROR_INVALID_PTX", c"a PTX JIT compilation failed"),
    (221, c"CUDA_ERROR_JIT_COMPILER_NOT_FOUND", c"PTX JIT compiler library not found"),
    (
        222,
        c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        c"the provided PTX was compiled with an unsupported toolchain.",
    ),
    (304, c"CUDA_ERROR_OPERATING_SYSTEM", c"OS call failed or operation not supported on this OS"),
    (400, c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
    (401, c"CUDA_ERROR_ILLEGAL_STATE", c"the operation cannot be performed in the present state"),
    (500, c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
    (600, c"CUDA_ERROR_NOT_READY", c"device not ready"),
    (700, c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
    (701, c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", c"too many resources requested for launch"),
    (702, c"CUDA_ERROR_LAUNCH_TIMEOUT", c"the launch timed out and was terminated"),
    (709, c"CUDA_ERROR_CONTEXT_IS_DESTROYED", c"context is destroyed"),
    (710, c"CUDA_ERROR_ASSERT", c"device-side assert triggered"),
    (
        712,
        c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        c"part or all of the requested memory range is already mapped",
    ),
    (
        713,
        c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        c"pointer does not correspond to a registered memory region",
    ),
    (715, c"CUDA_ERROR_ILLEGAL_INSTRUCTION", c"an illegal instruction was encountered"),
    (716, c"CUDA_ERROR_MISALIGNED_ADDRESS", c"misaligned address"),
    (719, c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
    (800, c"CUDA_ERROR_NOT_PERMITTED", c"operation not permitted"),
    (801, c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"),
    (802, c"CUDA_ERROR_SYSTEM_NOT_READY", c"system not yet initialized"),
    (
        803,
        c"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        c"system has unsupported display driver / cuda driver combination",
    ),
    (
        804,
        c"CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
        c"forward compatibility was attempted on non supported HW",
    ),
    (
        900,
        c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        c"operation not permitted when stream is capturing",
    ),
    (999, c"CUDA_ERROR_UNKNOWN", c"unknown error"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_this_driver_answers_has_a_name() {
        let answered = [
            SUCCESS,
            INVALID_VALUE,
            OUT_OF_MEMORY,
            NOT_INITIALIZED,
            NO_DEVICE,
            INVALID_DEVICE,
            INVALID_CONTEXT,
            INVALID_HANDLE,
            NOT_FOUND,
            NOT_READY,
            CONTEXT_IS_DESTROYED,
            ALREADY_REGISTERED,
            NOT_REGISTERED,
            LAUNCH_FAILED,
        ];
        assert!(answered.into_iter().all(|code| describe(code).is_some()));
        assert!(describe(4242).is_none());
    }

    #[test]
    fn the_table_is_sorted_and_without_doubles() {
        assert!(TABLE.windows(2).all(|rows| rows[0].0 < rows[1].0));
    }
}

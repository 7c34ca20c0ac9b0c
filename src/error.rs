//! The one error type: what was needed, what was found, with units.

/// A result with [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An operating error: the caller can act on it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The budget holds less than the largest block, so no plan exists.
    #[error(
        "block {block} needs {need_bytes} bytes but the budget for block weights is \
         {budget_bytes} bytes"
    )]
    BudgetTooSmall {
        /// Index of the largest block.
        block: u32,
        /// The smallest budget that works, in bytes.
        need_bytes: u64,
        /// The budget that was given, in bytes.
        budget_bytes: u64,
    },
    /// An argument is outside of its range; the text names it, the range and the value.
    #[error("{0}")]
    Invalid(String),
    /// The CUDA driver library is absent, a stub, or a fake that was not allowed.
    #[error("no usable CUDA driver: {0}")]
    NoDriver(String),
    /// A driver call was refused.
    #[error("{call} failed with CUDA error {code} ({name})")]
    Driver {
        /// The driver function.
        call: &'static str,
        /// The `CUresult` it returned.
        code: u32,
        /// The driver's name of that code.
        name: String,
    },
    /// The operating system refused a read of a weight file.
    #[error("reading {bytes} bytes at offset {offset} of {file} failed: {reason}")]
    Read {
        /// Base name of the file.
        file: String,
        /// First byte wanted.
        offset: u64,
        /// Bytes wanted.
        bytes: u64,
        /// The system's words, or what was found.
        reason: String,
    },
    /// What arrived on the device is not what the host has.
    #[error(
        "block {block}: {tensor} of {bytes} bytes arrived with other bytes from byte {offset} on: \
         hash {found:016x} on the device, {expected:016x} of its host source"
    )]
    Corrupt {
        /// Index of the block.
        block: u32,
        /// Name or number of the tensor.
        tensor: String,
        /// The first byte within it that differs.
        offset: u64,
        /// Size of the tensor.
        bytes: u64,
        /// `XXH3` of the host's bytes.
        expected: u64,
        /// `XXH3` of the device's bytes.
        found: u64,
    },
    /// Host memory could not be page-locked.
    #[error("page-locking {bytes} bytes failed: {reason}")]
    PageLock {
        /// Bytes wanted.
        bytes: u64,
        /// The system's words.
        reason: String,
    },
    /// An earlier error left the device unusable; the engine refuses to go on.
    #[error("the engine stopped after an earlier error: {0}; call detach() and start again")]
    Poisoned(String),
    /// A block outside of the plan, or a call out of turn.
    #[error("{0}")]
    Misuse(String),
    /// A bug of ours: an assertion failed inside the engine.
    #[error("internal error (please report it): {0}")]
    Internal(String),
}

impl Error {
    /// Whether the device context is lost, so that every later call on it fails too.
    pub fn is_sticky(&self) -> bool {
        match self {
            // CUDA driver API, "Data types used by CUDA driver", CUresult: the codes whose text
            // says that the context can no longer be used.
            Self::Driver { code, .. } => {
                matches!(code, 4 | 46 | 201 | 214 | 700 | 702 | 708..=710 | 714..=719 | 999)
            }
            Self::Internal(_) => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launch_failure_is_sticky_and_out_of_memory_is_not() {
        let with = |code| Error::Driver { call: "cuMemcpyHtoDAsync", code, name: String::new() };
        assert!(with(719).is_sticky());
        assert!(!with(2).is_sticky());
    }

    #[test]
    fn a_message_names_call_and_code() {
        let error = Error::Driver { call: "cuX", code: 2, name: "CUDA_ERROR_OUT_OF_MEMORY".into() };
        assert_eq!(error.to_string(), "cuX failed with CUDA error 2 (CUDA_ERROR_OUT_OF_MEMORY)");
    }
}

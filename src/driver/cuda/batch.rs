//! Several copies in one call of the driver, where it has such a call: CUDA 12.8 and newer.

use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys;

use super::H2d;
use super::api::{self, Api, Stream};
use super::copies::host_address;
use super::stream::CopyStream;
use crate::error::Result;
use crate::units::index;

/// Most copies of one call: the lists lie on the stack.
pub(super) const MOST: usize = 64;

/// The version whose `cuMemcpyBatchAsync` is called. CUDA 13 has another one under the same name,
/// without the index of the copy that failed; a driver of 13 still answers to this version.
const VERSION: i32 = 12_080;
const NOT_SUPPORTED: u32 = 801;

/// `cuGetProcAddress_v2`, of CUDA 12.0.
type FindFunction =
    unsafe extern "system" fn(*const c_char, *mut *mut c_void, i32, u64, *mut u32) -> u32;

/// `PFN_cuMemcpyBatchAsync_v12080`.
type CopyBatch = unsafe extern "system" fn(
    *mut u64,
    *mut u64,
    *mut usize,
    usize,
    *mut sys::CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    Stream,
) -> u32;

/// Sources are read in the order of the stream; the places are not hinted at, since hints are for
/// managed memory.
const IN_STREAM_ORDER: sys::CUmemcpyAttributes = {
    let nowhere =
        sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    sys::CUmemcpyAttributes {
        srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: nowhere,
        dstLocHint: nowhere,
        flags: 0,
    }
};

/// The driver's call for batches, if it has one.
#[derive(Debug)]
pub(super) struct Batches {
    api: &'static Api,
    function: Option<CopyBatch>,
    /// The driver has the call, but not for this device.
    refused: AtomicBool,
}

impl Batches {
    /// Looks the call up, unless `DGLS_TEST_SINGLE_COPIES` is set.
    pub(super) fn new(api: &'static Api) -> Self {
        let single = std::env::var_os("DGLS_TEST_SINGLE_COPIES").is_some();
        let function = if single { None } else { find() };
        Self { api, function, refused: AtomicBool::new(false) }
    }

    /// Enqueues at most [`MOST`] copies on `stream`, in one call; the context is current. `false`
    /// where they have to be enqueued one by one.
    ///
    /// # Errors
    ///
    /// The driver's error; some of the copies may have been enqueued then.
    pub(super) fn copy(&self, copies: &[H2d], stream: &CopyStream) -> Result<bool> {
        let usable = copies.len() > 1 && !self.refused.load(Ordering::Relaxed);
        let Some(function) = self.function.filter(|_| usable) else { return Ok(false) };
        let (mut targets, mut sources) = ([0; MOST], [0; MOST]);
        let (mut sizes, mut count) = ([0; MOST], 0);
        // The driver refuses a batch with an empty copy.
        for copy in copies.iter().filter(|copy| copy.bytes > 0) {
            (targets[count], sources[count]) = (copy.target, host_address(copy)?);
            sizes[count] = index(copy.bytes);
            count += 1;
        }
        if count < 2 {
            return Ok(false);
        }
        let (mut attributes, mut first, mut failed) = (IN_STREAM_ORDER, 0, 0);
        // SAFETY: the function is of the version that its type is of; each list has `count` entries
        // and is only read during the call; the attributes hold from copy 0 on. The engine checked
        // the targets against the arena, and they do not overlap; the sources are page-locked and
        // kept alive by the owner of the engine. The stream is ours, so not the NULL stream, which
        // takes no batches.
        let code = unsafe {
            function(
                targets.as_mut_ptr(),
                sources.as_mut_ptr(),
                sizes.as_mut_ptr(),
                count,
                &raw mut attributes,
                &raw mut first,
                1,
                &raw mut failed,
                stream.raw,
            )
        };
        if code == NOT_SUPPORTED {
            self.refused.store(true, Ordering::Relaxed);
            return Ok(false);
        }
        self.api.check("cuMemcpyBatchAsync", code)?;
        Ok(true)
    }
}

/// Asks the driver for the call of exactly [`VERSION`]. By its plain name the library's own table
/// of symbols would give a function of whatever version the name stands for there.
fn find() -> Option<CopyBatch> {
    // SAFETY: the type is the one of cuda.h for this symbol.
    let ask: FindFunction = unsafe { api::find("cuGetProcAddress_v2\0") }.ok()?;
    let mut function: Option<CopyBatch> = None;
    let mut status = 0;
    // SAFETY: writes one status and one pointer, to the function of that name as `VERSION` has it
    // or null, which is how `Option` holds a function and `None`. An older driver refuses.
    let code = unsafe {
        ask(c"cuMemcpyBatchAsync".as_ptr(), (&raw mut function).cast(), VERSION, 0, &raw mut status)
    };
    function.filter(|_| code == 0 && status == 0)
}

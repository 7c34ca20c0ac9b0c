//! What is asked of the machine, without an engine.

use crate::driver::cuda::driver_version;
use crate::error::Result;
use crate::fence::fence;
use crate::probe;

pub(super) fn cuda_driver_version() -> Result<i32> {
    fence(driver_version)
}

pub(super) fn measure_copy(
    device: i32,
    bytes: u64,
    repeats: u32,
    page_locked: bool,
) -> Result<f64> {
    fence(|| probe::measure_copy(device, bytes, repeats, page_locked))
}

pub(super) fn measure_page_lock(device: i32, max_bytes: u64) -> Result<u64> {
    fence(|| probe::measure_page_lock(device, max_bytes))
}

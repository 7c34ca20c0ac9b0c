//! Measures what a machine can do: copy rates and page-lock limits.

use std::time::Instant;

use crate::driver::cuda::{CudaDevice, CudaOptions};
use crate::driver::host::shim::Pages;
use crate::driver::host::{HostDevice, HostOptions};
use crate::driver::{Device, Source};
use crate::error::{Error, Result};

/// Most that a probe may ask of a machine.
const LIMIT_BYTES: u64 = 64 << 30;

fn check(bytes: u64) -> Result<()> {
    if bytes == 0 || bytes > LIMIT_BYTES {
        return Err(Error::Invalid(format!(
            "a probe takes 1 to {LIMIT_BYTES} bytes, got {bytes} bytes"
        )));
    }
    Ok(())
}

/// Bytes per second of host-to-device copies of `bytes` bytes, the best of `repeats`.
///
/// `device` counts as torch does; a negative one is the host device, whose memory is RAM. Blocks.
///
/// # Errors
///
/// [`Error::NoDriver`], or the device's error.
pub fn measure_copy(device: i32, bytes: u64, repeats: u32, page_locked: bool) -> Result<f64> {
    check(bytes)?;
    let pages = Pages::new(bytes)?;
    crate::driver::host::shim::fill(pages.address(), 1, bytes);
    if device < 0 {
        let host = HostDevice::new(HostOptions::default())?;
        let target = Pages::new(bytes)?;
        crate::driver::host::shim::fill(target.address(), 0, bytes);
        return best(&host, pages.address(), target.address(), bytes, repeats);
    }
    let cuda = CudaDevice::new(CudaOptions { ordinal: device, ..CudaOptions::default() })?;
    let target = cuda.allocate(bytes)?;
    let locked = if page_locked { cuda.page_lock(pages.address(), bytes) } else { Ok(()) };
    let rate = locked.and_then(|()| best(&cuda, pages.address(), target, bytes, repeats));
    if page_locked {
        cuda.page_unlock(pages.address(), bytes);
    }
    cuda.free(target);
    rate
}

fn best(device: &dyn Device, from: u64, target: u64, bytes: u64, repeats: u32) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..repeats.max(1) {
        let begun = Instant::now();
        device.copy(Source::Memory { address: from }, target, bytes)?;
        device.quiesce(None)?;
        best = best.min(begun.elapsed().as_secs_f64());
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate; 2^53 bytes are enough")]
    Ok(bytes as f64 / best)
}

/// Host bytes that can be page-locked, up to `max_bytes`; all are given back. Blocks.
///
/// # Errors
///
/// [`Error::NoDriver`] for a CUDA device that is not there.
pub fn measure_page_lock(device: i32, max_bytes: u64) -> Result<u64> {
    const STEP_BYTES: u64 = 64 << 20;
    check(max_bytes)?;
    let device: Box<dyn Device> = if device < 0 {
        Box::new(HostDevice::new(HostOptions::default())?)
    } else {
        Box::new(CudaDevice::new(CudaOptions { ordinal: device, ..CudaOptions::default() })?)
    };
    let mut locked = Vec::new();
    let mut sum = 0;
    let mut step = STEP_BYTES;
    // A refused step is tried again at half the size, so that small limits are found as well.
    while sum < max_bytes && step >= crate::driver::host::shim::page_bytes() {
        let bytes = step.min(max_bytes - sum);
        let pages = Pages::new(bytes)?;
        if device.page_lock(pages.address(), bytes).is_ok() {
            sum += bytes;
            locked.push(pages);
        } else {
            step /= 2;
        }
    }
    for pages in &locked {
        device.page_unlock(pages.address(), pages.bytes());
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_copies_at_some_rate() {
        let rate = measure_copy(-1, 1 << 20, 2, false).expect("RAM");
        assert!(rate > 0.0);
    }

    #[test]
    fn a_limit_is_found_in_whole_pages() {
        let locked = measure_page_lock(-1, 1 << 20).expect("the host device");
        assert!(locked <= 1 << 20);
        assert_eq!(locked % crate::driver::host::shim::page_bytes(), 0);
    }

    #[test]
    fn absurd_sizes_are_refused() {
        measure_copy(-1, 0, 1, false).expect_err("nothing to copy");
        measure_page_lock(-1, u64::MAX).expect_err("more than any machine has");
    }
}

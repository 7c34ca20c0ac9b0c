//! Owned contexts, streams and events; each is released on drop.

use super::api::{Api, Context, EventHandle, Stream};
use crate::error::Result;

const STREAM_NON_BLOCKING: u32 = 1;
pub(super) const EVENT_TIMED: u32 = 0;
pub(super) const EVENT_UNTIMED: u32 = 2;
/// The waiting thread sleeps: for the staging thread, which must not burn a core.
pub(super) const EVENT_BLOCKING: u32 = 1 | 2;

/// The primary context of a device: the one torch uses.
#[derive(Debug)]
pub(super) struct Primary {
    pub(super) api: &'static Api,
    device: i32,
    context: Context,
}

// SAFETY: a context handle may be used from any thread; the driver locks what it has to.
unsafe impl Send for Primary {}
// SAFETY: as above.
unsafe impl Sync for Primary {}

impl Primary {
    pub(super) fn retain(api: &'static Api, ordinal: i32) -> Result<Self> {
        let mut device = 0;
        // SAFETY: writes one number, or fails for an ordinal that is out of range.
        api.check("cuDeviceGet", unsafe { (api.cuDeviceGet)(&raw mut device, ordinal) })?;
        let mut context = std::ptr::null_mut();
        // SAFETY: `device` was just given by the driver.
        let code = unsafe { (api.cuDevicePrimaryCtxRetain)(&raw mut context, device) };
        api.check("cuDevicePrimaryCtxRetain", code)?;
        Ok(Self { api, device, context })
    }

    /// Makes the context current for as long as the guard lives; torch may have another device
    /// current, and finds it again afterwards.
    pub(super) fn bind(&self) -> Result<Bound<'_>> {
        let mut before = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (self.api.cuCtxGetCurrent)(&raw mut before) };
        self.api.check("cuCtxGetCurrent", code)?;
        if before != self.context {
            // SAFETY: the context is retained for as long as `self` lives.
            let code = unsafe { (self.api.cuCtxSetCurrent)(self.context) };
            self.api.check("cuCtxSetCurrent", code)?;
        }
        Ok(Bound { primary: self, before })
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        // SAFETY: retained once in `retain`. At process exit the driver may be gone: it says so.
        let _ = unsafe { (self.api.cuDevicePrimaryCtxRelease_v2)(self.device) };
    }
}

/// The context is current.
#[derive(Debug)]
pub(super) struct Bound<'a> {
    primary: &'a Primary,
    before: Context,
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        if self.before != self.primary.context && !self.before.is_null() {
            // SAFETY: it was current on this thread when the guard was made.
            let _ = unsafe { (self.primary.api.cuCtxSetCurrent)(self.before) };
        }
    }
}

/// The least priority and the greatest.
fn priorities(api: &'static Api) -> Result<(i32, i32)> {
    let (mut least, mut greatest) = (0, 0);
    // SAFETY: writes two numbers.
    let code = unsafe { (api.cuCtxGetStreamPriorityRange)(&raw mut least, &raw mut greatest) };
    api.check("cuCtxGetStreamPriorityRange", code)?;
    Ok((least, greatest))
}

/// A stream of ours.
#[derive(Debug)]
pub(super) struct CopyStream {
    api: &'static Api,
    pub(super) raw: Stream,
}

// SAFETY: stream handles may be used from any thread.
unsafe impl Send for CopyStream {}
// SAFETY: as above.
unsafe impl Sync for CopyStream {}

impl CopyStream {
    /// A non-blocking stream of the least priority; a context must be current.
    pub(super) fn new(api: &'static Api) -> Result<Self> {
        let (least, _) = priorities(api)?;
        Self::with_priority(api, least)
    }

    /// A non-blocking stream of the greatest priority, for short kernels that others wait for.
    pub(super) fn urgent(api: &'static Api) -> Result<Self> {
        let (_, greatest) = priorities(api)?;
        Self::with_priority(api, greatest)
    }

    fn with_priority(api: &'static Api, priority: i32) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe {
            (api.cuStreamCreateWithPriority)(&raw mut raw, STREAM_NON_BLOCKING, priority)
        };
        api.check("cuStreamCreateWithPriority", code)?;
        Ok(Self { api, raw })
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        let code = unsafe { (self.api.cuStreamSynchronize)(self.raw) };
        self.api.check("cuStreamSynchronize", code)
    }
}

impl Drop for CopyStream {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once; work in flight ends by itself.
        let _ = unsafe { (self.api.cuStreamDestroy_v2)(self.raw) };
    }
}

/// An event of ours.
#[derive(Debug)]
pub(super) struct Event {
    api: &'static Api,
    raw: EventHandle,
}

// SAFETY: event handles may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(api: &'static Api, flags: u32) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one handle.
        api.check("cuEventCreate", unsafe { (api.cuEventCreate)(&raw mut raw, flags) })?;
        Ok(Self { api, raw })
    }

    /// Enqueues the record on `stream`.
    pub(super) fn record(&self, stream: Stream) -> Result<()> {
        // SAFETY: the event is ours; the stream is ours or the one torch just named as current.
        let code = unsafe { (self.api.cuEventRecord)(self.raw, stream) };
        self.api.check("cuEventRecord", code)
    }

    /// Makes `stream` wait for the last record. The wait is for that record; later ones do not
    /// move it (CUDA driver API, cuStreamWaitEvent), so one event for each slot and role is enough.
    pub(super) fn hold(&self, stream: Stream) -> Result<()> {
        // SAFETY: as in `record`.
        let code = unsafe { (self.api.cuStreamWaitEvent)(stream, self.raw, 0) };
        self.api.check("cuStreamWaitEvent", code)
    }

    /// Whether the last record has passed. Never blocks.
    pub(super) fn passed(&self) -> bool {
        // SAFETY: the event is ours.
        unsafe { (self.api.cuEventQuery)(self.raw) == 0 }
    }

    /// Blocks until the last record has passed.
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the event is ours.
        let code = unsafe { (self.api.cuEventSynchronize)(self.raw) };
        self.api.check("cuEventSynchronize", code)
    }

    /// Milliseconds from `start` to this event; `None` while one has not passed.
    pub(super) fn since(&self, start: &Self) -> Option<f64> {
        let mut milliseconds = 0.0;
        // SAFETY: both events are ours.
        let code =
            unsafe { (self.api.cuEventElapsedTime)(&raw mut milliseconds, start.raw, self.raw) };
        (code == 0).then_some(f64::from(milliseconds))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once; a pending record does not need it any more.
        let _ = unsafe { (self.api.cuEventDestroy_v2)(self.raw) };
    }
}

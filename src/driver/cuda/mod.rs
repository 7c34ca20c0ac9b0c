//! The CUDA device: torch's primary context, one copy stream of ours, events, page-locks.
#![expect(unsafe_code, reason = "calls the CUDA driver; every call of it is in this folder")]

mod api;
mod batch;
mod clock;
mod copies;
mod decoder;
mod list;
mod locks;
mod slot;
mod stream;

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

pub use self::api::driver_version;
use self::batch::Batches;
use self::clock::Clock;
use self::decoder::Decoder;
use self::locks::Locks;
use self::slot::Slot;
use self::stream::{CopyStream, EVENT_BLOCKING, EVENT_TIMED, Event, Primary};
use super::host::files::Files;
use super::{ComputeStream, Device, EventSlot, H2d, Source, UseTimes};
use crate::error::{Error, Result};
use crate::units::index;

const PORTABLE: u32 = 1;
const READ_ONLY: u32 = 8;
const INVALID_VALUE: u32 = 1;

/// What a CUDA device is made with.
#[derive(Debug, Default)]
pub struct CudaOptions {
    /// The device's ordinal, as torch counts.
    pub ordinal: i32,
    /// Files that [`Source::File`] indexes.
    pub files: Files,
    /// Whether events carry times.
    pub timing: bool,
    /// Device memory to decode from, if weights are to come encoded: its address and its size, kept
    /// alive by the caller.
    pub decode_buffer: Option<(u64, u64)>,
}

/// A CUDA device. Fields drop in order: events and stream before the context.
#[derive(Debug)]
pub struct CudaDevice {
    slots: Mutex<Vec<Slot>>,
    chunks: Mutex<Vec<Arc<Event>>>,
    clock: Mutex<Option<Clock>>,
    decoder: Option<Decoder>,
    copy_stream: CopyStream,
    batches: Batches,
    locks: Mutex<Locks>,
    files: Files,
    timing: bool,
    primary: Primary,
}

impl CudaDevice {
    /// Retains the primary context and makes the copy stream.
    ///
    /// # Errors
    ///
    /// [`Error::NoDriver`] with the reason, the driver's error, or, with a buffer to decode from,
    /// why the device does not decode.
    pub fn new(options: CudaOptions) -> Result<Self> {
        driver_version()?;
        let primary = Primary::retain(api::api()?, options.ordinal)?;
        let (copy_stream, decoder) = {
            let _bound = primary.bind()?;
            let made = |(buffer, bytes)| Decoder::new(primary.api, buffer, bytes);
            (CopyStream::new(primary.api)?, options.decode_buffer.map(made).transpose()?)
        };
        Ok(Self {
            slots: Mutex::new(Vec::new()),
            chunks: Mutex::new(Vec::new()),
            clock: Mutex::new(None),
            decoder,
            copy_stream,
            batches: Batches::new(primary.api),
            locks: Mutex::new(Locks::default()),
            files: options.files,
            timing: options.timing,
            primary,
        })
    }

    fn on<T>(&self, slot: EventSlot, act: impl FnOnce(&Slot) -> Result<T>) -> Result<T> {
        let _bound = self.primary.bind()?;
        act(&self.slots.lock()[index(slot.0)])
    }

    /// Blocks until all that was enqueued has been decoded; the context is current.
    fn decoded(&self) -> Result<()> {
        self.decoder.as_ref().map_or(Ok(()), Decoder::synchronize)
    }

    /// Allocates device memory outside of torch, for measuring a link.
    ///
    /// # Errors
    ///
    /// The driver's error.
    pub fn allocate(&self, bytes: u64) -> Result<u64> {
        let _bound = self.primary.bind()?;
        self.primary.api.allocate(index(bytes))
    }

    /// Frees what [`CudaDevice::allocate`] gave.
    pub fn free(&self, address: u64) {
        // On a lost device binding fails, and freeing may still work.
        let _bound = self.primary.bind();
        self.primary.api.free(address);
    }
}

impl Device for CudaDevice {
    fn prepare(&self, slots: u32, chunks: u32) -> Result<()> {
        let _bound = self.primary.bind()?;
        let api = self.primary.api;
        // Two thousand events for sixty blocks: the device would wait for them at a change of plan.
        // Nothing runs, so what a plan before recorded has passed, as if it never had been.
        let mut made = self.slots.lock();
        made.iter().for_each(Slot::reset);
        while made.len() < index(slots) {
            made.push(Slot::new(api, self.timing)?);
        }
        drop(made);
        let ends = (0..chunks)
            .map(|_| Event::new(api, EVENT_BLOCKING).map(Arc::new))
            .collect::<Result<_>>()?;
        *self.clock.lock() = if self.timing {
            let (origin, next) = (Event::new(api, EVENT_TIMED)?, Event::new(api, EVENT_TIMED)?);
            Some(Clock::start(origin, next, self.copy_stream.raw)?)
        } else {
            None
        };
        *self.chunks.lock() = ends;
        Ok(())
    }

    fn copy(&self, source: Source, target: u64, bytes: u64) -> Result<()> {
        self.copy_batch(&[H2d { source, target, bytes }])
    }

    fn copy_batch(&self, copies: &[H2d]) -> Result<()> {
        let _bound = self.primary.bind()?;
        self.copy_all(copies)
    }

    fn decodes(&self) -> bool {
        self.decoder.is_some()
    }

    fn takes_as_one(&self, source: Source, bytes: u64) -> bool {
        match source {
            Source::Memory { address } => self.locks.lock().cover(address, bytes),
            Source::File { .. } | Source::Encoded { .. } => false,
        }
    }

    fn copy_within(&self, from: u64, to: u64, bytes: u64) -> Result<()> {
        let _bound = self.primary.bind()?;
        let copy = self.primary.api.cuMemcpyDtoDAsync_v2;
        // SAFETY: the engine checked both ranges against the arena, and that they are apart.
        let code = unsafe { copy(to, from, index(bytes), self.copy_stream.raw) };
        self.primary.api.check("cuMemcpyDtoDAsync", code)
    }

    fn fill(&self, target: u64, bytes: u64, value: u8) -> Result<()> {
        let _bound = self.primary.bind()?;
        // SAFETY: the engine checked `target` against the arena.
        let code = unsafe {
            (self.primary.api.cuMemsetD8Async)(target, value, index(bytes), self.copy_stream.raw)
        };
        self.primary.api.check("cuMemsetD8Async", code)
    }

    fn wait_done(&self, slot: EventSlot) -> Result<()> {
        self.on(slot, |events| events.done.hold(self.copy_stream.raw))
    }

    fn wait_decoded(&self) -> Result<()> {
        let _bound = self.primary.bind()?;
        self.decoder.as_ref().map_or(Ok(()), |decoder| decoder.hold(&self.copy_stream))
    }

    fn mark_copy_start(&self, slot: EventSlot) -> Result<()> {
        let stream = self.copy_stream.raw;
        self.on(slot, |events| {
            let Some(timed) = &events.timed else { return Ok(()) };
            events.times_copies.store(true, Ordering::Relaxed);
            timed.copy_start.record(stream)
        })
    }

    fn mark_ready(&self, slot: EventSlot) -> Result<()> {
        self.on(slot, |events| {
            let stream = match &self.decoder {
                Some(decoder) => decoder.end_of(&self.copy_stream)?,
                None => self.copy_stream.raw,
            };
            if let Some(timed) = events.timed_now(&events.times_copies) {
                timed.copy_end.record(stream)?;
            }
            events.ready.record(stream)
        })
    }

    fn mark_wait(&self, slot: EventSlot, compute: ComputeStream) -> Result<()> {
        self.on(slot, |events| {
            let Some(timed) = &events.timed else { return Ok(()) };
            events.times_compute.store(true, Ordering::Relaxed);
            timed.wait.record(index(compute.0) as api::Stream)
        })
    }

    fn wait_ready(&self, slot: EventSlot, compute: ComputeStream, timed: bool) -> Result<()> {
        let stream = index(compute.0) as api::Stream;
        self.on(slot, |events| {
            events.ready.hold(stream)?;
            events.timed.as_ref().filter(|_| timed).map_or(Ok(()), |t| t.start.record(stream))
        })
    }

    fn mark_done(&self, slot: EventSlot, compute: ComputeStream) -> Result<()> {
        let stream = index(compute.0) as api::Stream;
        self.on(slot, |events| {
            if let Some(timed) = events.timed_now(&events.times_compute) {
                timed.end.record(stream)?;
            }
            events.done.record(stream)
        })
    }

    fn takes(&self, source: Source, page_locked: bool) -> bool {
        page_locked && matches!(source, Source::Memory { .. })
    }

    fn allocate_chunk(&self, bytes: u64) -> Result<u64> {
        let _bound = self.primary.bind()?;
        let mut memory = std::ptr::null_mut();
        let api = self.primary.api;
        // SAFETY: writes one address.
        let code = unsafe { (api.cuMemHostAlloc)(&raw mut memory, index(bytes), PORTABLE) };
        api.check("cuMemHostAlloc", code)
            .map_err(|error| Error::PageLock { bytes, reason: error.to_string() })?;
        Ok(memory as u64)
    }

    fn free_chunk(&self, address: u64, _bytes: u64) {
        let _bound = self.primary.bind();
        // SAFETY: from `allocate_chunk`, freed once by `Staging`, after its copies ended.
        let _ = unsafe { (self.primary.api.cuMemFreeHost)(index(address) as *mut c_void) };
    }

    fn finish_reads(&self) {
        // After a sticky error nothing runs any more, and there is nobody to tell.
        let _ = self.quiesce(None);
    }

    fn check_files(&self) -> Result<()> {
        self.files.check_unchanged()
    }

    fn read(&self, source: Source, address: u64, bytes: u64) -> Result<()> {
        self.files.read(source, address, bytes)
    }

    fn read_directly(&self, source: Source, address: u64, bytes: u64) -> Result<bool> {
        self.files.read_directly(source, address, bytes)
    }

    fn read_back(&self, from: u64, address: u64, bytes: u64, on: ComputeStream) -> Result<()> {
        let _bound = self.primary.bind()?;
        let (api, stream) = (self.primary.api, index(on.0) as api::Stream);
        // SAFETY: the engine checked `from` against the arena; the caller owns the target until
        // the stream has been synchronised below.
        let code = unsafe {
            (api.cuMemcpyDtoHAsync_v2)(index(address) as *mut c_void, from, index(bytes), stream)
        };
        api.check("cuMemcpyDtoHAsync", code)?;
        // SAFETY: the stream is the one that torch just named as current.
        let code = unsafe { (api.cuStreamSynchronize)(stream) };
        api.check("cuStreamSynchronize", code)
    }

    fn mark_chunk(&self, chunk: u32) -> Result<()> {
        let _bound = self.primary.bind()?;
        self.chunks.lock()[index(chunk)].record(self.copy_stream.raw)
    }

    fn wait_chunk(&self, chunk: u32) -> Result<()> {
        let _bound = self.primary.bind()?;
        // Not under the lock: several threads wait, each for its own chunk.
        let copied = Arc::clone(&self.chunks.lock()[index(chunk)]);
        copied.synchronize()
    }

    fn page_lock(&self, address: u64, bytes: u64) -> Result<()> {
        let _bound = self.primary.bind()?;
        let api = self.primary.api;
        let register = |flags| {
            // SAFETY: the driver checks that the range is mapped; it writes nothing there.
            unsafe {
                (api.cuMemHostRegister_v2)(index(address) as *mut c_void, index(bytes), flags)
            }
        };
        // A read-only mapping is refused as an invalid value unless the flag says that it is one.
        let code = match register(PORTABLE) {
            INVALID_VALUE => register(PORTABLE | READ_ONLY),
            code => code,
        };
        // The driver API keeps no last error: a refusal here blames no later call.
        api.check("cuMemHostRegister", code)
            .map_err(|error| Error::PageLock { bytes, reason: error.to_string() })?;
        self.locks.lock().add(address, bytes);
        Ok(())
    }

    fn page_unlock(&self, address: u64, _bytes: u64) {
        self.locks.lock().remove(address);
        let _bound = self.primary.bind();
        // SAFETY: from `page_lock`, undone once by `Pins`, after its copies ended.
        let _ = unsafe { (self.primary.api.cuMemHostUnregister)(index(address) as *mut c_void) };
    }

    fn times(&self, slot: EventSlot) -> Option<UseTimes> {
        let _bound = self.primary.bind().ok()?;
        let mut clock = self.clock.lock();
        let clock = clock.as_mut()?;
        let slots = self.slots.lock();
        let events = slots[index(slot.0)].timed.as_ref()?;
        let mut read = |event: &Event| clock.read(event, self.copy_stream.raw);
        Some(UseTimes {
            end_ns: read(&events.end)?,
            copy_start_ns: read(&events.copy_start)?,
            copy_end_ns: read(&events.copy_end)?,
            wait_ns: read(&events.wait)?,
            start_ns: read(&events.start)?,
        })
    }

    fn quiesce(&self, last: Option<EventSlot>) -> Result<()> {
        let _bound = self.primary.bind()?;
        let copies = self.copy_stream.synchronize().and(self.decoded());
        let done = last.map_or(Ok(()), |slot| self.slots.lock()[index(slot.0)].done.synchronize());
        copies.and(done)
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // Events and the stream are released with the context current; work ends before.
        let _bound = self.primary.bind();
        let _ = self.copy_stream.synchronize();
        let _ = self.decoded();
        self.slots.lock().clear();
        self.chunks.lock().clear();
        *self.clock.lock() = None;
        self.decoder = None;
    }
}

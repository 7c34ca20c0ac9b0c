//! Any device with a wait taken out, batches gone wrong, or bytes changed on their way. Test only:
//! shows that the tests, and the check of what arrived, would notice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::{ComputeStream, Device, EventSlot, H2d, Source, UseTimes};
use crate::error::Result;

/// Which wait does nothing.
#[expect(clippy::struct_excessive_bools, reason = "one for each wait")]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// The compute stream does not wait for *ready*.
    pub ready: bool,
    /// The copy stream does not wait for *done*.
    pub done: bool,
    /// A staging chunk is filled while it is copied from.
    pub chunk: bool,
    /// The copy stream does not wait for what is decoded for uses that did not come.
    pub decoded: bool,
}

/// What becomes of the batches of copies.
#[derive(Debug, Clone, Default)]
pub enum Batches {
    /// What should.
    #[default]
    Right,
    /// The first copy of each is left out.
    Short,
    /// They go to the copy stream of another device, which no one waits for.
    Astray(Arc<dyn Device>),
}

/// Passes every call on but the dropped waits.
#[derive(Debug)]
pub struct Mutant {
    inner: Arc<dyn Device>,
    dropped: Dropped,
    batches: Batches,
    /// One byte of every such copy arrives changed; 0: of none.
    corrupt_every: u64,
    copies: AtomicU64,
}

impl Mutant {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Device>, dropped: Dropped) -> Self {
        let (batches, copies) = (Batches::Right, AtomicU64::new(0));
        Self { inner, dropped, batches, corrupt_every: 0, copies }
    }

    /// Does this to batches.
    #[must_use]
    pub fn with_batches(self, batches: Batches) -> Self {
        Self { batches, ..self }
    }

    /// Changes a byte of every `every`-th copy on its way to the device.
    #[must_use]
    pub fn corrupting(self, every: u64) -> Self {
        Self { corrupt_every: every, ..self }
    }

    /// Counts one copy, and changes its byte in the middle if it is one to change.
    fn corrupt(&self, copy: &H2d) -> Result<()> {
        let due = |number: u64| self.corrupt_every > 0 && number % self.corrupt_every == 0;
        // A byte of an encoded copy is known to nobody before it has been decoded.
        if copy.bytes == 0
            || copy.source.is_encoded()
            || !due(1 + self.copies.fetch_add(1, Ordering::Relaxed))
        {
            return Ok(());
        }
        let (byte, middle) = (AtomicU8::new(0), copy.bytes / 2);
        self.inner.read(copy.source.advanced(middle), byte.as_ptr() as u64, 1)?;
        self.inner.fill(copy.target + middle, 1, !byte.load(Ordering::Relaxed))
    }
}

impl Device for Mutant {
    fn prepare(&self, slots: u32, chunks: u32) -> Result<()> {
        self.inner.prepare(slots, chunks)
    }
    fn copy(&self, source: Source, target: u64, bytes: u64) -> Result<()> {
        self.inner.copy(source, target, bytes)?;
        self.corrupt(&H2d { source, target, bytes })
    }
    fn copy_within(&self, from: u64, to: u64, bytes: u64) -> Result<()> {
        self.inner.copy_within(from, to, bytes)
    }
    fn copy_batch(&self, copies: &[H2d]) -> Result<()> {
        match &self.batches {
            Batches::Right => {
                self.inner.copy_batch(copies)?;
                copies.iter().try_for_each(|copy| self.corrupt(copy))
            }
            Batches::Short => self.inner.copy_batch(&copies[1..]),
            Batches::Astray(other) => other.copy_batch(copies),
        }
    }
    fn decodes(&self) -> bool {
        self.inner.decodes()
    }
    fn takes_as_one(&self, source: Source, bytes: u64) -> bool {
        self.inner.takes_as_one(source, bytes)
    }
    fn fill(&self, target: u64, bytes: u64, value: u8) -> Result<()> {
        self.inner.fill(target, bytes, value)
    }
    fn wait_done(&self, slot: EventSlot) -> Result<()> {
        if self.dropped.done { Ok(()) } else { self.inner.wait_done(slot) }
    }
    fn wait_decoded(&self) -> Result<()> {
        if self.dropped.decoded { Ok(()) } else { self.inner.wait_decoded() }
    }
    fn mark_copy_start(&self, slot: EventSlot) -> Result<()> {
        self.inner.mark_copy_start(slot)
    }
    fn mark_ready(&self, slot: EventSlot) -> Result<()> {
        self.inner.mark_ready(slot)
    }
    fn mark_wait(&self, slot: EventSlot, compute: ComputeStream) -> Result<()> {
        self.inner.mark_wait(slot, compute)
    }
    fn wait_ready(&self, slot: EventSlot, compute: ComputeStream, timed: bool) -> Result<()> {
        if self.dropped.ready { Ok(()) } else { self.inner.wait_ready(slot, compute, timed) }
    }
    fn mark_done(&self, slot: EventSlot, compute: ComputeStream) -> Result<()> {
        self.inner.mark_done(slot, compute)
    }
    fn flush(&self) {
        self.inner.flush();
    }
    fn blocks_host(&self, slot: EventSlot) -> bool {
        self.inner.blocks_host(slot)
    }
    fn takes(&self, source: Source, page_locked: bool) -> bool {
        self.inner.takes(source, page_locked)
    }
    fn allocate_chunk(&self, bytes: u64) -> Result<u64> {
        self.inner.allocate_chunk(bytes)
    }
    fn finish_reads(&self) {
        self.inner.finish_reads();
    }
    fn free_chunk(&self, address: u64, bytes: u64) {
        self.inner.free_chunk(address, bytes);
    }
    fn check_files(&self) -> Result<()> {
        self.inner.check_files()
    }
    fn read(&self, source: Source, address: u64, bytes: u64) -> Result<()> {
        self.inner.read(source, address, bytes)
    }
    fn read_directly(&self, source: Source, address: u64, bytes: u64) -> Result<bool> {
        self.inner.read_directly(source, address, bytes)
    }
    fn read_back(&self, from: u64, address: u64, bytes: u64, on: ComputeStream) -> Result<()> {
        self.inner.read_back(from, address, bytes, on)
    }
    fn mark_chunk(&self, chunk: u32) -> Result<()> {
        self.inner.mark_chunk(chunk)
    }
    fn wait_chunk(&self, chunk: u32) -> Result<()> {
        if self.dropped.chunk { Ok(()) } else { self.inner.wait_chunk(chunk) }
    }
    fn page_lock(&self, address: u64, bytes: u64) -> Result<()> {
        self.inner.page_lock(address, bytes)
    }
    fn page_unlock(&self, address: u64, bytes: u64) {
        self.inner.page_unlock(address, bytes);
    }
    fn times(&self, slot: EventSlot) -> Option<UseTimes> {
        self.inner.times(slot)
    }
    fn quiesce(&self, last: Option<EventSlot>) -> Result<()> {
        self.inner.quiesce(last)
    }
}

//! Any device of which some calls fail, once each, without having done anything but the copies of a
//! batch before the one that fails, and whose reads can be held back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dgls_core::driver::{ComputeStream, Device, EventSlot, H2d, Source, UseTimes};
use dgls_core::{Error, Result};
use parking_lot::{Condvar, Mutex};

/// Fails the calls with the given numbers, counted over all fallible calls.
#[derive(Debug)]
pub(crate) struct Flaky {
    inner: Arc<dyn Device>,
    failing: BTreeSet<u64>,
    calls: AtomicU64,
    fired: AtomicU64,
    held: Mutex<bool>,
    let_go: Condvar,
}

impl Flaky {
    pub(crate) fn new(inner: Arc<dyn Device>, failing: BTreeSet<u64>) -> Self {
        Self {
            inner,
            failing,
            calls: AtomicU64::new(0),
            fired: AtomicU64::new(0),
            held: Mutex::new(false),
            let_go: Condvar::new(),
        }
    }

    /// Whether the staging thread is held back at its next read.
    pub(crate) fn hold(&self, held: bool) {
        *self.held.lock() = held;
        self.let_go.notify_all();
    }

    /// How many calls have failed.
    pub(crate) fn fired(&self) -> u64 {
        self.fired.load(Ordering::SeqCst)
    }

    fn attempt(&self, call: &'static str) -> Result<()> {
        if self.failing.contains(&self.calls.fetch_add(1, Ordering::SeqCst)) {
            self.fired.fetch_add(1, Ordering::SeqCst);
            return Err(Error::Driver { call, code: 1, name: "injected".into() });
        }
        Ok(())
    }
}

impl Device for Flaky {
    fn prepare(&self, slots: u32, chunks: u32) -> Result<()> {
        self.attempt("prepare")?;
        self.inner.prepare(slots, chunks)
    }
    fn copy(&self, source: Source, target: u64, bytes: u64) -> Result<()> {
        self.attempt("copy")?;
        self.inner.copy(source, target, bytes)
    }
    fn copy_within(&self, from: u64, to: u64, bytes: u64) -> Result<()> {
        self.attempt("copy_within")?;
        self.inner.copy_within(from, to, bytes)
    }
    fn copy_batch(&self, copies: &[H2d]) -> Result<()> {
        let mut before = 0;
        let attempted = copies.iter().try_for_each(|_| {
            self.attempt("copy_batch")?;
            before += 1;
            Ok(())
        });
        self.inner.copy_batch(&copies[..before])?;
        attempted
    }
    fn takes_as_one(&self, source: Source, bytes: u64) -> bool {
        self.inner.takes_as_one(source, bytes)
    }
    fn fill(&self, target: u64, bytes: u64, value: u8) -> Result<()> {
        self.attempt("fill")?;
        self.inner.fill(target, bytes, value)
    }
    fn wait_done(&self, slot: EventSlot) -> Result<()> {
        self.attempt("wait_done")?;
        self.inner.wait_done(slot)
    }
    fn mark_copy_start(&self, slot: EventSlot) -> Result<()> {
        self.attempt("mark_copy_start")?;
        self.inner.mark_copy_start(slot)
    }
    fn mark_ready(&self, slot: EventSlot) -> Result<()> {
        self.attempt("mark_ready")?;
        self.inner.mark_ready(slot)
    }
    fn mark_wait(&self, slot: EventSlot, compute: ComputeStream) -> Result<()> {
        self.attempt("mark_wait")?;
        self.inner.mark_wait(slot, compute)
    }
    fn wait_ready(&self, slot: EventSlot, compute: ComputeStream, timed: bool) -> Result<()> {
        self.attempt("wait_ready")?;
        self.inner.wait_ready(slot, compute, timed)
    }
    fn mark_done(&self, slot: EventSlot, compute: ComputeStream) -> Result<()> {
        self.attempt("mark_done")?;
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
        self.attempt("allocate_chunk")?;
        self.inner.allocate_chunk(bytes)
    }
    fn free_chunk(&self, address: u64, bytes: u64) {
        self.inner.free_chunk(address, bytes);
    }
    fn read(&self, source: Source, address: u64, bytes: u64) -> Result<()> {
        self.attempt("read")?;
        self.let_go.wait_while(&mut self.held.lock(), |held| *held);
        self.inner.read(source, address, bytes)
    }
    fn mark_chunk(&self, chunk: u32) -> Result<()> {
        self.attempt("mark_chunk")?;
        self.inner.mark_chunk(chunk)
    }
    fn wait_chunk(&self, chunk: u32) -> Result<()> {
        self.attempt("wait_chunk")?;
        self.inner.wait_chunk(chunk)
    }
    fn page_lock(&self, address: u64, bytes: u64) -> Result<()> {
        self.attempt("page_lock")?;
        self.inner.page_lock(address, bytes)
    }
    fn page_unlock(&self, address: u64, bytes: u64) {
        self.inner.page_unlock(address, bytes);
    }
    fn times(&self, slot: EventSlot) -> Option<UseTimes> {
        self.inner.times(slot)
    }
    fn quiesce(&self, last: Option<EventSlot>) -> Result<()> {
        self.attempt("quiesce")?;
        self.inner.quiesce(last)
    }
}

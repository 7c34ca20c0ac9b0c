//! Any device of which some calls fail, once each, without having done anything but the copies of a
//! batch before the one that fails, and whose reads can be held back.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dgls_core::driver::{ComputeStream, Device, EventSlot, H2d, Source, UseTimes};
use dgls_core::{Error, Result};
use parking_lot::{Condvar, Mutex};

use crate::random::Random;

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    Refused,
    OutOfMemory,
    /// And every call after it.
    Lost,
    Panics,
    /// A panic that gets out of every fence but the one around C++'s calls: it ends a thread.
    Kills,
}

struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            std::panic::panic_any("a thread was killed");
        }
    }
}

/// Fails the calls with the given numbers, counted over all fallible calls.
#[derive(Debug)]
pub(crate) struct Flaky {
    inner: Arc<dyn Device>,
    failing: BTreeMap<u64, Fault>,
    kinds: Mutex<Vec<Fault>>,
    lost: AtomicBool,
    calls: AtomicU64,
    fired: AtomicU64,
    held: Mutex<bool>,
    let_go: Condvar,
    /// So many uses the host is ahead of the device: times of the last ones cannot be read yet.
    ahead: AtomicU64,
    /// How many uses were marked as done, and of each slot how many it was after.
    done: Mutex<(u64, BTreeMap<u32, u64>)>,
    reads: AtomicU64,
}

impl Flaky {
    pub(crate) fn new(inner: Arc<dyn Device>, failing: BTreeSet<u64>) -> Self {
        Self::with(inner, failing.into_iter().map(|number| (number, Fault::Refused)).collect())
    }

    pub(crate) fn with(inner: Arc<dyn Device>, failing: BTreeMap<u64, Fault>) -> Self {
        Self {
            inner,
            failing,
            kinds: Mutex::default(),
            lost: AtomicBool::new(false),
            calls: AtomicU64::new(0),
            fired: AtomicU64::new(0),
            held: Mutex::new(false),
            let_go: Condvar::new(),
            ahead: AtomicU64::new(0),
            done: Mutex::default(),
            reads: AtomicU64::new(0),
        }
    }

    /// The host goes so many uses ahead of the device.
    pub(crate) fn go_ahead(&self, uses: u64) {
        self.ahead.store(uses, Ordering::SeqCst);
    }

    /// How often times were asked for.
    pub(crate) fn reads(&self) -> u64 {
        self.reads.load(Ordering::SeqCst)
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

    /// How those calls have failed.
    pub(crate) fn kinds(&self) -> Vec<Fault> {
        self.kinds.lock().clone()
    }

    fn attempt(&self, call: &'static str) -> Result<()> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst);
        let refused = |code| Err(Error::Driver { call, code, name: "injected".into() });
        let Some(&fault) = self.failing.get(&number) else {
            return if self.lost.load(Ordering::SeqCst) { refused(719) } else { Ok(()) };
        };
        self.fired.fetch_add(1, Ordering::SeqCst);
        self.kinds.lock().push(fault);
        match fault {
            Fault::Refused => refused(1),
            Fault::OutOfMemory => refused(2),
            Fault::Lost => {
                self.lost.store(true, Ordering::SeqCst);
                refused(719)
            }
            Fault::Panics => panic!("injected into {call}"),
            Fault::Kills => std::panic::panic_any(Bomb),
        }
    }
}

/// A call that may panic, as the fence around C++'s calls sees it. `None`: it did.
pub(crate) fn fenced<T>(call: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(value) => Some(value),
        Err(payload) => {
            std::mem::forget(payload);
            None
        }
    }
}

/// Which calls fail, and how.
pub(crate) fn faults(random: &mut Random) -> BTreeMap<u64, Fault> {
    use Fault::{Kills, Lost, OutOfMemory, Panics, Refused};
    let spread = random.pick(&[30, 200, 800]);
    let usual = random.between(1, 8);
    let mut faults: BTreeMap<u64, Fault> = (0..usual)
        .map(|_| (random.between(0, spread), random.pick(&[Refused, OutOfMemory])))
        .collect();
    // After one of these nothing more can happen.
    if random.chance(30) {
        faults.insert(random.between(0, spread), random.pick(&[Lost, Panics, Kills]));
    }
    faults
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
    fn decodes(&self) -> bool {
        self.inner.decodes()
    }
    fn wait_decoded(&self) -> Result<()> {
        self.attempt("wait_decoded")?;
        self.inner.wait_decoded()
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
        let mut done = self.done.lock();
        done.0 += 1;
        let count = done.0;
        done.1.insert(slot.0, count);
        drop(done);
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
        self.attempt("read")?;
        self.let_go.wait_while(&mut self.held.lock(), |held| *held);
        self.inner.read(source, address, bytes)
    }
    fn read_back(&self, from: u64, address: u64, bytes: u64, on: ComputeStream) -> Result<()> {
        self.attempt("read_back")?;
        self.inner.read_back(from, address, bytes, on)
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
        self.reads.fetch_add(1, Ordering::SeqCst);
        let done = self.done.lock();
        let marked = done.1.get(&slot.0).copied().unwrap_or_default();
        let passed = marked + self.ahead.load(Ordering::SeqCst) <= done.0;
        passed.then(|| self.inner.times(slot)).flatten()
    }
    fn quiesce(&self, last: Option<EventSlot>) -> Result<()> {
        self.attempt("quiesce")?;
        self.inner.quiesce(last)
    }
}

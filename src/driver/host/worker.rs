//! The copy thread of the host device: a queue in order, and what has passed so far.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::HostOptions;
use super::files::Files;
use super::shim;
use crate::driver::{EventSlot, H2d, Source, UseTimes};
use crate::error::{Error, Result};
use crate::sync::{Condvar, Mutex, may_switch};
use crate::units::index;

/// To wake a thread takes as long as to copy about this much.
const INLINE_BYTES: u64 = 32 << 10;

/// One entry of the queue.
#[derive(Debug, Clone, Copy)]
pub(super) enum Op {
    Copy {
        source: Source,
        target: u64,
        bytes: u64,
    },
    Fill {
        target: u64,
        bytes: u64,
        value: u8,
    },
    CopyStart(EventSlot),
    /// The copies out of a staging chunk have ended.
    Chunk(u32),
    Ready(EventSlot),
    Stop,
}

impl Op {
    /// Bytes to move; reading a file, or decoding, counts as more than any copy.
    fn bytes(self) -> u64 {
        match self {
            Self::Copy { source: Source::File { .. } | Source::Encoded { .. }, .. } => u64::MAX,
            Self::Copy { bytes, .. } | Self::Fill { bytes, .. } => bytes,
            Self::CopyStart(_) | Self::Chunk(_) | Self::Ready(_) | Self::Stop => 0,
        }
    }
}

/// The marks of one use. `ready_enqueued > ready_passed` while its copies are under way.
#[derive(Debug, Default)]
struct Marks {
    ready_enqueued: u64,
    ready_passed: u64,
    error: Option<Error>,
    times: UseTimes,
}

#[derive(Debug)]
struct State {
    queue: VecDeque<Op>,
    queued_bytes: u64,
    busy: bool,
    /// The thread is no more: what is in the queue will never pass.
    ended: bool,
    marks: Vec<Marks>,
    /// For each staging chunk how many of its marks have yet to pass.
    chunks: Vec<u64>,
    /// Error of the copies since the last `Ready`; it belongs to the next one.
    error: Option<Error>,
}

/// Tells whoever waits that the thread is no more, however it ended.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        (state.ended, state.busy) = (true, false);
        self.0.passed.notify_all();
    }
}

/// What the device and its thread share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    work: Condvar,
    passed: Condvar,
    options: HostOptions,
    epoch: Instant,
}

impl Shared {
    pub(super) fn new(options: HostOptions) -> Self {
        let state = State {
            queue: VecDeque::new(),
            queued_bytes: 0,
            busy: false,
            ended: false,
            marks: Vec::new(),
            chunks: Vec::new(),
            error: None,
        };
        Self {
            state: Mutex::new(state),
            work: Condvar::new(),
            passed: Condvar::new(),
            options,
            epoch: Instant::now(),
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn prepare(&self, slots: u32, chunks: u32) {
        self.drain();
        let mut state = self.state.lock();
        state.marks.clear();
        state.marks.resize_with(index(slots), Marks::default);
        state.chunks.clear();
        state.chunks.resize(index(chunks), 0);
        state.error = None;
        // Room for the deepest queue there can be, so that the hot path never allocates.
        state.queue.reserve(index(slots) * 64);
    }

    /// Adds to the queue; the thread is woken by `flush`, or by whoever waits.
    pub(super) fn push(&self, op: Op) {
        let mut state = self.state.lock();
        state.queued_bytes = state.queued_bytes.saturating_add(op.bytes());
        state.queue.push_back(op);
    }

    /// What was enqueued begins: in the thread, or here and now if that costs less than waking it.
    pub(super) fn flush(&self) {
        let mut state = self.state.lock();
        if state.queue.is_empty() {
            return;
        }
        if state.busy || state.queued_bytes > INLINE_BYTES || self.options.copy_bytes_per_s > 0 {
            self.work.notify_one();
            return;
        }
        while let Some(op) = state.queue.pop_front() {
            match op {
                Op::Copy { source, target, bytes } => {
                    if let Err(error) = self.read(source, target, bytes) {
                        state.error.get_or_insert(error);
                    }
                }
                Op::Fill { target, bytes, value } => shim::fill(target, value, bytes),
                Op::CopyStart(slot) => {
                    state.marks[index(slot.0)].times.copy_start_ns = self.now_ns();
                }
                Op::Chunk(chunk) => self.pass_chunk(&mut state, chunk),
                Op::Ready(slot) => self.pass_ready(&mut state, slot),
                Op::Stop => {
                    state.queue.push_front(Op::Stop);
                    self.work.notify_one();
                    return;
                }
            }
        }
        state.queued_bytes = 0;
    }

    /// Whether `wait_ready` would have to wait.
    pub(super) fn is_pending(&self, slot: EventSlot) -> bool {
        let state = self.state.lock();
        let marks = &state.marks[index(slot.0)];
        marks.ready_passed < marks.ready_enqueued
    }

    pub(super) fn mark_ready(&self, slot: EventSlot) {
        let mut state = self.state.lock();
        state.marks[index(slot.0)].ready_enqueued += 1;
        if state.busy || !state.queue.is_empty() {
            state.queue.push_back(Op::Ready(slot));
        } else {
            // Nothing is under way: the mark has passed already. To wake the thread for it would
            // cost more than all the rest of a resident block's call.
            self.pass_ready(&mut state, slot);
        }
    }

    pub(super) fn mark_wait(&self, slot: EventSlot) {
        let now_ns = self.now_ns();
        self.state.lock().marks[index(slot.0)].times.wait_ns = now_ns;
    }

    pub(super) fn wait_ready(&self, slot: EventSlot, timed: bool) -> Result<()> {
        let mut state = self.state.lock();
        let target = state.marks[index(slot.0)].ready_enqueued;
        while state.marks[index(slot.0)].ready_passed < target {
            if state.ended {
                return Err(Error::Internal("the copy thread has ended".into()));
            }
            self.work.notify_one();
            self.passed.wait(&mut state);
        }
        let marks = &mut state.marks[index(slot.0)];
        if timed {
            marks.times.start_ns = self.now_ns();
        }
        marks.error.clone().map_or(Ok(()), Err)
    }

    pub(super) fn mark_done(&self, slot: EventSlot) {
        let now_ns = self.now_ns();
        self.state.lock().marks[index(slot.0)].times.end_ns = now_ns;
    }

    pub(super) fn times(&self, slot: EventSlot) -> Option<UseTimes> {
        let state = self.state.lock();
        let marks = &state.marks[index(slot.0)];
        (marks.ready_passed == marks.ready_enqueued).then_some(marks.times)
    }

    pub(super) fn drain(&self) {
        let mut state = self.state.lock();
        while !state.ended && (state.busy || !state.queue.is_empty()) {
            self.work.notify_one();
            self.passed.wait(&mut state);
        }
        // Of copies whose use was given up before its *ready*: it belongs to no other one.
        state.error = None;
    }

    pub(super) fn read(&self, source: Source, address: u64, bytes: u64) -> Result<()> {
        self.options.files.read(source, address, bytes)
    }

    pub(super) fn files(&self) -> &Files {
        &self.options.files
    }

    /// Whether a link is modelled.
    pub(super) fn is_link(&self) -> bool {
        self.options.copy_bytes_per_s > 0
    }

    pub(super) fn mark_chunk(&self, chunk: u32) {
        let mut state = self.state.lock();
        state.chunks[index(chunk)] += 1;
        state.queue.push_back(Op::Chunk(chunk));
    }

    pub(super) fn wait_chunk(&self, chunk: u32) {
        let mut state = self.state.lock();
        while !state.ended && state.chunks[index(chunk)] > 0 {
            self.work.notify_one();
            self.passed.wait(&mut state);
        }
    }

    fn pass_chunk(&self, state: &mut State, chunk: u32) {
        state.chunks[index(chunk)] -= 1;
        self.passed.notify_all();
    }

    /// The thread's body: takes all that is in the queue at once, since each look at it may
    /// meet the caller's.
    pub(super) fn run(&self) {
        let _told = Ended(self);
        let mut batch = VecDeque::new();
        loop {
            {
                let mut state = self.state.lock();
                state.busy = false;
                while state.queue.is_empty() {
                    self.passed.notify_all();
                    self.work.wait(&mut state);
                }
                std::mem::swap(&mut batch, &mut state.queue);
                state.queued_bytes = 0;
                let room = batch.capacity();
                state.queue.reserve(room);
                state.busy = true;
            }
            while let Some(op) = batch.pop_front() {
                match op {
                    Op::Copy { source, target, bytes } => self.copy(source, target, bytes),
                    Op::Fill { target, bytes, value } => shim::fill(target, value, bytes),
                    Op::CopyStart(slot) => {
                        let now_ns = self.now_ns();
                        self.state.lock().marks[index(slot.0)].times.copy_start_ns = now_ns;
                    }
                    Op::Chunk(chunk) => self.pass_chunk(&mut self.state.lock(), chunk),
                    Op::Ready(slot) => self.pass_ready(&mut self.state.lock(), slot),
                    Op::Stop => return,
                }
            }
        }
    }

    fn copy(&self, source: Source, target: u64, bytes: u64) {
        let begun = Instant::now();
        may_switch();
        if let Err(error) = self.read(source, target, bytes) {
            self.state.lock().error.get_or_insert(error);
        }
        if self.options.copy_bytes_per_s > 0 {
            let bytes = H2d { source, target, bytes }.link_bytes();
            let ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.options.copy_bytes_per_s);
            let due = Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX));
            #[expect(clippy::disallowed_methods, reason = "the modelled link is busy meanwhile")]
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
    }

    fn pass_ready(&self, state: &mut State, slot: EventSlot) {
        let now_ns = self.now_ns();
        let error = state.error.take();
        let marks = &mut state.marks[index(slot.0)];
        marks.error = error;
        marks.ready_passed += 1;
        marks.times.copy_end_ns = now_ns;
        self.passed.notify_all();
    }
}

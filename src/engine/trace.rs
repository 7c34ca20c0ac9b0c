//! Counters, and a ring of timed uses. No printing.

use std::collections::VecDeque;

use crate::driver::UseTimes;
use crate::error::Error;

/// One timed use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// The endless number of the use; `number / cycle` is the cycle it ran in.
    pub number: u64,
    /// The block.
    pub block: u32,
    /// Bytes that this use streamed.
    pub bytes: u64,
    /// Bytes of those that were copied from [`UseTimes::copy_start_ns`] on, in one stretch; 0 if
    /// residents were brought in it too.
    pub stretch_bytes: u64,
    /// The bytes that the link could have carried in the time that the stretch takes: more than
    /// `stretch_bytes` where some come from a slower tier.
    pub stretch_cost: u64,
    /// Copies of that stretch.
    pub stretch_copies: u32,
    /// When.
    pub times: UseTimes,
}

/// What happened since the engine was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Blocks entered.
    pub uses: u64,
    /// Uses whose copies had not been enqueued before.
    pub on_demand: u64,
    /// Uses that came out of turn.
    pub mispredicted: u64,
    /// Times the plan was made anew.
    pub rebuilds: u64,
    /// Of those, the times it was for what was measured.
    pub adopted: u64,
    /// Errors of the device.
    pub errors: u64,
    /// Bytes that were compared with their host source after they had arrived.
    pub verified_bytes: u64,
    /// Uses whose bytes were other ones.
    pub mismatches: u64,
}

/// The last timed uses, oldest first, in fixed memory.
#[derive(Debug)]
pub struct Trace {
    records: VecDeque<Record>,
    capacity: usize,
}

impl Trace {
    /// Keeps the last `capacity` uses.
    pub fn new(capacity: usize) -> Self {
        Self { records: VecDeque::with_capacity(capacity), capacity }
    }

    /// Adds a use at its place: times of uses that copy nothing are read later than others'. The
    /// oldest goes when the ring is full.
    pub fn push(&mut self, record: Record) {
        if self.capacity == 0 {
            return;
        }
        let older = |other: &Record| other.number < record.number;
        let mut at = self.records.iter().rposition(older).map_or(0, |last| last + 1);
        if self.records.len() == self.capacity {
            if at == 0 {
                return;
            }
            self.records.pop_front();
            at -= 1;
        }
        self.records.insert(at, record);
    }

    /// The uses, oldest first.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.iter()
    }
}

/// The last errors, for a report: an engine that failed a thousand times keeps as many as ever.
#[derive(Debug, Default)]
pub(super) struct ErrorLog(VecDeque<String>);

impl ErrorLog {
    const MOST: usize = 16;

    pub(super) fn note(&mut self, error: &Error) {
        if self.0.len() == Self::MOST {
            self.0.pop_front();
        }
        self.0.push_back(error.to_string());
    }

    pub(super) fn texts(&self) -> Vec<String> {
        self.0.iter().cloned().collect()
    }
}

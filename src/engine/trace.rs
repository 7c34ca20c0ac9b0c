//! Counters, and a ring of timed uses. No printing.

use std::collections::VecDeque;

use crate::driver::UseTimes;

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

    /// Adds a use; the oldest goes when the ring is full.
    pub fn push(&mut self, record: Record) {
        if self.capacity == 0 {
            return;
        }
        if self.records.len() == self.capacity {
            self.records.pop_front();
        }
        self.records.push_back(record);
    }

    /// The uses, oldest first.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.iter()
    }
}

//! What must be enqueued next? Pure: no device, no clock, no lock.
//!
//! Uses are numbered without end: number `n` is position `n % cycle` of the program. The order is
//! predicted, never assumed: a block that comes out of turn is looked for further on in the
//! cycle, and all uses between count as over. So a skipped, repeated or re-ordered block costs
//! copies, never a wrong byte.
//!
//! ```text
//!   over              running   copies enqueued         not yet
//!   ... n-3 n-2 n-1 |    n    | n+1 (n+2, in part)  |  ...
//!              released      next                 issued
//! ```
//!
//! Invariant: `released <= next <= issued` or nothing is issued beyond `next`; a copy is enqueued
//! only when the use it waits for is over, and after a wait for the last *done*: a wait on an
//! event that was not recorded yet would be a no-op.

use std::sync::Arc;

use super::adapt::Adapt;
use super::command::{Command, Options};
use crate::driver::EventSlot;
use crate::error::{Error, Result};
use crate::plan::{Copy, Program, Wait};
use crate::units::{index, narrow};

/// The block that runs now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Active {
    position: u32,
    slot: EventSlot,
    /// A dormant use lies where others may come to lie: nothing is prefetched beside it.
    alone: bool,
}

/// What `enter` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entered {
    /// Position of the use in the program: the caller binds the views of that position.
    pub position: u32,
    /// Events of the use.
    pub slot: EventSlot,
    /// Number of the use; `None` for a dormant one.
    pub number: Option<u64>,
    /// Uses that were predicted before this one and did not come.
    pub skipped: u64,
    /// The copies were not enqueued before the block was entered.
    pub on_demand: bool,
    /// Whether the times of this use are marked.
    pub timed: bool,
}

/// The state machine of one engine.
#[derive(Debug)]
pub struct Schedule {
    program: Arc<Program>,
    next: u64,
    issued: u64,
    /// Copies of use `issued` that are enqueued already.
    issued_copies: u32,
    released: u64,
    loaded: Vec<bool>,
    /// Blocks of which some residents are still where the plan before had them.
    kept: Vec<bool>,
    /// For each event slot, the first copy of its last stretch, of those of its use.
    stretches: Vec<Option<u32>>,
    tickets: Vec<u64>,
    last_ticket: u64,
    last_done: Option<EventSlot>,
    active: Option<Active>,
    /// Cycles that are timed besides the usual ones.
    sampled: std::ops::Range<u64>,
    options: Options,
}

impl Schedule {
    /// A schedule with nothing on the device yet but the resident tensors that are `kept`.
    pub fn new(program: Arc<Program>, options: Options, kept: &[bool]) -> Self {
        let slots = index(Self::event_slots(&program));
        let here = |load: &Copy| kept.get(index(load.tensor)).is_some_and(|&kept| kept);
        let loaded = program.loads.iter().map(|loads| loads.iter().all(here)).collect();
        let kept = program.loads.iter().map(|loads| loads.iter().any(here)).collect();
        Self {
            program,
            next: 0,
            issued: 0,
            issued_copies: 0,
            released: 0,
            loaded,
            kept,
            stretches: vec![None; slots],
            tickets: vec![0; slots],
            last_ticket: 0,
            last_done: None,
            active: None,
            sampled: 0..0,
            options,
        }
    }

    /// Event slots that a program needs: two for each use, and the origin.
    pub fn event_slots(program: &Program) -> u32 {
        2 * narrow(program.uses.len()) + 1
    }

    /// Commands that one call can give at most.
    pub fn most_commands(program: &Program) -> usize {
        2 * program.copies.len() + 4 * program.uses.len() + 16
    }

    fn cycle(&self) -> u64 {
        u64::from(self.program.cycle)
    }

    fn position(&self, number: u64) -> u32 {
        u32::try_from(number % self.cycle()).expect("less than `cycle`, which is a u32")
    }

    /// Two sets of events take turns, so that one can be read while the other is in use.
    fn slot(&self, number: u64) -> EventSlot {
        let second = (number / self.cycle()) % 2 == 1;
        let first = if second { narrow(self.program.uses.len()) } else { 0 };
        EventSlot(first + self.position(number))
    }

    /// Whether the marks of use `number` carry times: those of sampled cycles, and where plans are
    /// looked for, the first one of each pass, which says whether anything changed.
    fn timed(&self, number: u64) -> bool {
        let adapts = self.options.adapt != Adapt::Off;
        let first = number % (self.cycle() / u64::from(self.program.passes)) == 0;
        self.is_sampled(number) || (adapts && first)
    }

    /// Whether all uses of the cycle of use `number` are timed. Reading the times of a use costs as
    /// much as four launches of a kernel.
    pub fn is_sampled(&self, number: u64) -> bool {
        let cycle = number / self.cycle();
        let wanted = self.options.timing || self.options.adapt != Adapt::Off;
        wanted && (cycle < 4 || cycle % 8 < 2 || self.sampled.contains(&cycle))
    }

    /// Something changed: the next cycles are timed.
    pub fn sample(&mut self) {
        let cycle = self.next / self.cycle().max(1);
        if !self.sampled.contains(&cycle) {
            self.sampled = cycle + 1..cycle + 4;
        }
    }

    /// Uses in one cycle, and the event slot of `number`: for reading times.
    pub fn slot_of(&self, number: u64) -> EventSlot {
        self.slot(number)
    }

    /// The event that stands for all that the compute stream did before the first use.
    pub fn origin(&self) -> EventSlot {
        EventSlot(2 * narrow(self.program.uses.len()))
    }

    /// Whether nothing was marked on the compute stream yet: the arena may still be read by
    /// kernels that ran before it was allocated.
    pub fn needs_origin(&self) -> bool {
        self.last_done.is_none()
    }

    /// The compute stream has passed this mark; all later copies wait for it.
    pub fn marked_origin(&mut self) {
        self.last_done = Some(self.origin());
    }

    /// The last *done* that was enqueued.
    pub fn last_done(&self) -> Option<EventSlot> {
        self.last_done
    }

    /// The block that runs now.
    pub fn active_block(&self) -> Option<u32> {
        self.active.map(|active| self.program.uses[index(active.position)].block)
    }

    /// `block` begins: enqueues what it still lacks, then what may come early, then the wait.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] for an unknown block, or while another one runs.
    pub fn enter(&mut self, block: u32, out: &mut Vec<Command>) -> Result<Entered> {
        if let Some(active) = self.active_block() {
            return Err(Error::Misuse(format!("block {block} began while block {active} runs")));
        }
        let Some(number) = self.find(block) else {
            return self.enter_dormant(block, out);
        };
        let skipped = number - self.next;
        let on_demand = self.issued <= number;
        self.released = self.released.max(number);
        if on_demand && skipped > 0 {
            out.push(Command::Cancel);
            self.issued = number;
            self.issued_copies = 0;
        }
        if on_demand {
            self.wait_for_last(out);
            self.issue_rest(out);
        }
        self.next = number + 1;
        let (position, slot) = (self.position(number), self.slot(number));
        self.active = Some(Active { position, slot, alone: false });
        self.prefetch(out);
        let timed = self.timed(number);
        out.push(Command::Acquire { slot, ticket: self.tickets[index(slot.0)], timed });
        Ok(Entered { position, slot, number: Some(number), skipped, on_demand, timed })
    }

    /// The events of the predicted use, if it is of `block` and all of its copies are enqueued.
    pub fn expected(&self, block: u32) -> Option<EventSlot> {
        let issued = self.cycle() > 0 && self.issued > self.next;
        let used = &self.program.uses[index(issued.then(|| self.position(self.next))?)];
        (used.block == block).then(|| self.slot(self.next))
    }

    /// The nearest use of `block` from the predicted one on.
    fn find(&self, block: u32) -> Option<u64> {
        let uses = &self.program.uses;
        (self.next..self.next + self.cycle())
            .find(|&number| uses[index(self.position(number))].block == block)
    }

    fn enter_dormant(&mut self, block: u32, out: &mut Vec<Command>) -> Result<Entered> {
        let mut dormant = self.program.uses.iter().enumerate().skip(index(self.program.cycle));
        let Some((position, used)) = dormant.find(|(_, used)| used.block == block) else {
            return Err(Error::Misuse(format!("block {block} is not in the plan")));
        };
        let (position, alone) = (narrow(position), !used.copies.is_empty());
        let slot = EventSlot(position);
        if alone {
            out.push(Command::Cancel);
            self.issued = self.next;
            self.issued_copies = 0;
        }
        let on_demand = alone || !self.loaded[index(block)];
        if on_demand {
            self.wait_for_last(out);
            self.issue_copies(slot, position, 0, out);
            self.mark_ready(slot, out);
        }
        self.active = Some(Active { position, slot, alone });
        out.push(Command::Acquire { slot, ticket: self.tickets[index(slot.0)], timed: false });
        Ok(Entered { position, slot, number: None, skipped: 0, on_demand, timed: false })
    }

    /// The running block has ended, by itself or by an exception: its bytes may be overwritten
    /// once *done* has passed.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] when no block runs.
    pub fn exit(&mut self, out: &mut Vec<Command>) -> Result<EventSlot> {
        let Some(active) = self.active.take() else {
            return Err(Error::Misuse("a block ended that had not begun".into()));
        };
        out.push(Command::Release(active.slot));
        self.last_done = Some(active.slot);
        if !active.alone {
            self.released = self.next;
        }
        if self.options.poison && !self.program.uses[index(active.position)].copies.is_empty() {
            self.wait_for_last(out);
            out.push(Command::Poison { position: active.position });
        }
        self.prefetch(out);
        Ok(active.slot)
    }

    /// Enqueues copies in order of use for as long as the uses they wait for are over, at most
    /// one cycle ahead: a use's events must have been waited for before they are used again.
    pub fn prefetch(&mut self, out: &mut Vec<Command>) {
        if self.active.is_some_and(|active| active.alone) {
            return;
        }
        self.issued = self.issued.max(self.next);
        let mut waited = false;
        while self.issued < self.next + self.cycle() {
            let used = &self.program.uses[index(self.position(self.issued))];
            let range = used.copies.clone();
            let allowed = (range.start + self.issued_copies..range.end)
                .take_while(|&copy| self.may_issue(self.program.copies[index(copy)].wait))
                .count();
            let ends = range.start + self.issued_copies + narrow(allowed) == range.end;
            if allowed == 0 && !ends {
                return;
            }
            if !waited {
                self.wait_for_last(out);
                waited = true;
            }
            if ends {
                self.issue_rest(out);
            } else {
                self.start_copies(out);
                for copy in range.skip(index(self.issued_copies)).take(allowed) {
                    out.push(Command::Copy { index: copy });
                }
                self.issued_copies += narrow(allowed);
                return;
            }
        }
    }

    /// Whether the use that had these bytes before is over.
    fn may_issue(&self, wait: Option<Wait>) -> bool {
        wait.is_none_or(|wait| {
            let cycle = self.issued / self.cycle();
            cycle < u64::from(wait.lag)
                || (cycle - u64::from(wait.lag)) * self.cycle() + u64::from(wait.position)
                    < self.released + self.options.early
        })
    }

    /// Enqueues what is left of use `issued`, and its *ready*.
    fn issue_rest(&mut self, out: &mut Vec<Command>) {
        let position = self.position(self.issued);
        let slot = self.slot(self.issued);
        self.start_copies(out);
        self.issue_copies(slot, position, self.issued_copies, out);
        self.mark_ready(slot, out);
        self.issued += 1;
        self.issued_copies = 0;
    }

    fn start_copies(&mut self, out: &mut Vec<Command>) {
        if self.timed(self.issued) {
            let slot = self.slot(self.issued);
            self.stretches[index(slot.0)] = Some(self.issued_copies);
            out.push(Command::CopyStart(slot));
        }
    }

    /// The copies of the last stretch of use `number`; none if residents were brought in it too.
    pub fn stretch(&self, number: u64) -> &[Copy] {
        let copies = self.program.copies_of(&self.program.uses[index(self.position(number))]);
        let first = self.stretches[index(self.slot(number).0)];
        first.and_then(|first| copies.get(index(first)..)).unwrap_or_default()
    }

    /// For each block, whether its resident tensors have been asked for.
    pub fn loaded(&self) -> &[bool] {
        &self.loaded
    }

    fn issue_copies(&mut self, slot: EventSlot, position: u32, from: u32, out: &mut Vec<Command>) {
        let used = &self.program.uses[index(position)];
        if !self.loaded[index(used.block)] {
            let block = used.block;
            self.loaded[index(block)] = true;
            out.push(if self.kept[index(block)] {
                Command::LoadMissing { block }
            } else {
                Command::Load { block }
            });
            self.stretches[index(slot.0)] = None;
        }
        out.extend(used.copies.clone().skip(index(from)).map(|index| Command::Copy { index }));
    }

    fn mark_ready(&mut self, slot: EventSlot, out: &mut Vec<Command>) {
        self.last_ticket += 1;
        self.tickets[index(slot.0)] = self.last_ticket;
        out.push(Command::Ready { slot, ticket: self.last_ticket });
    }

    fn wait_for_last(&self, out: &mut Vec<Command>) {
        out.extend(self.last_done.map(Command::WaitDone));
    }

    /// The master of a block was changed: its resident tensors are brought again.
    pub fn reload(&mut self, block: u32) {
        self.loaded[index(block)] = self.program.loads[index(block)].is_empty();
        self.kept[index(block)] = false;
        // Streamed bytes that are on their way may be the old ones.
        self.issued = self.next;
        self.issued_copies = 0;
    }

    /// After a device error nothing on the device is trusted: everything is brought again, after
    /// a new origin, since a *done* may not have been marked. A block that runs no longer counts.
    pub fn forget(&mut self) {
        self.active = None;
        self.released = self.next;
        self.last_done = None;
        for (loaded, loads) in self.loaded.iter_mut().zip(&self.program.loads) {
            *loaded = loads.is_empty();
        }
        self.kept.fill(false);
        self.issued = self.next;
        self.issued_copies = 0;
    }
}

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
//!
//! A *quiet* use streams nothing, and what it has on the device was waited for before: it needs no
//! mark and no wait. Only who overwrites residents, or ends the engine, has to mark its end first.

mod ahead;
mod sampling;

use std::ops::Range;
use std::sync::Arc;

use super::command::{Command, Options};
use crate::driver::EventSlot;
use crate::error::{Error, Result};
use crate::plan::{Copy, Program};
use crate::units::{index, narrow};

/// The block that runs now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Active {
    position: u32,
    slot: EventSlot,
    /// A dormant use lies where others may come to lie: nothing is prefetched beside it.
    alone: bool,
    /// Its end is not marked.
    quiet: bool,
}

/// Passes that the host may be ahead of the device without times being lost: marks are made anew
/// after one more. The driver takes about a thousand launches before it makes the host wait.
const AHEAD: u32 = 4;

/// Sets of events, of one cycle of uses each.
fn sets(program: &Program) -> u32 {
    (AHEAD + 1).div_ceil(program.passes.max(1)).max(2)
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
    /// Copies were enqueued for uses that did not come, or that will be copied again.
    given_up: bool,
    /// For each event slot, the last use whose copies were timed, and the first of these of its
    /// last stretch.
    stretches: Vec<Option<(u64, u32)>>,
    tickets: Vec<u64>,
    last_ticket: u64,
    last_done: Option<EventSlot>,
    /// The last of the uses whose end was not marked, after the last that was.
    unmarked: Option<EventSlot>,
    /// The last *ready* that the compute stream has waited for.
    acquired: u64,
    /// For each block, the *ready* after which its residents are there.
    load_tickets: Vec<u64>,
    /// For each position, whether a copy waits for its use.
    awaited: Vec<bool>,
    active: Option<Active>,
    /// Passes that are timed besides the usual ones.
    sampled: Range<u64>,
    /// Those before: the last of them may run still, and the times of others may not be read yet.
    earlier: [Range<u64>; 2],
    /// The first of the passes that were timed so before these.
    sampled_before: Option<u64>,
    options: Options,
}

impl Schedule {
    /// A schedule with nothing on the device yet but the resident tensors that are `kept`.
    pub fn new(program: Arc<Program>, options: Options, kept: &[bool]) -> Self {
        let slots = index(Self::event_slots(&program));
        let here = |load: &Copy| kept.get(index(load.tensor)).is_some_and(|&kept| kept);
        let loaded = program.loads.iter().map(|loads| loads.iter().all(here)).collect();
        let kept = program.loads.iter().map(|loads| loads.iter().any(here)).collect();
        let mut awaited = vec![false; program.uses.len()];
        for wait in program.copies.iter().filter_map(|copy| copy.wait) {
            awaited[index(wait.position)] = true;
        }
        Self {
            load_tickets: vec![0; program.loads.len()],
            program,
            next: 0,
            issued: 0,
            issued_copies: 0,
            given_up: false,
            released: 0,
            loaded,
            kept,
            stretches: vec![None; slots],
            tickets: vec![0; slots],
            last_ticket: 0,
            last_done: None,
            unmarked: None,
            acquired: 0,
            awaited,
            active: None,
            sampled: 0..0,
            earlier: [0..0, 0..0],
            sampled_before: None,
            options,
        }
    }

    /// Event slots that a program needs: a few for each use, and the origin.
    pub fn event_slots(program: &Program) -> u32 {
        sets(program) * narrow(program.uses.len()) + 1
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

    /// Sets of events take turns, so that one can be read while others are in use.
    fn slot(&self, number: u64) -> EventSlot {
        let set = (number / self.cycle()) % u64::from(sets(&self.program));
        EventSlot(narrow(index(set) * self.program.uses.len()) + self.position(number))
    }

    /// The event slot of `number`: for reading times.
    pub fn slot_of(&self, number: u64) -> EventSlot {
        self.slot(number)
    }

    /// The event that stands for all that the compute stream did before the first use.
    pub fn origin(&self) -> EventSlot {
        EventSlot(Self::event_slots(&self.program) - 1)
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
        self.given_up |= skipped > 0;
        let on_demand = self.issued <= number;
        self.released = self.released.max(number);
        if on_demand && skipped > 0 {
            out.push(Command::Cancel);
            self.issued = number;
            self.issued_copies = 0;
        }
        if on_demand {
            if !self.is_silent(number) {
                self.wait_for_last(out);
            }
            self.issue_rest(out);
        }
        self.next = number + 1;
        let (position, slot) = (self.position(number), self.slot(number));
        let quiet = self.is_quiet(number);
        self.active = Some(Active { position, slot, alone: false, quiet });
        if !quiet && self.tickets[index(slot.0)] == 0 {
            self.mark_ready(slot, out);
        }
        self.prefetch(out);
        let timed = self.timed(number);
        if !quiet {
            self.acquire(slot, timed, out);
        }
        Ok(Entered { position, slot, number: Some(number), skipped, on_demand, timed })
    }

    fn acquire(&mut self, slot: EventSlot, timed: bool, out: &mut Vec<Command>) {
        let ticket = self.tickets[index(slot.0)];
        out.push(Command::Acquire { slot, ticket, timed });
        self.acquired = self.acquired.max(ticket);
    }

    /// Whether use `number` needs no *ready* of its own: there is nothing to copy for it.
    fn is_silent(&self, number: u64) -> bool {
        let position = index(self.position(number));
        let used = &self.program.uses[position];
        let nothing = used.copies.is_empty() && self.loaded[index(used.block)];
        nothing && !self.awaited[position] && !self.timed(number)
    }

    /// Whether, besides, what it has on the device was waited for before.
    fn is_quiet(&self, number: u64) -> bool {
        let block = self.program.uses[index(self.position(number))].block;
        self.is_silent(number) && self.load_tickets[index(block)] <= self.acquired
    }

    /// Whether the predicted use is of `block`, and needs no wait.
    pub fn expects_quiet(&self, block: u32) -> bool {
        let is_block = |number| self.program.uses[index(self.position(number))].block == block;
        self.cycle() > 0 && is_block(self.next) && self.is_quiet(self.next)
    }

    /// The last of the uses whose end was not marked, if there are any. Before residents are
    /// overwritten, or another stream goes on, its *done* has to be marked on its stream.
    pub fn unmarked(&self) -> Option<EventSlot> {
        self.unmarked
    }

    /// The *done* of `slot` was marked.
    pub fn marked(&mut self, slot: EventSlot) {
        self.last_done = Some(slot);
        self.unmarked = None;
    }

    /// Blocks run on another compute stream from now on, which has waited for nothing yet.
    pub fn switch_stream(&mut self) {
        self.acquired = 0;
        // Also for what was there before the first *ready*.
        self.load_tickets.iter_mut().for_each(|ticket| *ticket = (*ticket).max(1));
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
            self.given_up = true;
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
        self.active = Some(Active { position, slot, alone, quiet: false });
        self.acquire(slot, false, out);
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
        if active.quiet {
            self.unmarked = Some(active.slot);
        } else {
            out.push(Command::Release(active.slot));
            self.marked(active.slot);
        }
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

    /// The copies of the last stretch of use `number`; none if they were not timed, or if residents
    /// were brought in it too.
    pub fn stretch(&self, number: u64) -> &[Copy] {
        let copies = self.program.copies_of(&self.program.uses[index(self.position(number))]);
        let timed = self.stretches[index(self.slot(number).0)];
        let first = timed.filter(|&(whose, _)| whose == number);
        first.and_then(|(_, first)| copies.get(index(first)..)).unwrap_or_default()
    }

    /// For each block, whether its resident tensors have been asked for.
    pub fn loaded(&self) -> &[bool] {
        &self.loaded
    }

    /// The master of a block was changed: its resident tensors are brought again.
    pub fn reload(&mut self, block: u32) {
        // What comes next may overwrite what the running block reads.
        if let Some(active) = &mut self.active {
            active.quiet = false;
        }
        self.loaded[index(block)] = self.program.loads[index(block)].is_empty();
        self.kept[index(block)] = false;
        // Streamed bytes that are on their way may be the old ones.
        self.given_up = true;
        self.issued = self.next;
        self.issued_copies = 0;
    }

    /// After a device error nothing on the device is trusted: everything is brought again, after
    /// a new origin, since a *done* may not have been marked. A block that runs no longer counts.
    pub fn forget(&mut self) {
        self.active = None;
        self.released = self.next;
        (self.last_done, self.unmarked) = (None, None);
        for (loaded, loads) in self.loaded.iter_mut().zip(&self.program.loads) {
            *loaded = loads.is_empty();
        }
        self.kept.fill(false);
        self.issued = self.next;
        self.issued_copies = 0;
    }
}

//! What may be enqueued ahead of the running block.

use super::Schedule;
use crate::driver::EventSlot;
use crate::engine::command::Command;
use crate::plan::Wait;
use crate::units::{index, narrow};

impl Schedule {
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
            if !waited && !self.is_silent(self.issued) {
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
    pub(super) fn issue_rest(&mut self, out: &mut Vec<Command>) {
        let position = self.position(self.issued);
        let slot = self.slot(self.issued);
        if self.is_silent(self.issued) {
            self.tickets[index(slot.0)] = 0;
        } else {
            self.start_copies(out);
            self.issue_copies(slot, position, self.issued_copies, out);
            self.mark_ready(slot, out);
        }
        self.issued += 1;
        self.issued_copies = 0;
    }

    fn start_copies(&mut self, out: &mut Vec<Command>) {
        if self.timed(self.issued) {
            let slot = self.slot(self.issued);
            self.stretches[index(slot.0)] = Some((self.issued, self.issued_copies));
            out.push(Command::CopyStart(slot));
        }
    }

    pub(super) fn issue_copies(
        &mut self,
        slot: EventSlot,
        position: u32,
        from: u32,
        out: &mut Vec<Command>,
    ) {
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
            self.load_tickets[index(block)] = self.last_ticket + 1; // the *ready* that comes next
        }
        out.extend(used.copies.clone().skip(index(from)).map(|index| Command::Copy { index }));
    }

    pub(super) fn mark_ready(&mut self, slot: EventSlot, out: &mut Vec<Command>) {
        self.last_ticket += 1;
        self.tickets[index(slot.0)] = self.last_ticket;
        out.push(Command::Ready { slot, ticket: self.last_ticket });
    }

    /// What was enqueued for uses that will not come is ordered by no use.
    pub(super) fn wait_for_last(&mut self, out: &mut Vec<Command>) {
        out.extend(self.last_done.map(Command::WaitDone));
        if std::mem::take(&mut self.given_up) {
            out.push(Command::WaitDecoded);
        }
    }
}

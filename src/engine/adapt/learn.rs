//! What an engine makes of what it measured: reads times, keeps the trace, and has better plans
//! looked for.

use super::super::command::Command;
use super::super::core::Core;
use super::super::trace::Record;
use super::review::{Adapt, Question};
use super::tuner::News;
use crate::driver::EventSlot;
use crate::plan::Profile;
use crate::units::{count, index, narrow, real, whole};

/// Seconds that a caller takes to make the view of a tensor, until it was measured.
const VIEW_S: f64 = 10e-6;

impl Core {
    /// The profile for the order learned so far and the times measured so far.
    pub(in crate::engine) fn best_profile(&self) -> Profile {
        let order = self.order.best().to_vec();
        // Before anything was measured, or for another order, the caller's times, if any.
        let given = self.spec.profile.times.clone();
        let known = self.tuner.times(order.len()).or(given);
        let times = known.filter(|_| !self.order.has_learned());
        Profile { order, times, slow: self.slow.clone(), ..self.spec.profile.clone() }
    }

    /// Whether [`Core::rebuild`] would find something new.
    pub(in crate::engine) fn wants_rebuild(&self) -> bool {
        self.order.has_learned() || self.proposal.is_some()
    }

    /// A pass has ended: takes up the outcome of a search for a plan, or starts one.
    pub(in crate::engine) fn pass_ended(&mut self) {
        self.refresh();
        self.keep_encoding();
        let adapt = self.spec.options.adapt;
        if adapt == Adapt::Off || self.plan.streamed_bytes == 0 || !self.is_open() {
            return;
        }
        self.read_all_times();
        if self.order.has_learned() {
            self.proposal = None;
            return;
        }
        if let Some(found) = self.review.take() {
            self.proposal = Some(found);
        }
        if self.proposal.is_none() && self.review.is_due(self.assembly.passes()) {
            self.look_for_a_plan();
        }
    }

    /// Reads the times of uses whose marks the commands are about to move.
    pub(in crate::engine) fn read_times(&mut self) {
        for at in 0..self.commands.len() {
            if let Command::CopyStart(slot) | Command::Ready { slot, .. } = self.commands[at] {
                self.forget_times(slot);
            }
        }
    }

    /// Reads the times of the use that had these marks last, if nobody has; they will be gone.
    pub(in crate::engine) fn forget_times(&mut self, slot: EventSlot) {
        if let Some(number) = self.unread[index(slot.0)] {
            self.take_times(number);
            self.unread[index(slot.0)] = None;
        }
    }

    fn take_times(&mut self, number: u64) {
        let slot = self.schedule.slot_of(number);
        if self.unread[index(slot.0)] != Some(number) {
            return;
        }
        if let Some(times) = self.device.times(slot) {
            self.unread[index(slot.0)] = None;
            let cycle = u64::from(self.plan.program.cycle);
            let used = &self.plan.program.uses[index(number % cycle)];
            let bytes = self.plan.program.copies_of(used).iter().map(|copy| copy.bytes).sum();
            let stretch = self.schedule.stretch(number);
            let record = Record {
                number,
                block: used.block,
                bytes,
                stretch_bytes: stretch.iter().map(|copy| copy.bytes).sum(),
                stretch_cost: stretch.iter().map(|copy| self.cost(copy.tensor, copy.bytes)).sum(),
                stretch_copies: narrow(stretch.len()),
                times,
            };
            if self.schedule.is_sampled(number) {
                self.trace.push(record);
            }
            self.learn(&record);
        }
    }

    /// The bytes that the link could have carried in the time that these take.
    fn cost(&self, tensor: u32, bytes: u64) -> u64 {
        self.slow.get(index(tensor)).map_or(bytes, |slow| whole(slow * real(bytes)))
    }

    /// A use was timed: if that completes a pass, a better plan may be looked for.
    fn learn(&mut self, record: &Record) {
        if self.spec.options.adapt == Adapt::Off {
            return;
        }
        let found = self.assembly.add(record);
        let begun = found.first_s.and_then(|first_s| self.tuner.begins(first_s));
        let ended = found.inside_s.and_then(|inside_s| self.tuner.ends(inside_s));
        if let Some(inside_s) = found.inside_s
            && std::mem::take(&mut self.is_fresh)
        {
            let wanted_s = self.plan.period_s.unwrap_or(inside_s);
            self.tuner.paused_longer(inside_s - wanted_s);
        }
        if let Some(news) = begun.max(ended) {
            self.schedule.sample(news == News::Large);
        }
        let Some(pass) = found.pass else { return };
        let due = self.tuner.observe(&pass, self.plan.period_s).is_some();
        self.weigh(&pass, self.tuner.outside_s());
        if !due || self.proposal.is_some() || self.order.has_learned() {
            return;
        }
        if self.review.is_open() {
            self.tuner.put_off();
        } else {
            self.look_for_a_plan();
        }
    }

    fn look_for_a_plan(&mut self) {
        let question = self.question();
        self.review.start(self.spec.options.adapt, question);
    }

    fn question(&self) -> Question {
        let guess_s = VIEW_S * count(self.spec.profile.tensors.len());
        Question {
            profile: self.best_profile(),
            budget_bytes: self.spec.budget_bytes,
            plan: self.plan.clone(),
            passes: self.assembly.passes(),
            horizon: self.tuner.horizon(),
            pause_s: match self.spec.options.adapt {
                Adapt::Beside => self.tuner.pause_s().unwrap_or(guess_s),
                Adapt::AtOnce | Adapt::Off => 0.0,
            },
            reading_s: self.host.reading_s(&self.spec),
            locker: self.host.locker(&self.spec),
        }
    }

    /// A block was entered: if it is the first one under a new plan, the device had nothing to do
    /// until now.
    pub(in crate::engine) fn note_pause(&mut self) {
        if let Some(since) = self.idle_since.take() {
            self.tuner.paused(since.elapsed().as_secs_f64());
        }
    }

    /// Reads what has passed, oldest first, up to what has not: a change is known before the pass
    /// ends in which it was seen. Allocates nothing.
    pub(in crate::engine) fn poll_times(&mut self) {
        while let Some(number) = self.unread.iter().flatten().copied().min() {
            self.take_times(number);
            if self.unread[index(self.schedule.slot_of(number).0)].is_some() {
                return;
            }
        }
    }

    pub(in crate::engine) fn read_all_times(&mut self) {
        let mut numbers: Vec<u64> = self.unread.iter().flatten().copied().collect();
        numbers.sort_unstable();
        for number in numbers {
            self.take_times(number);
        }
    }

    /// The timed uses, oldest first, with those whose marks have passed meanwhile.
    pub(in crate::engine) fn records(&mut self) -> Vec<Record> {
        self.read_all_times();
        self.trace.records().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::UseTimes;
    use crate::engine::Encode;
    use crate::engine::adapt::change::tests::core;

    /// Use `number`, of a millisecond, for which a MiB was copied in half of that.
    fn record(number: u64) -> Record {
        let begun_ns = number * 1_000_000;
        Record {
            number,
            block: narrow(index(number % 8)),
            bytes: 1 << 20,
            stretch_bytes: 1 << 20,
            stretch_cost: 1 << 20,
            stretch_copies: 1,
            times: UseTimes {
                copy_start_ns: begun_ns,
                copy_end_ns: begun_ns + 500_000,
                wait_ns: begun_ns,
                start_ns: begun_ns,
                end_ns: begun_ns + 1_000_000,
            },
        }
    }

    #[test]
    fn the_first_pass_of_a_plan_that_was_taken_up_counts_with_what_it_takes_longer() {
        let mut core = core();
        core.spec.options.adapt = Adapt::Beside;
        core.plan.period_s = Some(1e-3);
        core.tuner.paused(0.01);
        core.is_fresh = true;
        (0..16).for_each(|number| core.learn(&record(number)));
        let pause_s = core.tuner.pause_s().expect("told");
        assert!((pause_s - 0.017).abs() < 1e-9, "{pause_s}: 8 ms instead of 1, once");
    }

    #[test]
    fn timed_passes_say_how_much_is_to_go_encoded() {
        for (ratio, eighths) in [(0.8, 0), (1.05, 3), (2.0, 8)] {
            let mut core = core();
            (core.spec.options.adapt, core.spec.encode) =
                (Adapt::AtOnce, Encode::WhereCopiesDecide);
            // Eight blocks take 8 ms.
            let mib_ns = whole(ratio * 8e6 / real(core.plan.streamed_bytes >> 20)) + 5_000;
            for number in 0..33 {
                let mut record = record(number);
                record.times.copy_end_ns = record.times.copy_start_ns + mib_ns;
                assert!(number >= 24 || core.eighths() == 0, "three passes have to say so");
                core.learn(&record);
            }
            assert_eq!(core.eighths(), eighths, "copies take {ratio} of the compute");
        }
    }

    #[test]
    fn a_search_that_is_due_while_another_is_open_comes_after_it() {
        let mut core = core();
        core.spec.options.adapt = Adapt::AtOnce;
        // The first two passes are due; nobody takes what the first search has found.
        (0..17).for_each(|number| core.learn(&record(number)));
        assert!(core.review.is_open());
        let _ = core.review.take();
        (17..24).for_each(|number| core.learn(&record(number)));
        assert!(!core.review.is_open(), "not before the pass has ended");
        core.learn(&record(24));
        assert!(core.review.is_open());
    }
}

//! Which uses are timed, and when times are read.

use super::Schedule;
use crate::engine::adapt::Adapt;

/// Times are read at one of so many uses.
const POLL: u64 = 8;
/// Of the first so many passes of a plan two of eight are timed, later two of so many.
const EARLY: u64 = 32;
/// After news this many passes are timed.
const AFTER_NEWS: u64 = 3;
/// Of so many passes at most twice as many as that.
const REST: u64 = 32;

impl Schedule {
    /// Whether the marks of use `number` carry times: those of sampled passes, and of each pass the
    /// first and the last, which say whether anything changed.
    pub(super) fn timed(&self, number: u64) -> bool {
        let place = number % self.uses_of_pass();
        let is_watched = self.is_watching() && (place == 0 || place + 1 == self.uses_of_pass());
        is_watched || self.is_sampled(number)
    }

    /// Whether better plans are looked for: not where nothing is streamed.
    fn is_watching(&self) -> bool {
        self.options.adapt != Adapt::Off && !self.program.copies.is_empty()
    }

    /// Whether use `number` is one of those at which times are read ahead of the end of the pass.
    pub fn polls(&self, number: u64) -> bool {
        self.is_watching() && number % self.uses_of_pass() % POLL == POLL - 1
    }

    fn uses_of_pass(&self) -> u64 {
        (self.cycle() / u64::from(self.program.passes.max(1))).max(1)
    }

    /// Whether all uses of the pass of use `number` are timed. Reading the times of a use costs as
    /// much as four launches of a kernel. Where nothing is streamed there is little to learn, so
    /// later passes are timed for a report alone, and seldom.
    pub fn is_sampled(&self, number: u64) -> bool {
        let pass = number / self.uses_of_pass();
        let wanted = self.options.timing || self.options.adapt != Adapt::Off;
        let again = if self.program.copies.is_empty() {
            self.options.timing && pass % EARLY < AFTER_NEWS
        } else {
            let besides = [&self.sampled, &self.earlier[0], &self.earlier[1]];
            pass % (if pass < EARLY { 8 } else { EARLY }) < 2
                || besides.iter().any(|passes| passes.contains(&pass))
        };
        wanted && (pass < 4 || again)
    }

    /// Something changed: the next passes are timed, from the first on of which nothing has begun.
    /// Where that is said again and again they come later, since little is learned then; but not
    /// after a change that was large.
    pub fn sample(&mut self, is_large: bool) {
        let next = self.next.div_ceil(self.uses_of_pass());
        if self.sampled.contains(&next) || (next < self.sampled.end && !is_large) {
            return;
        }
        let before = self.sampled_before.filter(|_| !is_large);
        let begin = before.map_or(next, |before| next.max(before + REST));
        if !self.sampled.is_empty() {
            self.sampled_before = Some(next.min(self.sampled.start));
        }
        let earlier = self.sampled.start..self.sampled.end.min(next);
        if !earlier.is_empty() {
            self.earlier.rotate_right(1);
            self.earlier[0] = earlier;
        }
        self.sampled = begin..begin + AFTER_NEWS;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::Options;
    use crate::plan::{Profile, Tensor, plan};

    const BLOCKS: u64 = 8;

    /// Which of the first hundred passes are timed, within `budget` MiB of eight.
    fn sampled(budget: u64, timing: bool, adapt: Adapt) -> Vec<u64> {
        let tensors = (0..8).map(|block| Tensor { block, bytes: 1 << 20 }).collect();
        let profile = Profile { tensors, order: (0..8).collect(), ..Profile::default() };
        let program = Arc::new(plan(&profile, budget << 20).expect("feasible").program);
        let options = Options { timing, adapt, ..Options::default() };
        let mut schedule = Schedule::new(program, options, &[]);
        schedule.sample(true); // of the next passes, which are timed as it is
        (0..100).filter(|pass| schedule.is_sampled(pass * BLOCKS)).collect()
    }

    #[test]
    fn passes_are_timed_often_at_first_and_seldom_later() {
        let often = [0, 1, 2, 3, 8, 9, 16, 17, 24, 25, 32, 33, 64, 65, 96, 97];
        assert_eq!(sampled(4, true, Adapt::Beside), often);
        assert_eq!(sampled(4, false, Adapt::Beside), often);
        assert_eq!(sampled(4, true, Adapt::Off), often);
        assert_eq!(sampled(4, false, Adapt::Off), [0; 0]);
    }

    #[test]
    fn where_nothing_is_streamed_few_are_timed_and_only_for_a_report() {
        let few = [0, 1, 2, 3, 32, 33, 34, 64, 65, 66, 96, 97, 98];
        assert_eq!(sampled(8, true, Adapt::Beside), few);
        assert_eq!(sampled(8, true, Adapt::Off), few);
        assert_eq!(sampled(8, false, Adapt::Beside), [0, 1, 2, 3]);
    }
}

//! How much of what is streamed is to go encoded, by the passes that were timed. Pure.
//!
//! ```text
//! r = seconds of the copies, if all went as it is, over seconds of the compute
//! eighths = what brings the copies to 0.93 of the compute = 8 (1 - 0.93 / r) / saved, rounded up
//! ```
//!
//! Three timed passes in a row have to ask for more, or for fewer. What came of more is looked at:
//! where kernels that fill the device let no decoder in, passes may take longer than before. Then
//! it is as it was, until the compute is another. Fewer, of a compute with which none was not yet
//! found worse than some, is none at first, so that some is compared with it.

use super::tuner::moved;
use super::usual::Last;
use crate::engine::copying::EIGHTHS;
use crate::units::{index, narrow, whole};

/// What copies may take of the compute so that they hide behind it: with FLUX.1 and a quarter or
/// half of it on the device, plans that were simulated exactly took no longer than the compute
/// where copies took 0.92 of it or less, and 6 % longer where they took as long.
const HIDES: f64 = 0.93;
/// What goes encoded goes on doing so unless it is more than it would be if copies took so many
/// times as long as they do.
const SLACK: f64 = 1.1;
/// Timed passes that have to agree: one alone may have met a pause or a busy link.
const IN_A_ROW: usize = 3;
/// With more encoded passes may take so much longer than before; medians of a few differ by that.
const LONGER: f64 = 0.01;
/// Compute that moved by so much is another's: passes before it say nothing any more.
const ANOTHER: f64 = 0.15;

/// A pass that was timed.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Weighed {
    /// Seconds of its copies, if all went as it is.
    pub(in crate::engine) copies_s: f64,
    /// Seconds of its compute.
    pub(in crate::engine) compute_s: f64,
    /// Seconds that it took from its first block to the end of its last.
    pub(in crate::engine) pass_s: f64,
    /// The share that encoding saves.
    pub(in crate::engine) saved: f64,
    /// Whether all is encoded that was to be.
    pub(in crate::engine) is_settled: bool,
}

/// Before there was more encoded.
#[derive(Debug, Clone, Copy)]
struct Trial {
    eighths: u32,
    pass_s: f64,
    compute_s: f64,
}

/// How much is to go encoded.
#[derive(Debug, Clone, Default)]
pub(in crate::engine) struct Balance {
    eighths: u32,
    /// Timed passes in a row that say that there should be more, or else fewer, and the least
    /// change that any of them asked for.
    otherwise: usize,
    is_more: bool,
    next: u32,
    /// The last passes with as much encoded as now.
    passes: Last<IN_A_ROW>,
    /// There is more encoded since a while ago, and it is not known yet what came of it.
    trial: Option<Trial>,
    /// More than so many eighths took longer, when the compute took so many seconds.
    most: Option<(u32, f64)>,
    /// Some were found no worse than none, when the compute took so many seconds.
    some_pay: Option<f64>,
}

/// Eighths of what is streamed that have to go encoded for copies to hide, which take `ratio` times
/// as long as the compute if none are, where encoding saves the share `saved`.
fn wanted(ratio: f64, saved: f64) -> u32 {
    let share = (1.0 - HIDES / ratio) / saved;
    narrow(index(whole((f64::from(EIGHTHS) * share).ceil().clamp(0.0, f64::from(EIGHTHS)))))
}

impl Balance {
    /// How many eighths of what is streamed are to go encoded.
    pub(in crate::engine) fn eighths(&self) -> u32 {
        self.eighths
    }

    /// Takes a pass.
    pub(in crate::engine) fn weigh(&mut self, pass: Weighed) {
        let is_another = |compute_s: f64| moved(compute_s, pass.compute_s, ANOTHER);
        self.most = self.most.filter(|&(_, compute_s)| !is_another(compute_s));
        self.trial = self.trial.filter(|trial| !is_another(trial.compute_s));
        self.some_pay = self.some_pay.filter(|&compute_s| !is_another(compute_s));
        if self.trial.is_some() && !pass.is_settled {
            return;
        }
        self.passes.note(pass.pass_s);
        if let Some(trial) = self.trial {
            if self.passes.known().len() < IN_A_ROW {
                return;
            }
            self.trial = None;
            if self.passes.usual_s() > (1.0 + LONGER) * trial.pass_s {
                self.most = Some((trial.eighths, trial.compute_s));
                self.change_to(trial.eighths);
                return;
            }
            if trial.eighths == 0 {
                self.some_pay = Some(trial.compute_s);
            }
        }
        self.vote(pass);
    }

    fn vote(&mut self, pass: Weighed) {
        let ratio = pass.copies_s / pass.compute_s;
        let least = wanted(ratio, pass.saved).min(self.most.map_or(EIGHTHS, |(most, _)| most));
        if (least..=wanted(SLACK * ratio, pass.saved)).contains(&self.eighths) {
            self.otherwise = 0;
            return;
        }
        let is_more = self.eighths < least;
        if self.otherwise == 0 || is_more != self.is_more {
            (self.otherwise, self.is_more, self.next) = (0, is_more, least);
        }
        self.otherwise += 1;
        self.next = if is_more { self.next.min(least) } else { self.next.max(least) };
        if self.otherwise == IN_A_ROW {
            let (eighths, pass_s, compute_s) =
                (self.eighths, self.passes.usual_s(), pass.compute_s);
            self.trial = is_more.then_some(Trial { eighths, pass_s, compute_s });
            let is_known = is_more || self.some_pay.is_some();
            self.change_to(if is_known { self.next } else { 0 });
        }
    }

    fn change_to(&mut self, eighths: u32) {
        (self.eighths, self.otherwise) = (eighths, 0);
        self.passes.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: f64 = 0.3125;

    fn pass(ratio: f64, pass_s: f64) -> Weighed {
        Weighed { copies_s: ratio, compute_s: 1.0, pass_s, saved: SAVED, is_settled: true }
    }

    /// Passes that all take as long, of these ratios.
    fn after(balance: &mut Balance, ratios: &[f64]) -> u32 {
        for &ratio in ratios {
            balance.weigh(pass(ratio, 1.0));
        }
        balance.eighths()
    }

    #[test]
    fn as_much_goes_encoded_as_it_takes_to_hide_the_copies() {
        for (ratio, eighths) in
            [(0.0, 0), (0.5, 0), (0.93, 0), (0.94, 1), (1.0, 2), (1.1, 4), (1.25, 7), (1.35, 8)]
        {
            assert_eq!(wanted(ratio, SAVED), eighths, "copies take {ratio} of the compute");
        }
        assert_eq!((wanted(f64::INFINITY, SAVED), wanted(1.1, 0.09)), (8, 8));
    }

    #[test]
    fn three_passes_in_a_row_have_to_say_that_more_or_less_is_wanted() {
        let mut balance = Balance::default();
        assert_eq!(after(&mut balance, &[9.0, 9.0, 0.9, 9.0, 9.0]), 0, "a pause among them");
        assert_eq!(after(&mut balance, &[1.1]), 4, "as the one that wants the least change");
        assert_eq!(after(&mut balance, &[1.02, 1.1, 1.05, 1.02, 1.1]), 4, "no great difference");
        assert_eq!(after(&mut balance, &[0.9, 0.9, 1.3, 0.9, 0.9]), 4, "the one says the other");
        assert_eq!(after(&mut balance, &[1.3]), 4);
        assert_eq!(after(&mut balance, &[0.8, 0.955, 0.8]), 1);
        assert_eq!(after(&mut balance, &[0.84; 3]), 0);
        assert_eq!(after(&mut balance, &[2.0; 3]), 8);
        assert_eq!(after(&mut balance, &[1.25; 9]), 8);
    }

    fn with(balance: &mut Balance, weighed: Weighed) -> u32 {
        balance.weigh(weighed);
        balance.eighths()
    }

    #[test]
    fn more_that_makes_passes_longer_is_taken_back() {
        let mut balance = Balance::default();
        let raw = pass(1.05, 1.10);
        assert_eq!([raw; 3].map(|raw| with(&mut balance, raw)), [0, 0, 3]);
        // Of passes in which not all is encoded yet nothing is made.
        let soon = Weighed { is_settled: false, pass_s: 9.0, ..raw };
        assert_eq!([soon; 5].map(|soon| with(&mut balance, soon)), [3; 5]);
        let longer = pass(1.3, 1.12);
        assert_eq!([longer; 3].map(|longer| with(&mut balance, longer)), [3, 3, 0]);
        assert_eq!([raw; 9].map(|raw| with(&mut balance, raw)), [0; 9], "and not tried again");
        let another = Weighed { compute_s: 0.8, ..raw };
        assert_eq!([another; 3].map(|another| with(&mut balance, another)), [0, 0, 8]);
    }

    #[test]
    fn fewer_for_a_larger_compute_are_compared_with_none() {
        let mut balance = Balance::default();
        let small = pass(2.0, 2.0);
        assert_eq!([small; 9].map(|small| with(&mut balance, small)), [0, 0, 8, 8, 8, 8, 8, 8, 8]);
        // The copies take as long as before, the compute twice as long.
        let large = |pass_s| Weighed { copies_s: 2.0, compute_s: 2.0, ..pass(1.0, pass_s) };
        let (mut worse, mut better) = (balance.clone(), balance);
        for balance in [&mut worse, &mut better] {
            assert_eq!([2.06; 3].map(|s| with(balance, large(s))), [8, 8, 0]);
            assert_eq!([2.03; 3].map(|s| with(balance, large(s))), [0, 0, 2]);
        }
        assert_eq!([2.06; 3].map(|s| with(&mut worse, large(s))), [2, 2, 0]);
        assert_eq!([2.03; 6].map(|s| with(&mut worse, large(s))), [0; 6]);
        assert_eq!([2.0; 3].map(|s| with(&mut better, large(s))), [2; 3]);
        // It is known now that some are better than none.
        let little = Weighed { copies_s: 2.2, ..large(2.0) };
        assert_eq!(
            [little; 9].map(|little| with(&mut better, little)),
            [2, 2, 4, 4, 4, 4, 4, 4, 4]
        );
        assert_eq!(
            [1.9; 3].map(|s| with(&mut better, Weighed { copies_s: s, ..large(2.0) })),
            [4, 4, 1]
        );
    }

    #[test]
    fn more_that_makes_passes_shorter_stays_and_so_it_does_when_the_compute_changes() {
        let mut balance = Balance::default();
        let raw = pass(1.05, 1.10);
        assert_eq!([raw; 3].map(|raw| with(&mut balance, raw)), [0, 0, 3]);
        assert_eq!([1.5, 1.0, 1.02].map(|s| with(&mut balance, pass(1.05, s))), [3; 3], "median");
        let longer = pass(1.05, 2.0);
        assert_eq!([longer; 9].map(|longer| with(&mut balance, longer)), [3; 9], "no trial");
        // A larger picture comes while the next is tried: its passes are longer for that.
        let more = pass(1.2, 1.0);
        assert_eq!([more; 3].map(|more| with(&mut balance, more)), [3, 3, 6]);
        let large = Weighed { copies_s: 2.4, compute_s: 2.0, pass_s: 2.4, ..more };
        assert_eq!([large; 9].map(|large| with(&mut balance, large)), [6; 9]);
    }
}

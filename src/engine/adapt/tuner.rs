//! Learns times from what ran, and says when another plan should be looked for. Pure.
//!
//! Cycles are timed by sample; of the others only how long a pass took, which tells when a sample
//! is due.
//!
//! ```text
//! c_i <- 0.6 c_i + 0.4 measured,  B <- 0.6 B + 0.4 measured     after each timed pass
//! look for a plan after passes 1, 2, 4, 8, ..., when B or the sum of c moved by 3 %, or when the
//! pass was 4 % off what was predicted
//! ```
//!
//! A change of more than 15 % is no noise: another resolution, another program on the link. It is
//! taken over at once instead of being smoothed.

use super::super::trace::Record;
use crate::plan::{Link, Times};
use crate::units::{count, index, real};

/// Share of the new measurement.
const NEW: f64 = 0.4;
const JUMP: f64 = 0.15;
const MOVED: f64 = 0.03;
const MISSED: f64 = 0.04;
/// After a pass that missed its prediction, the next one that may do so.
const PATIENCE: u64 = 4;
/// Shorter copies say more about their latency than about the link.
const LONG_COPY_BYTES: u64 = 4 << 20;
/// Seconds that a copy takes besides its bytes: two calls of the driver and a gap on the engine.
const LATENCY_S: f64 = 5e-6;
/// The longest pause that a change of plan is charged with.
const MOST_PAUSE_S: f64 = 0.2;
/// What a pass of another length adds to the unrest, of which each other pass takes 1 away; and the
/// most of it with which such a pass is news.
const UNREST: u8 = 2;
const CALM: u8 = 6;
/// Time outside of the blocks that counts, in passes: more is a pause between two runs.
const MOST_OUTSIDE: f64 = 2.0;

/// What one pass took.
#[derive(Debug, Clone, PartialEq)]
pub struct PassTimes {
    /// For each use: seconds from the beginning of its block to where the next one could begin.
    pub compute_s: Vec<f64>,
    /// Seconds between the last block and the first of the next pass.
    pub outside_s: f64,
    /// Seconds from the arrival at the first block to the end of the last.
    pub inside_s: f64,
    /// Bytes and seconds of its long copies; `None` if there were none.
    pub copied: Option<(u64, f64)>,
}

/// Why a plan should be looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Passes 1, 2, 4, 8, ...
    Due,
    /// Compute or link changed.
    Moved,
    /// The pass took another time than predicted.
    Missed,
}

/// The estimate, and what it was when a plan was last looked for.
#[derive(Debug, Default)]
pub struct Tuner {
    compute_s: Vec<f64>,
    outside_s: f64,
    bytes_per_s: Option<f64>,
    passes: u64,
    due: u64,
    missed_again: u64,
    /// Sum of compute, and rate, when a plan was last looked for.
    reviewed: Option<(f64, f64)>,
    /// What passes take, from one to the next.
    span_s: Option<f64>,
    unrest: u8,
    pause_s: Option<f64>,
}

impl Tuner {
    /// Nothing is known.
    pub fn new() -> Self {
        Self { due: 1, ..Self::default() }
    }

    /// A pass took `span_s` seconds, from its beginning to that of the next one. Says whether that
    /// is another time than before. Where hardly two passes take the same time it is no news: to
    /// time all of them would cost more than it tells.
    pub fn is_news(&mut self, span_s: f64) -> bool {
        let before = self.span_s.replace(span_s);
        let other = before.is_some_and(|before| moved(before, span_s, MISSED));
        self.unrest = if other {
            (self.unrest + UNREST).min(2 * CALM)
        } else {
            self.unrest.saturating_sub(1)
        };
        other && self.unrest <= CALM
    }

    /// A plan was taken up, and the device had nothing to do for so many seconds. What is much more
    /// than that takes is a pause of the caller's.
    pub fn paused(&mut self, seconds: f64) {
        self.pause_s = Some(seconds.min(MOST_PAUSE_S));
    }

    /// What the last change of plan took, as [`Tuner::paused`] was told.
    pub fn pause_s(&self) -> Option<f64> {
        self.pause_s
    }

    /// A pass ran; `predicted_s` is the plan's period. Says whether to look for a plan.
    pub fn observe(&mut self, pass: &PassTimes, predicted_s: Option<f64>) -> Option<Reason> {
        let measured = pass.compute_s.iter().sum::<f64>();
        let known = self.compute_s.iter().sum::<f64>();
        if self.compute_s.len() != pass.compute_s.len() || moved(known, measured, JUMP) {
            self.compute_s.clone_from(&pass.compute_s);
            self.outside_s = pass.outside_s;
        } else {
            for (known, &new) in self.compute_s.iter_mut().zip(&pass.compute_s) {
                *known += NEW * (new - *known);
            }
            self.outside_s += NEW * (pass.outside_s - self.outside_s);
        }
        self.outside_s = self.outside_s.min(MOST_OUTSIDE * measured);
        if let Some((bytes, seconds)) = pass.copied {
            let rate = real(bytes) / seconds;
            self.bytes_per_s = Some(match self.bytes_per_s {
                Some(known) if !moved(known, rate, JUMP) => known + NEW * (rate - known),
                _ => rate,
            });
        }
        self.passes += 1;
        let found = self.reason(pass, predicted_s)?;
        self.due = self.due.max((self.passes + 1).next_power_of_two());
        self.missed_again = self.passes + PATIENCE;
        self.reviewed = Some((self.compute_s.iter().sum(), self.bytes_per_s?));
        Some(found)
    }

    fn reason(&self, pass: &PassTimes, predicted_s: Option<f64>) -> Option<Reason> {
        let rate = self.bytes_per_s?;
        if self.passes >= self.due {
            return Some(Reason::Due);
        }
        let (compute_s, before) = self.reviewed?;
        let now = self.compute_s.iter().sum();
        if moved(compute_s, now, MOVED) || moved(before, rate, MOVED) {
            return Some(Reason::Moved);
        }
        let inside_s = predicted_s? - self.outside_s;
        let missed = self.passes >= self.missed_again && moved(inside_s, pass.inside_s, MISSED);
        missed.then_some(Reason::Missed)
    }

    /// Times of an order of `uses` uses, if they are known.
    pub fn times(&self, uses: usize) -> Option<Times> {
        let bytes_per_s = self.bytes_per_s?;
        (uses > 0 && self.compute_s.len() == uses).then(|| Times {
            compute_s: self.compute_s.clone(),
            outside_s: self.outside_s,
            link: Link { bytes_per_s, latency_s: LATENCY_S },
        })
    }

    /// Another order: what was learned of uses is void, the link is as it was.
    pub fn forget_uses(&mut self) {
        let Self { bytes_per_s, pause_s, .. } = *self;
        *self = Self { bytes_per_s, pause_s, ..Self::new() };
    }
}

/// Whether a number moved by more than a share of itself.
fn moved(from: f64, to: f64, share: f64) -> bool {
    (to - from).abs() > share * from
}

/// Puts the times of single uses together to passes.
#[derive(Debug, Default)]
pub(in crate::engine) struct Assembly {
    uses: usize,
    /// Of two passes, the records so far, by place; and the number of the first pass.
    first: u64,
    passes: [Vec<Option<Record>>; 2],
}

impl Assembly {
    pub(in crate::engine) fn new(uses: usize) -> Self {
        Self { uses, first: 0, passes: [vec![None; uses], vec![None; uses]] }
    }

    /// Takes a record; gives the seconds of the pass that it ends, and its times if all of its uses
    /// came. Records come in order.
    pub(in crate::engine) fn add(&mut self, record: &Record) -> (Option<f64>, Option<PassTimes>) {
        if self.uses == 0 || record.number / (self.uses as u64) < self.first {
            return (None, None);
        }
        let pass = record.number / self.uses as u64;
        while pass > self.first + 1 {
            self.advance();
        }
        let place = index(record.number % self.uses as u64);
        self.passes[index(pass - self.first)][place] = Some(*record);
        if pass == self.first || place > 0 {
            return (None, None);
        }
        let next_ns = record.times.wait_ns;
        let begun = self.passes[0][0].map(|first| first.times.wait_ns);
        let span_s = begun.map(|begun| real(next_ns.saturating_sub(begun)) * 1e-9);
        let found = self.complete(next_ns);
        self.advance();
        (span_s, found)
    }

    /// Passes that have ended.
    pub(in crate::engine) fn passes(&self) -> u64 {
        self.first
    }

    fn advance(&mut self) {
        self.first += 1;
        self.passes.swap(0, 1);
        self.passes[1].fill(None);
    }

    /// The first pass, if all of its uses came.
    fn complete(&self, next_ns: u64) -> Option<PassTimes> {
        let uses: Vec<&Record> =
            self.passes[0].iter().map(Option::as_ref).collect::<Option<_>>()?;
        let seconds = |from: u64, to: u64| real(to.saturating_sub(from)) * 1e-9;
        let (first, last) = (uses.first()?.times, uses.last()?.times);
        let mut compute_s: Vec<f64> =
            uses.windows(2).map(|u| seconds(u[0].times.start_ns, u[1].times.wait_ns)).collect();
        compute_s.push(seconds(last.start_ns, last.end_ns));
        Some(PassTimes {
            compute_s,
            outside_s: seconds(last.end_ns, next_ns),
            inside_s: seconds(first.wait_ns, last.end_ns),
            copied: copied(&uses),
        })
    }
}

/// Bytes and seconds of the long stretches of copies, without their latency.
fn copied(uses: &[&Record]) -> Option<(u64, f64)> {
    let most = uses.iter().map(|u| u.stretch_bytes).max()?;
    let long =
        |u: &&&Record| u.stretch_bytes > 0 && u.stretch_bytes >= LONG_COPY_BYTES.min(most / 2);
    let (mut bytes, mut seconds) = (0, 0.0);
    for used in uses.iter().filter(long) {
        let times = used.times;
        bytes += used.stretch_cost;
        let took = real(times.copy_end_ns.saturating_sub(times.copy_start_ns)) * 1e-9;
        seconds += took - LATENCY_S.min(took / 2.0) * count(index(used.stretch_copies)).min(1e3);
    }
    (bytes > 0 && seconds > 0.0).then_some((bytes, seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::UseTimes;

    fn pass(compute_s: f64, rate: f64) -> PassTimes {
        PassTimes {
            compute_s: vec![compute_s; 4],
            outside_s: 0.0,
            inside_s: 4.0 * compute_s,
            copied: Some((1_000_000, 1e6 / rate)),
        }
    }

    #[test]
    fn passes_1_2_4_and_8_are_due() {
        let mut tuner = Tuner::new();
        let due: Vec<u64> = (1..=20)
            .filter(|_| tuner.observe(&pass(0.1, 1e9), Some(0.4)) == Some(Reason::Due))
            .collect();
        assert_eq!(due, [1, 2, 4, 8, 16]);
    }

    #[test]
    fn small_changes_are_smoothed_and_large_ones_taken_over() {
        let mut tuner = Tuner::new();
        tuner.observe(&pass(0.1, 1e9), None);
        tuner.observe(&pass(0.11, 1e9), None);
        let compute_s = |tuner: &Tuner| tuner.times(4).expect("known").compute_s[0];
        assert!((compute_s(&tuner) - 0.104).abs() < 1e-9);
        tuner.observe(&pass(0.2, 0.5e9), None);
        assert!((compute_s(&tuner) - 0.2).abs() < 1e-9);
        assert!((tuner.times(4).expect("known").link.bytes_per_s - 0.5e9).abs() < 1.0);
        assert!(tuner.times(5).is_none(), "of another order nothing is known");
    }

    #[test]
    fn a_moved_link_and_a_missed_prediction_are_reasons() {
        let mut tuner = Tuner::new();
        for _ in 0..5 {
            tuner.observe(&pass(0.1, 1e9), Some(0.4));
        }
        assert_eq!(tuner.observe(&pass(0.1, 0.8e9), Some(0.4)), Some(Reason::Moved));
        assert_eq!(tuner.observe(&pass(0.1, 0.8e9), Some(0.4)), None);
        for _ in 0..3 {
            tuner.observe(&pass(0.1, 0.8e9), Some(0.4));
        }
        for _ in 0..2 {
            tuner.observe(&pass(0.1, 0.8e9), Some(0.4));
        }
        assert_eq!(tuner.observe(&pass(0.1, 0.8e9), Some(0.5)), Some(Reason::Missed));
        assert_eq!(tuner.observe(&pass(0.1, 0.8e9), Some(0.5)), None, "not at every pass");
    }

    #[test]
    fn a_pass_of_another_length_is_news() {
        let mut tuner = Tuner::new();
        let news: Vec<bool> =
            [1.0, 1.03, 1.0, 1.2, 1.2, 1.1].map(|span_s| tuner.is_news(span_s)).to_vec();
        assert_eq!(news, [false, false, false, true, false, true]);
    }

    #[test]
    fn where_passes_never_take_the_same_time_that_is_no_news() {
        let mut tuner = Tuner::new();
        let mut news = |spans: &[f64]| spans.iter().filter(|&&s| tuner.is_news(s)).count();
        assert_eq!(news(&[1.0, 1.2, 1.0, 1.2]), 3);
        assert_eq!(news(&[1.0, 1.2].repeat(20)), 0);
        assert_eq!(news(&[1.0; 12]), 0);
        assert_eq!(news(&[1.5, 1.5, 1.5]), 1, "after a while of rest");
    }

    #[test]
    fn the_last_pause_is_known_and_a_callers_is_cut() {
        let mut tuner = Tuner::new();
        assert_eq!(tuner.pause_s(), None);
        tuner.paused(0.03);
        assert_eq!(tuner.pause_s(), Some(0.03));
        tuner.forget_uses();
        assert_eq!(tuner.pause_s(), Some(0.03));
        tuner.paused(3600.0);
        assert_eq!(tuner.pause_s(), Some(MOST_PAUSE_S));
    }

    #[test]
    fn a_pass_is_whole_or_nothing() {
        let record = |number: u64| Record {
            number,
            block: 0,
            bytes: 10,
            stretch_bytes: 8 << 20,
            stretch_cost: 8 << 20,
            stretch_copies: 1,
            times: UseTimes {
                copy_start_ns: number * 1000,
                copy_end_ns: number * 1000 + 900_000,
                wait_ns: number * 1000,
                start_ns: number * 1000 + 100,
                end_ns: number * 1000 + 800,
            },
        };
        let mut assembly = Assembly::new(3);
        let (mut found, mut spans) = (Vec::new(), Vec::new());
        for number in (0..7).chain(8..13) {
            let (took_s, pass) = assembly.add(&record(number));
            spans.extend(took_s);
            found.extend(pass.map(|pass| (number, pass)));
        }
        let numbers: Vec<u64> = found.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [3, 6, 12], "use 7 is missing, so pass 2 is");
        assert_eq!(spans.len(), 4, "of every pass");
        assert!(spans.iter().all(|span_s| (span_s - 3e-6).abs() < 1e-12));
        let pass = &found[0].1;
        assert!((pass.compute_s[0] - 900e-9).abs() < 1e-12, "to where the next could begin");
        assert!((pass.compute_s[2] - 700e-9).abs() < 1e-12, "to its end");
        assert!((pass.outside_s - 200e-9).abs() < 1e-12);
        assert!((pass.inside_s - 2800e-9).abs() < 1e-12);
        let (bytes, seconds) = pass.copied.expect("long copies");
        assert_eq!(bytes, 24 << 20);
        assert!((seconds - 3.0 * 895e-6).abs() < 1e-9);
    }
}

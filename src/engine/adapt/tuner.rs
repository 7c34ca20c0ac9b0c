//! Learns times from what ran, and says when another plan should be looked for. Pure.
//!
//! Cycles are timed by sample; of the others only the first block and the end of the last, which
//! tell when a sample is due. What lies between two passes is the caller's: it is no news.
//!
//! ```text
//! c_i += a (measured - c_i),  B += a (measured - B)     after each timed pass
//! a = 1/2, 1/3, ... but at least 0.15: the mean since the last change, then one that forgets
//! look for a plan after passes 1, 2, 4, 8, ..., when B or the sum of c moved by 3 %, or when the
//! pass was 4 % off what was predicted
//! ```
//!
//! What is more than 15 % beyond all of the last eight measurements is no noise: another
//! resolution, another program on the link. It is taken over at once instead of being smoothed.
//! Where no two passes are alike a plan for the last one alone would be one for chance. Between
//! passes the median of the last five counts: with their mean a few pauses made the link look idle
//! for longer than any plan could save.

use super::usual::{Last, Watched};
use crate::plan::{Link, Times};
use crate::units::real;

/// Passes for which a plan is taken to last: of a picture of 20 to 30 steps about so many are left
/// when one is found.
pub(super) const PASSES: f64 = 20.0;
/// Least share of a new measurement.
const LEAST_NEW: f64 = 0.15;
const JUMP: f64 = 0.15;
const MOVED: f64 = 0.03;
const MISSED: f64 = 0.04;
/// After a pass that missed its prediction, the next one that may do so.
const PATIENCE: u64 = 4;
/// Seconds that a copy takes besides its bytes: two calls of the driver and a gap on the engine.
pub(super) const LATENCY_S: f64 = 5e-6;
/// The longest pause that a change of plan is charged with.
const MOST_PAUSE_S: f64 = 0.2;
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

/// Another time than usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum News {
    /// By more than a pass takes by chance.
    Small,
    /// By so much that all that was measured is void.
    Large,
}

/// The estimate, and what it was when a plan was last looked for.
#[derive(Debug, Default)]
pub struct Tuner {
    compute_s: Vec<f64>,
    /// What lies between the last passes.
    outside: Last<5>,
    bytes_per_s: Option<f64>,
    passes: u64,
    /// Measurements in the estimates of compute and of the rate: since the last change.
    samples: (u32, u32),
    due: u64,
    missed_again: u64,
    /// Sum of compute, and rate, when a plan was last looked for.
    reviewed: Option<(f64, f64)>,
    /// Sums of compute that were measured, and rates.
    sums: Watched,
    rates: Watched,
    inside: Watched,
    first: Watched,
    /// Passes that are expected of the next plan.
    horizon: f64,
    pause_s: Option<f64>,
}

impl Tuner {
    /// Nothing is known.
    pub fn new() -> Self {
        Self { due: 1, horizon: PASSES, ..Self::default() }
    }

    /// A pass took `inside_s` seconds from its first block to the end of its last. Says whether
    /// that is another time than usual.
    pub fn ends(&mut self, inside_s: f64) -> Option<News> {
        self.horizon = (self.horizon + 1.0).min(PASSES);
        let beyond = self.inside.news(inside_s, MISSED);
        self.trust_less(beyond, self.inside.is_restless())
    }

    /// The first block of a pass took `first_s` seconds of compute. Says whether that is quite
    /// another time than usual, long before the pass ends.
    pub fn begins(&mut self, first_s: f64) -> Option<News> {
        let beyond = self.first.news(first_s, JUMP);
        self.trust_less(beyond, self.first.is_restless())
    }

    /// After news, what was measured before counts as one measurement; not where there is news all
    /// the time.
    fn trust_less(&mut self, beyond: Option<f64>, is_restless: bool) -> Option<News> {
        let beyond = beyond?;
        if !is_restless {
            self.samples = (self.samples.0.min(1), self.samples.1.min(1));
        }
        Some(if beyond > JUMP { News::Large } else { News::Small })
    }

    /// A plan was taken up, and the device had nothing to do for so many seconds. What is much more
    /// than that takes is a pause of the caller's.
    pub fn paused(&mut self, seconds: f64) {
        self.pause_s = Some(seconds.min(MOST_PAUSE_S));
        self.horizon /= 2.0;
    }

    /// The first pass of a plan that was taken up took so many seconds more than it should.
    pub fn paused_longer(&mut self, seconds: f64) {
        let pause_s = self.pause_s.unwrap_or_default() + seconds.max(0.0);
        self.pause_s = Some(pause_s.min(MOST_PAUSE_S));
    }

    /// Passes in which the next change has to pay: half as many after each change, one more after
    /// each pass. Where times change all the time no plan lasts.
    pub fn horizon(&self) -> f64 {
        self.horizon
    }

    /// What the last change of plan took, as [`Tuner::paused`] was told.
    pub fn pause_s(&self) -> Option<f64> {
        self.pause_s
    }

    /// A pass ran; `predicted_s` is the plan's period. Says whether to look for a plan.
    pub fn observe(&mut self, pass: &PassTimes, predicted_s: Option<f64>) -> Option<Reason> {
        let measured = pass.compute_s.iter().sum::<f64>();
        let is_new = self.sums.news(measured, JUMP).is_some();
        if self.compute_s.len() != pass.compute_s.len() || is_new {
            self.compute_s.clone_from(&pass.compute_s);
            self.samples.0 = 1;
        } else {
            let new = share_of_next(&mut self.samples.0);
            for (known, &now) in self.compute_s.iter_mut().zip(&pass.compute_s) {
                *known += new * (now - *known);
            }
        }
        self.outside.note(pass.outside_s.min(MOST_OUTSIDE * measured));
        if let Some((bytes, seconds)) = pass.copied {
            let rate = real(bytes) / seconds;
            let is_new = self.rates.news(rate, JUMP).is_some();
            let known = self.bytes_per_s.filter(|_| !is_new);
            self.bytes_per_s = Some(if let Some(known) = known {
                known + share_of_next(&mut self.samples.1) * (rate - known)
            } else {
                self.samples.1 = 1;
                rate
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
        let inside_s = predicted_s? - self.outside_s();
        let missed = self.passes >= self.missed_again && moved(inside_s, pass.inside_s, MISSED);
        missed.then_some(Reason::Missed)
    }

    /// A plan was to be looked for, and one is being looked for still: the next pass is due.
    pub fn put_off(&mut self) {
        self.due = self.passes + 1;
    }

    /// Times of an order of `uses` uses, if they are known.
    pub fn times(&self, uses: usize) -> Option<Times> {
        let bytes_per_s = self.bytes_per_s?;
        (uses > 0 && self.compute_s.len() == uses).then(|| Times {
            compute_s: self.compute_s.clone(),
            outside_s: self.outside_s(),
            link: Link { bytes_per_s, latency_s: LATENCY_S },
        })
    }

    /// Seconds between two passes, as far as they count.
    pub fn outside_s(&self) -> f64 {
        self.outside.usual_s()
    }

    /// Another order: what was learned of uses is void, the link is as it was.
    pub fn forget_uses(&mut self) {
        let Self { bytes_per_s, pause_s, samples: (_, of_rate), .. } = *self;
        let rates = std::mem::take(&mut self.rates);
        *self = Self { bytes_per_s, pause_s, samples: (0, of_rate), rates, ..Self::new() };
    }
}

/// What one more measurement counts for, beside so many that are in the estimate.
fn share_of_next(samples: &mut u32) -> f64 {
    *samples = samples.saturating_add(1);
    (1.0 / f64::from(*samples)).max(LEAST_NEW)
}

/// Whether a number moved by more than a share of itself.
pub(super) fn moved(from: f64, to: f64, share: f64) -> bool {
    (to - from).abs() > share * from
}

#[cfg(test)]
mod tests;

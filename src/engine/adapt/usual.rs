//! What is usual: of what lies between passes, and of spans that are watched for news. Pure.

use super::tuner::moved;

/// What another time than before adds to the unrest, of which each like it takes 1 away; and the
/// most of it with which another time is news.
const UNREST: u8 = 2;
const CALM: u8 = 6;

/// What lies between the last passes. Their median counts, not their mean: a pause of the caller's
/// says nothing of the passes that follow without one.
#[derive(Debug, Default)]
pub(super) struct Outside {
    seconds: [f64; 5],
    known: usize,
}

impl Outside {
    pub(super) fn note(&mut self, seconds: f64) {
        self.seconds.rotate_right(1);
        self.seconds[0] = seconds;
        self.known = (self.known + 1).min(self.seconds.len());
    }

    /// Seconds; of two in the middle the shorter.
    pub(super) fn usual_s(&self) -> f64 {
        let mut ordered = self.seconds;
        let known = &mut ordered[..self.known];
        known.sort_unstable_by(f64::total_cmp);
        known.get(self.known.saturating_sub(1) / 2).copied().unwrap_or_default()
    }
}

/// What takes about the same time in each pass, until something changes. Where hardly two are alike
/// that is no news: to time all passes would cost more than it tells.
#[derive(Debug, Default)]
pub(super) struct Watched {
    seconds: Option<f64>,
    unrest: u8,
}

impl Watched {
    pub(super) fn is_news(&mut self, seconds: f64, share: f64) -> bool {
        let before = self.seconds.replace(seconds);
        let other = before.is_some_and(|before| moved(before, seconds, share));
        self.unrest = if other {
            (self.unrest + UNREST).min(2 * CALM)
        } else {
            self.unrest.saturating_sub(1)
        };
        other && self.unrest <= CALM
    }
}

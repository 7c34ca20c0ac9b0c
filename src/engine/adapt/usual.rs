//! What is usual: of what lies between passes, and of spans that are watched for news. Pure.

/// What another time than usual adds to the unrest, of which each usual one takes 1 away; and the
/// most of it with which another time says that all the usual ones are over.
const UNREST: u8 = 2;
const CALM: u8 = 6;

/// The last `N` of some times, the newest first.
#[derive(Debug, Clone, Copy)]
pub(super) struct Last<const N: usize> {
    seconds: [f64; N],
    known: usize,
}

impl<const N: usize> Default for Last<N> {
    fn default() -> Self {
        Self { seconds: [0.0; N], known: 0 }
    }
}

impl<const N: usize> Last<N> {
    pub(super) fn note(&mut self, seconds: f64) {
        self.seconds.rotate_right(1);
        self.seconds[0] = seconds;
        self.known = (self.known + 1).min(N);
    }

    pub(super) fn forget(&mut self) {
        self.known = 0;
    }

    pub(super) fn known(&self) -> &[f64] {
        &self.seconds[..self.known]
    }

    /// The median, not the mean: one pause says nothing of the passes that follow without one.
    /// Seconds; of two in the middle the shorter, 0 where nothing is known.
    pub(super) fn usual_s(&self) -> f64 {
        let mut ordered = self.seconds;
        let known = &mut ordered[..self.known];
        known.sort_unstable_by(f64::total_cmp);
        known.get(self.known.saturating_sub(1) / 2).copied().unwrap_or_default()
    }
}

/// What takes about the same time in each pass, until something changes: a time beyond all of the
/// last eight. Where hardly two are alike few are, and to time all passes would cost more than it
/// tells; but what changes for good is told there too.
#[derive(Debug, Default)]
pub(super) struct Watched {
    last: Last<8>,
    unrest: u8,
}

impl Watched {
    /// Whether hardly two of the last times were alike.
    pub(super) fn is_restless(&self) -> bool {
        self.unrest > CALM
    }

    /// By what share of the nearest usual time `seconds` is beyond all of them, if by more than
    /// `least`.
    pub(super) fn news(&mut self, seconds: f64, least: f64) -> Option<f64> {
        let usual = self.last.known().iter();
        let beyond = |side: f64| {
            let shares = usual.clone().map(|&known| side * (seconds / known - 1.0));
            shares.min_by(f64::total_cmp).filter(|&share| share > least)
        };
        let news = beyond(1.0).or_else(|| beyond(-1.0));
        self.unrest = if news.is_some() {
            (self.unrest + UNREST).min(2 * CALM)
        } else {
            self.unrest.saturating_sub(1)
        };
        if news.is_some() && !self.is_restless() {
            self.last.forget();
        }
        self.last.note(seconds);
        news
    }
}

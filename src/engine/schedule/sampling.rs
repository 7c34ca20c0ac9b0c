//! Which uses are timed, and when times are read.

use super::Schedule;
use crate::engine::adapt::Adapt;

/// Times are read at one of so many uses.
const POLL: u64 = 8;

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
    /// much as four launches of a kernel. Where nothing is streamed there is little to learn.
    pub fn is_sampled(&self, number: u64) -> bool {
        let pass = number / self.uses_of_pass();
        let wanted = self.options.timing || self.options.adapt != Adapt::Off;
        let again = pass % 8 < 2 || self.sampled.contains(&pass);
        wanted && (pass < 4 || (again && !self.program.copies.is_empty()))
    }

    /// Something changed: the next passes are timed, from the first on of which nothing has begun.
    pub fn sample(&mut self) {
        let next = self.next.div_ceil(self.uses_of_pass());
        if !self.sampled.contains(&next) {
            self.sampled = next..next + 3;
        }
    }
}

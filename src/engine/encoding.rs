//! When weights are encoded and copied encoded, and when what was encoded is of no use any more.

use super::adapt::{Adapt, PassTimes};
use super::copying::{EIGHTHS, Encode, Encoder, MovedSums};
use super::core::Core;
use crate::error::Result;
use crate::units::{index, narrow, real, whole};

/// What copies may take of the compute so that they hide behind it: with FLUX.1 and a quarter or
/// half of it on the device, plans that were simulated exactly took no longer than the compute
/// where copies took 0.92 of it or less, and 6 % longer where they took as long.
const HIDES: f64 = 0.93;
/// What goes encoded goes on doing so unless it is more than it would be if copies took so many
/// times as long as they do.
const SLACK: f64 = 1.1;
/// Timed passes that have to agree: one alone may have met a pause or a busy link.
const IN_A_ROW: u32 = 3;
/// What encoding saves of weights as trained ones are, until any were encoded.
const SAVED: f64 = 0.31;

/// Eighths of what is streamed that have to go encoded for copies to hide, which take `ratio` times
/// as long as the compute if none are, where encoding saves the share `saved`.
fn wanted(ratio: f64, saved: f64) -> u32 {
    let share = (1.0 - HIDES / ratio) / saved;
    narrow(index(whole((f64::from(EIGHTHS) * share).ceil().clamp(0.0, f64::from(EIGHTHS)))))
}

/// How much has to go encoded, by the last passes that were timed. Pure.
#[derive(Debug, Clone, Default)]
pub(super) struct Balance {
    eighths: u32,
    /// Timed passes in a row that say that there should be more, or else fewer, and the least
    /// change that any of them asked for.
    otherwise: u32,
    is_more: bool,
    next: u32,
    /// What had been copied when a pass was last weighed.
    seen: MovedSums,
}

impl Balance {
    /// Takes a pass whose copies would take `ratio` times as long as its compute, if all went as it
    /// is.
    fn weigh(&mut self, ratio: f64, saved: f64) {
        let (least, most) = (wanted(ratio, saved), wanted(SLACK * ratio, saved));
        if (least..=most).contains(&self.eighths) {
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
            (self.eighths, self.otherwise) = (self.next, 0);
        }
    }

    /// Bytes on the link for each byte that arrived since the last call.
    fn share_on_link(&mut self, moved: MovedSums) -> f64 {
        let before = std::mem::replace(&mut self.seen, moved);
        let (on_link, arrived) = (moved.bytes - before.bytes, moved.arrived() - before.arrived());
        if arrived == 0 { 1.0 } else { real(on_link) / real(arrived) }
    }
}

/// The share that encoding has saved of what came encoded.
fn saved(moved: MovedSums) -> f64 {
    if moved.decoded_bytes == 0 {
        return SAVED;
    }
    1.0 - real(moved.encoded_bytes) / real(moved.decoded_bytes)
}

impl Core {
    /// A pass has ended: encodes what the plan streams and is not encoded yet.
    pub(super) fn keep_encoding(&mut self) {
        if self.spec.encode == Encode::Off || !self.device.decodes() || !self.is_open() {
            return;
        }
        self.host.pick(&self.spec, &self.plan, self.eighths());
        if !self.encoder.is_idle() || !self.drops_retired() {
            return;
        }
        let tasks = self.host.to_encode(&self.spec, &self.plan);
        match self.spec.options.adapt {
            Adapt::AtOnce => Encoder::run_here(&self.host, tasks),
            Adapt::Off | Adapt::Beside => self.encoder.start(&self.host, tasks),
        }
    }

    /// How many eighths of what is streamed are to go encoded.
    pub(super) fn eighths(&self) -> u32 {
        match self.spec.encode {
            Encode::Off => 0,
            Encode::WhereCopiesDecide => self.balance.eighths,
            Encode::Eighths(eighths) => eighths,
        }
    }

    /// A pass was timed: weighs its copies against its compute, which take `outside_s` seconds
    /// more than its blocks do.
    pub(super) fn weigh(&mut self, pass: &PassTimes, outside_s: f64) {
        let moved = self.moved();
        let share = self.balance.share_on_link(moved);
        let Some((bytes, seconds)) = pass.copied else { return };
        let copies_s = real(self.plan.streamed_bytes) * seconds / real(bytes) / share;
        let compute_s = pass.compute_s.iter().sum::<f64>() + outside_s;
        self.balance.weigh(copies_s / compute_s, saved(moved));
    }

    /// Gives back what was encoded before weights changed, once no copy reads it. Blocks until the
    /// copies under way have ended, where there is any. Whether that went well.
    fn drops_retired(&self) -> bool {
        if !self.host.has_retired() {
            return true;
        }
        self.executor.settle();
        self.device.flush();
        // A sticky error will be told by the next call.
        let ended = self.device.quiesce(None).is_ok();
        if ended {
            self.host.give_retired_back();
        }
        ended
    }

    /// The host weights of a block have changed: their encoded form is the old one.
    pub(super) fn forget_codes(&self, block: u32) {
        for (number, tensor) in self.spec.profile.tensors.iter().enumerate() {
            if tensor.block == block {
                self.host.changed(narrow(number));
            }
        }
    }

    /// Gives back all encoded weights and encodes no others. Blocks until the copies under way have
    /// ended. Returns how many bytes that were.
    ///
    /// # Errors
    ///
    /// The device's error; nothing was given back then.
    pub(super) fn give_codes_back(&mut self) -> Result<u64> {
        self.encoder.stop();
        self.spec.encode = Encode::Off;
        if self.host.codes.read().bytes() == 0 {
            return Ok(0);
        }
        // No copy is to be made of them while those under way are waited for.
        (0..narrow(self.plan.program.loads.len())).for_each(|block| self.forget_codes(block));
        self.executor.settle();
        self.device.flush();
        self.device.quiesce(None)?;
        Ok(self.host.give_codes_back())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(balance: &mut Balance, ratios: &[f64]) -> u32 {
        for &ratio in ratios {
            balance.weigh(ratio, 0.3125);
        }
        balance.eighths
    }

    #[test]
    fn as_much_goes_encoded_as_it_takes_to_hide_the_copies() {
        for (ratio, eighths) in
            [(0.0, 0), (0.5, 0), (0.93, 0), (0.94, 1), (1.0, 2), (1.1, 4), (1.25, 7), (1.35, 8)]
        {
            assert_eq!(wanted(ratio, 0.3125), eighths, "copies take {ratio} of the compute");
        }
        assert_eq!((wanted(f64::INFINITY, 0.3125), wanted(1.1, 0.09)), (8, 8));
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

    #[test]
    fn what_went_encoded_would_have_taken_longer_as_it_is() {
        let mut balance = Balance::default();
        assert!((balance.share_on_link(MovedSums::default()) - 1.0).abs() < 1e-9, "nothing yet");
        let mut moved = MovedSums { bytes: 1000, ..MovedSums::default() };
        assert!((balance.share_on_link(moved) - 1.0).abs() < 1e-9);
        (moved.bytes, moved.encoded_bytes, moved.decoded_bytes) = (1700, 600, 900);
        assert!((balance.share_on_link(moved) - 0.7).abs() < 1e-9, "700 of 100 + 900");
        assert!((saved(moved) - 1.0 / 3.0).abs() < 1e-9, "600 of 900");
    }
}

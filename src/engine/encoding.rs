//! When weights are encoded and copied encoded, and when what was encoded is of no use any more.

use super::adapt::{Adapt, PassTimes};
use super::copying::{Encode, Encoder, MovedSums};
use super::core::Core;
use crate::error::Result;
use crate::units::{narrow, real};

/// Copies decide if they take at least so many times as long as the compute. Below, less is gained
/// than decoding takes of the device's time: at 0.76 passes were 2 % longer (H200, FLUX.1's width).
const DECIDES: f64 = 1.0;
/// Where weights go encoded, they do until copies would take less than so many times as long:
/// between the two it makes little difference.
const STILL_DECIDES: f64 = 0.85;
/// Timed passes that have to agree: one alone may have met a pause or a busy link.
const IN_A_ROW: u32 = 3;

/// Whether copies decide how long passes take, by the last that were timed. Pure.
#[derive(Debug, Clone, Default)]
pub(super) struct Balance {
    copies_decide: bool,
    /// Timed passes in a row that say otherwise.
    otherwise: u32,
    /// What had been copied when a pass was last weighed.
    seen: MovedSums,
}

impl Balance {
    /// Takes a pass whose copies would take `ratio` times as long as its compute, if all went as it
    /// is.
    fn weigh(&mut self, ratio: f64) {
        let least = if self.copies_decide { STILL_DECIDES } else { DECIDES };
        let is_other = (ratio >= least) != self.copies_decide;
        self.otherwise = if is_other { self.otherwise + 1 } else { 0 };
        if self.otherwise == IN_A_ROW {
            (self.copies_decide, self.otherwise) = (!self.copies_decide, 0);
        }
    }

    /// Bytes on the link for each byte that arrived since the last call.
    fn share_on_link(&mut self, moved: MovedSums) -> f64 {
        let before = std::mem::replace(&mut self.seen, moved);
        let (on_link, arrived) = (moved.bytes - before.bytes, moved.arrived() - before.arrived());
        if arrived == 0 { 1.0 } else { real(on_link) / real(arrived) }
    }
}

impl Core {
    /// A pass has ended: encodes what the plan streams and is not encoded yet.
    pub(super) fn keep_encoding(&mut self) {
        if self.spec.encode == Encode::Off || !self.device.decodes() || !self.is_open() {
            return;
        }
        let is_wanted = self.copies_encoded();
        self.host.use_codes(is_wanted);
        if !self.encoder.is_idle() || !self.drops_retired() || !is_wanted {
            return;
        }
        let tasks = self.host.to_encode(&self.spec, &self.plan);
        match self.spec.options.adapt {
            Adapt::AtOnce => Encoder::run_here(&self.host, tasks),
            Adapt::Off | Adapt::Beside => self.encoder.start(&self.host, tasks),
        }
    }

    /// Whether weights are to go encoded.
    fn copies_encoded(&self) -> bool {
        match self.spec.encode {
            Encode::Off => false,
            Encode::Always => true,
            Encode::WhereCopiesDecide => self.balance.copies_decide,
        }
    }

    /// A pass was timed: weighs its copies against its compute, which take `outside_s` seconds
    /// more than its blocks do.
    pub(super) fn weigh(&mut self, pass: &PassTimes, outside_s: f64) {
        let moved = self.moved();
        let share = self.balance.share_on_link(moved);
        let Some((bytes, seconds)) = pass.copied else { return };
        let copies_s = real(self.plan.streamed_bytes) * seconds / real(bytes) / share;
        self.balance.weigh(copies_s / (pass.compute_s.iter().sum::<f64>() + outside_s));
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

    fn after(balance: &mut Balance, ratios: &[f64]) -> bool {
        for &ratio in ratios {
            balance.weigh(ratio);
        }
        balance.copies_decide
    }

    #[test]
    fn three_passes_in_a_row_have_to_say_that_copies_decide_or_do_no_more() {
        let mut balance = Balance::default();
        assert!(!after(&mut balance, &[9.0, 9.0, 0.99, 9.0, 9.0]), "a pause among them");
        assert!(after(&mut balance, &[1.01]));
        assert!(after(&mut balance, &[0.86; 9]), "little difference");
        assert!(after(&mut balance, &[0.1, 0.1, 0.86, 0.1, 0.1]));
        assert!(!after(&mut balance, &[0.84]));
        assert!(!after(&mut balance, &[0.99; 9]));
    }

    #[test]
    fn what_went_encoded_would_have_taken_longer_as_it_is() {
        let mut balance = Balance::default();
        assert!((balance.share_on_link(MovedSums::default()) - 1.0).abs() < 1e-9, "nothing yet");
        let mut moved = MovedSums { bytes: 1000, ..MovedSums::default() };
        assert!((balance.share_on_link(moved) - 1.0).abs() < 1e-9);
        (moved.bytes, moved.encoded_bytes, moved.decoded_bytes) = (1700, 600, 900);
        assert!((balance.share_on_link(moved) - 0.7).abs() < 1e-9, "700 of 100 + 900");
    }
}

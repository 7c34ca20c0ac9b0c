//! When weights are encoded and copied encoded, and when what was encoded is of no use any more.

use super::adapt::{Adapt, PassTimes, Weighed};
use super::copying::{Encode, Encoder, MovedSums};
use super::core::Core;
use crate::codec::Element;
use crate::error::Result;
use crate::units::{narrow, real};

/// What encoding saves of weights as trained ones are, until any were encoded.
fn expected(element: Element) -> f64 {
    match element {
        Element::Bf16 => 0.31,
        Element::Fp8 => 0.15,
    }
}

/// What [`Balance`] has to know of passes.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// What had been copied when a pass was last weighed.
    moved: MovedSums,
    /// Whether all was encoded that was to be, when the last pass ended.
    is_settled: bool,
}

impl Seen {
    /// Bytes on the link for each byte that arrived since the last call.
    fn share_on_link(&mut self, moved: MovedSums) -> f64 {
        let before = std::mem::replace(&mut self.moved, moved);
        let (on_link, arrived) = (moved.bytes - before.bytes, moved.arrived() - before.arrived());
        if arrived == 0 { 1.0 } else { real(on_link) / real(arrived) }
    }
}

/// The share that encoding has saved of what came encoded; until any did, what it does to tensors
/// of such elements and bytes.
fn saved(moved: MovedSums, tensors: impl Iterator<Item = (Element, u64)>) -> f64 {
    if moved.decoded_bytes == 0 {
        let sums = tensors.fold((0.0, 0.0), |(saved, all), (element, bytes)| {
            (saved + expected(element) * real(bytes), all + real(bytes))
        });
        return if sums.1 > 0.0 { sums.0 / sums.1 } else { expected(Element::Bf16) };
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
        self.seen.is_settled = false;
        if !self.encoder.is_idle() || !self.drops_retired() {
            return;
        }
        let tasks = self.host.to_encode(&self.spec, &self.plan);
        self.seen.is_settled = tasks.is_empty();
        match self.spec.options.adapt {
            Adapt::AtOnce => Encoder::run_here(&self.host, tasks),
            Adapt::Off | Adapt::Beside => self.encoder.start(&self.host, tasks),
        }
    }

    /// How many eighths of what is streamed are to go encoded.
    pub(super) fn eighths(&self) -> u32 {
        match self.spec.encode {
            Encode::Off => 0,
            Encode::WhereCopiesDecide => self.balance.eighths(),
            Encode::Eighths(eighths) => eighths,
        }
    }

    /// A pass was timed: weighs its copies against its compute, which take `outside_s` seconds
    /// more than its blocks do.
    pub(super) fn weigh(&mut self, pass: &PassTimes, outside_s: f64) {
        let moved = self.moved();
        let share = self.seen.share_on_link(moved);
        let Some((bytes, seconds)) = pass.copied else { return };
        self.balance.weigh(Weighed {
            copies_s: real(self.plan.streamed_bytes) * seconds / real(bytes) / share,
            compute_s: pass.compute_s.iter().sum::<f64>() + outside_s,
            pass_s: pass.inside_s,
            saved: saved(moved, self.encodable()),
            is_settled: self.seen.is_settled,
        });
    }

    /// The tensors that may be encoded: what they are of, and bytes.
    fn encodable(&self) -> impl Iterator<Item = (Element, u64)> {
        let tensors = self.spec.profile.tensors.iter().zip(&self.spec.encodable);
        tensors.filter_map(|(tensor, element)| Some(((*element)?, tensor.bytes)))
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

    #[test]
    fn what_went_encoded_would_have_taken_longer_as_it_is() {
        let mut seen = Seen::default();
        assert!((seen.share_on_link(MovedSums::default()) - 1.0).abs() < 1e-9, "nothing yet");
        let mut moved = MovedSums { bytes: 1000, ..MovedSums::default() };
        assert!((seen.share_on_link(moved) - 1.0).abs() < 1e-9);
        (moved.bytes, moved.encoded_bytes, moved.decoded_bytes) = (1700, 600, 900);
        assert!((seen.share_on_link(moved) - 0.7).abs() < 1e-9, "700 of 100 + 900");
        let tensors = [(Element::Bf16, 300), (Element::Fp8, 900)];
        assert!((saved(moved, tensors.into_iter()) - 1.0 / 3.0).abs() < 1e-9, "600 of 900");
        moved.decoded_bytes = 0;
        let mean = (0.31 + 3.0 * 0.15) / 4.0;
        assert!((saved(moved, tensors.into_iter()) - mean).abs() < 1e-9, "by bytes");
        assert!((saved(moved, std::iter::empty()) - 0.31).abs() < 1e-9, "none may be");
    }
}

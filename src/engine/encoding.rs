//! When weights are encoded, and when what was encoded is of no use any more.

use super::adapt::Adapt;
use super::copying::{Encode, Encoder};
use super::core::Core;
use crate::error::Result;
use crate::plan::Times;
use crate::units::{narrow, real};

/// Copies decide if they take at least so many times as long as the compute. Below, less is gained
/// than decoding takes of the device's time: at 0.76 passes were 2 % longer (H200, FLUX.1's width).
const DECIDES: f64 = 1.0;

/// Whether the time of a pass that streams `bytes` bytes is the link's rather than the compute's.
fn copies_decide(times: &Times, bytes: u64) -> bool {
    let compute_s: f64 = times.compute_s.iter().sum::<f64>() + times.outside_s;
    real(bytes) / times.link.bytes_per_s >= DECIDES * compute_s
}

impl Core {
    /// A pass has ended: encodes what the plan streams and is not encoded yet.
    pub(super) fn keep_encoding(&mut self) {
        if self.spec.encode == Encode::Off || !self.device.decodes() || !self.is_open() {
            return;
        }
        self.encodes |= match self.spec.encode {
            Encode::Off => false,
            Encode::Always => true,
            Encode::WhereCopiesDecide => {
                let times = self.tuner.times(self.order.best().len());
                times.is_some_and(|times| copies_decide(&times, self.plan.streamed_bytes))
            }
        };
        if !self.encodes || !self.encoder.is_idle() || !self.drops_retired() {
            return;
        }
        let tasks = self.host.to_encode(&self.spec, &self.plan);
        match self.spec.options.adapt {
            Adapt::AtOnce => Encoder::run_here(&self.host, tasks),
            Adapt::Off | Adapt::Beside => self.encoder.start(&self.host, tasks),
        }
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
    use crate::plan::Link;

    #[test]
    fn copies_decide_where_they_take_longer_than_the_compute() {
        let link = Link { bytes_per_s: 10e9, latency_s: 0.0 };
        let times = Times { compute_s: vec![0.4, 0.5], outside_s: 0.1, link };
        assert!(copies_decide(&times, 10_100_000_000));
        assert!(!copies_decide(&times, 9_900_000_000));
    }
}

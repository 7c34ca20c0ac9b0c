//! Compares what arrived on the device with its host source, by hash: for soak tests and reports.

use std::hash::Hasher as _;

use twox_hash::XxHash3_64;

use super::core::Core;
use crate::driver::{ComputeStream, Device, Source};
use crate::error::{Error, Result};
use crate::units::{index, narrow};

/// Bytes that are looked at together.
const PIECE_BYTES: u64 = 1 << 20;

/// Room for one piece from each side; none before the first look.
#[derive(Debug, Default)]
pub(super) struct Verifier {
    device: Vec<u8>,
    host: Vec<u8>,
}

/// What two sides of one tensor came to.
struct Compared {
    expected: u64,
    found: u64,
    /// The first byte that differs.
    differs_at: Option<u64>,
}

impl Verifier {
    /// Reads both sides of one tensor, which lies at `target` on the device. Blocks.
    fn compare(
        &mut self,
        device: &dyn Device,
        source: Source,
        target: u64,
        bytes: u64,
        compute: ComputeStream,
    ) -> Result<Compared> {
        let (mut expected, mut found) = (XxHash3_64::new(), XxHash3_64::new());
        let (mut differs_at, mut done) = (None, 0);
        while done < bytes {
            let part = PIECE_BYTES.min(bytes - done);
            self.device.resize(index(part), 0);
            self.host.resize(index(part), 0);
            let (device_piece, host_piece) = (self.device.as_mut_ptr(), self.host.as_mut_ptr());
            device.read_back(target + done, device_piece as u64, part, compute)?;
            device.read(source.advanced(done), host_piece as u64, part)?;
            expected.write(&self.host);
            found.write(&self.device);
            let unlike = || std::iter::zip(&self.device, &self.host).position(|(a, b)| a != b);
            differs_at = differs_at.or_else(|| unlike().map(|at| done + at as u64));
            done += part;
        }
        Ok(Compared { expected: expected.finish(), found: found.finish(), differs_at })
    }
}

impl Core {
    /// Looks at the weights' files, unless every byte of them is on the device for good.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] for one that changed.
    pub(super) fn check_files(&mut self) -> Result<()> {
        let arrived = self.plan.streamed_bytes == 0 && self.schedule.loaded().iter().all(|&l| l);
        if arrived || !self.is_open() {
            return Ok(());
        }
        self.device.check_files().inspect_err(|error| self.errors.note(error))
    }

    /// Compares every tensor of the use at `position` with its source, as its kernels see it.
    /// Blocks until they are there.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] for the first that differs, or the error of a read.
    pub(super) fn verify(&mut self, position: u32, compute: ComputeStream) -> Result<()> {
        let used = &self.plan.program.uses[index(position)];
        let tensors = self.spec.profile.tensors.iter().enumerate();
        let of_block = tensors.filter(|(_, tensor)| tensor.block == used.block);
        for ((number, tensor), &offset) in of_block.zip(&used.offsets) {
            let target = self.arena.at(offset, tensor.bytes);
            let (device, source) = (self.device.as_ref(), self.spec.sources[number]);
            let compared = self.verifier.compare(device, source, target, tensor.bytes, compute)?;
            self.counters.verified_bytes += tensor.bytes;
            // The hashes speak for themselves; the offset is for whoever looks for the cause.
            if compared.expected != compared.found {
                self.counters.mismatches += 1;
                // It may be the encoded form that is wrong.
                self.host.changed(narrow(number));
                let name = self.spec.names.get(number).cloned();
                return Err(Error::Corrupt {
                    block: used.block,
                    tensor: name.unwrap_or_else(|| format!("tensor {number}")),
                    offset: compared.differs_at.unwrap_or(0),
                    bytes: tensor.bytes,
                    expected: compared.expected,
                    found: compared.found,
                });
            }
        }
        Ok(())
    }
}

//! One device allocation, owned by the caller; every address the engine writes comes from here.

use crate::error::{Error, Result};
use crate::units::ALIGN_BYTES;

/// A range of device memory that the caller keeps alive for as long as the engine lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arena {
    address: u64,
    bytes: u64,
}

impl Arena {
    /// Takes a range of `bytes` bytes at `address`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if it is smaller than the plan needs, or not aligned for kernels.
    pub fn new(address: u64, bytes: u64, need_bytes: u64) -> Result<Self> {
        if bytes < need_bytes {
            return Err(Error::Invalid(format!(
                "the plan needs an arena of {need_bytes} bytes, got {bytes} bytes"
            )));
        }
        // The allocator of torch aligns to 64 bytes on the CPU and to 512 on CUDA devices.
        if bytes > 0 && address % ALIGN_BYTES.min(64) != 0 {
            return Err(Error::Invalid(format!(
                "the arena must start at a multiple of 64 bytes, got address {address:#x}"
            )));
        }
        if address.checked_add(bytes).is_none() {
            return Err(Error::Invalid(format!(
                "an arena of {bytes} bytes at {address:#x} ends beyond the address space"
            )));
        }
        Ok(Self { address, bytes })
    }

    /// The address of `bytes` bytes at `offset`.
    ///
    /// # Panics
    ///
    /// If the range does not lie within the arena: the plan was made for another one.
    pub fn at(&self, offset: u64, bytes: u64) -> u64 {
        let end = offset.checked_add(bytes).expect("offsets of a plan are below 2^62");
        assert!(end <= self.bytes, "{offset} + {bytes} bytes in an arena of {}", self.bytes);
        self.address + offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked() {
        let arena = Arena::new(4096, 1024, 1024).expect("large enough");
        assert_eq!(arena.at(1000, 24), 5096);
        assert!(std::panic::catch_unwind(|| arena.at(1000, 25)).is_err());
        Arena::new(4096, 1023, 1024).expect_err("too small");
        Arena::new(4097, 1024, 1024).expect_err("not aligned");
    }
}

//! Counts of copies.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::driver::H2d;

/// The copies enqueued so far; read without stopping who counts.
#[derive(Debug, Default)]
pub(in crate::engine) struct Moved {
    bytes: AtomicU64,
    copies: AtomicU64,
    encoded_bytes: AtomicU64,
    decoded_bytes: AtomicU64,
}

/// Sums of [`Moved`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::engine) struct MovedSums {
    /// Bytes that went over the link.
    pub(in crate::engine) bytes: u64,
    /// Copies.
    pub(in crate::engine) copies: u64,
    /// Of the bytes those that were encoded.
    pub(in crate::engine) encoded_bytes: u64,
    /// What those were decoded to.
    pub(in crate::engine) decoded_bytes: u64,
}

impl MovedSums {
    /// Bytes of weights that came to the device.
    pub(in crate::engine) fn arrived(&self) -> u64 {
        self.bytes - self.encoded_bytes + self.decoded_bytes
    }
}

impl std::ops::Add for MovedSums {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            copies: self.copies + other.copies,
            encoded_bytes: self.encoded_bytes + other.encoded_bytes,
            decoded_bytes: self.decoded_bytes + other.decoded_bytes,
        }
    }
}

impl Moved {
    /// Counts these.
    pub(super) fn add(&self, copies: &[H2d]) {
        let encoded = || copies.iter().filter(|copy| copy.source.is_encoded());
        let (on_link, decoded) = (|copy: &H2d| copy.link_bytes(), |copy: &H2d| copy.bytes);
        let sums = [
            (&self.bytes, copies.iter().map(on_link).sum()),
            (&self.copies, copies.len() as u64),
            (&self.encoded_bytes, encoded().map(on_link).sum()),
            (&self.decoded_bytes, encoded().map(decoded).sum()),
        ];
        for (sum, more) in sums {
            sum.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// All of it.
    pub(in crate::engine) fn sums(&self) -> MovedSums {
        let of = |sum: &AtomicU64| sum.load(Ordering::Relaxed);
        MovedSums {
            bytes: of(&self.bytes),
            copies: of(&self.copies),
            encoded_bytes: of(&self.encoded_bytes),
            decoded_bytes: of(&self.decoded_bytes),
        }
    }
}

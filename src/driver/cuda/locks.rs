//! Which host memory this device has page-locked, range by range.
//!
//! The driver keeps each range for itself: a copy has to lie within one, although the next one may
//! begin where it ends.

use std::collections::BTreeMap;

/// The ranges: their sizes, by first byte. They do not overlap.
#[derive(Debug, Default)]
pub(super) struct Locks {
    ranges: BTreeMap<u64, u64>,
}

impl Locks {
    pub(super) fn add(&mut self, address: u64, bytes: u64) {
        self.ranges.insert(address, bytes);
    }

    pub(super) fn remove(&mut self, address: u64) {
        self.ranges.remove(&address);
    }

    /// Whether all of a span lies within one range.
    pub(super) fn cover(&self, address: u64, bytes: u64) -> bool {
        let range = self.ranges.range(..=address).next_back();
        range.is_some_and(|(first, size)| address + bytes <= first + size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_lies_within_one_range_or_is_not_covered() {
        let mut locks = Locks::default();
        assert!(!locks.cover(4096, 1));
        locks.add(4096, 100);
        locks.add(4196, 100);
        assert!(locks.cover(4096, 100));
        assert!(locks.cover(4200, 96));
        assert!(!locks.cover(4096, 101), "two ranges, though they touch");
        assert!(!locks.cover(4095, 1));
        locks.remove(4196);
        assert!(!locks.cover(4200, 1));
    }
}

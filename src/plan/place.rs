//! Gives streamed bytes their addresses, the same in every cycle, and tensors in one piece, as
//! kernels need them.
//!
//! Either in turns: a ring that a cycle passes a whole number of times.
//!
//! ```text
//!   turn 0 | use 0 | use 1 | use 2 ..|     a use that no longer fits the turn begins the next
//!   turn 1 |use 2| use 3  | use 4 |..|     one, with as many of its tensors as fit before that
//! ```
//!
//! Or on two sides, for less than two of the largest uses: uses lie at the front and at the back
//! by turns, and what lies over the use before is copied when that has ended. So no byte is lost
//! to the end of a turn, and exactly as much is copied ahead as a ring would allow whose end cuts
//! tensors.
//!
//! ```text
//!   | use 0      |.......|
//!   |.......|      use 1 |
//!   | use 2    |.........|
//! ```

use std::ops::Range;

/// A tensor, or a part of a block, that is to be streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Item {
    /// Place of the tensor in its block; 0 where any byte may be streamed.
    pub(super) tensor: u32,
    pub(super) bytes: u64,
}

/// The streamed items of the uses of a cycle, one after the other.
#[derive(Debug, Clone, Default)]
pub(super) struct Items {
    pub(super) all: Vec<Item>,
    /// For each use its range of `all`.
    pub(super) of_use: Vec<Range<usize>>,
    /// Items may be cut anywhere.
    pub(super) may_cut: bool,
}

impl Items {
    /// The most bytes of any use: a ring cannot be smaller.
    pub(super) fn most_of_use(&self) -> u64 {
        let bytes = |range: &Range<usize>| self.all[range.clone()].iter().map(|i| i.bytes).sum();
        self.of_use.iter().map(bytes).max().unwrap_or(0)
    }

    /// Bytes of a cycle.
    pub(super) fn bytes(&self) -> u64 {
        self.all.iter().map(|item| item.bytes).sum()
    }
}

/// An item, or a part of one, with its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) used: u32,
    pub(super) tensor: u32,
    /// First byte within the tensor.
    pub(super) source: u64,
    /// First byte within the ring.
    pub(super) target: u64,
    pub(super) bytes: u64,
}

/// Where a cycle lies in a ring.
#[derive(Debug, Clone, Default)]
pub(super) struct Placement {
    /// In order of use.
    pub(super) pieces: Vec<Piece>,
    pub(super) turns: u32,
}

impl Placement {
    /// Fills a ring of `ring_bytes`, which holds at least [`Items::most_of_use`], turn by turn.
    pub(super) fn fill(&mut self, items: &Items, ring_bytes: u64) {
        self.pieces.clear();
        self.turns = u32::from(!items.all.is_empty());
        let mut next = 0;
        for (used, range) in items.of_use.iter().enumerate() {
            let used = crate::units::narrow(used);
            let of_use = &items.all[range.clone()];
            let total: u64 = of_use.iter().map(|item| item.bytes).sum();
            if next + total <= ring_bytes {
                for item in of_use {
                    self.put(used, *item, 0, next, item.bytes);
                    next += item.bytes;
                }
            } else {
                next = self.wrap(items, range.clone(), used, next, ring_bytes);
            }
        }
    }

    /// Lays uses at the front and at the back of `ring_bytes` by turns.
    pub(super) fn alternate(&mut self, items: &Items, ring_bytes: u64) {
        self.pieces.clear();
        self.turns = 0;
        for (used, range) in items.of_use.iter().enumerate() {
            let of_use = &items.all[range.clone()];
            let total: u64 = of_use.iter().map(|item| item.bytes).sum();
            let mut next = if self.turns % 2 == 0 { 0 } else { ring_bytes - total };
            self.turns += u32::from(total > 0);
            for item in of_use {
                self.put(crate::units::narrow(used), *item, 0, next, item.bytes);
                next += item.bytes;
            }
        }
    }

    /// Lays the items of each use one behind the other from an offset of its own on.
    pub(super) fn lay(&mut self, items: &Items, offsets: &[u64]) {
        self.pieces.clear();
        self.turns = 0;
        for (used, (range, &offset)) in items.of_use.iter().zip(offsets).enumerate() {
            let mut next = offset;
            for item in &items.all[range.clone()] {
                self.put(crate::units::narrow(used), *item, 0, next, item.bytes);
                next += item.bytes;
            }
        }
    }

    fn put(&mut self, used: u32, item: Item, source: u64, target: u64, bytes: u64) {
        if bytes > 0 {
            self.pieces.push(Piece { used, tensor: item.tensor, source, target, bytes });
        }
    }

    /// Places a use around the end of the ring; returns where the next one begins.
    fn wrap(
        &mut self,
        items: &Items,
        range: Range<usize>,
        used: u32,
        start: u64,
        ring_bytes: u64,
    ) -> u64 {
        self.turns += 1;
        let of_use = &items.all[range];
        let total: u64 = of_use.iter().map(|item| item.bytes).sum();
        let mut left = ring_bytes - start;
        if items.may_cut {
            let mut next = 0;
            for item in of_use {
                let before = item.bytes.min(left);
                self.put(used, *item, 0, ring_bytes - left, before);
                self.put(used, *item, before, next, item.bytes - before);
                (left, next) = (left - before, next + item.bytes - before);
            }
            return next;
        }
        // Whole tensors, in order, as far as the end of the ring has room for them; but not where
        // the rest would come to lie over them.
        let takes = |left: &mut u64, bytes: u64| {
            let fits = bytes <= *left;
            *left -= if fits { bytes } else { 0 };
            fits
        };
        let mut room = left;
        let before: u64 = of_use.iter().map(|i| i.bytes).filter(|&b| takes(&mut room, b)).sum();
        if total - before > start {
            left = 0;
        }
        let mut rest = left;
        for item in of_use {
            let target = ring_bytes - rest;
            if takes(&mut rest, item.bytes) {
                self.put(used, *item, 0, target, item.bytes);
            }
        }
        let mut next = 0;
        for item in of_use {
            if !takes(&mut left, item.bytes) {
                self.put(used, *item, 0, next, item.bytes);
                next += item.bytes;
            }
        }
        next
    }
}

/// The smallest ring, to within 1/64 of a turn, that is passed at most `turns` times; `None` if
/// one of `most_bytes` is not enough.
pub(super) fn smallest_ring(
    items: &Items,
    turns: u32,
    most_bytes: u64,
    align_bytes: u64,
) -> Option<(u64, Placement)> {
    let mut placement = Placement::default();
    let least = items.most_of_use().max(items.bytes().div_ceil(u64::from(turns.max(1))));
    let up = |bytes: u64| bytes.next_multiple_of(align_bytes);
    let (mut low, mut high) = (up(least), most_bytes / align_bytes * align_bytes);
    if low > high {
        return None;
    }
    placement.fill(items, low);
    if placement.turns <= turns {
        return Some((low, placement));
    }
    placement.fill(items, high);
    if placement.turns > turns {
        return None;
    }
    while high - low > (low / 64).max(align_bytes) {
        let middle = up(low + (high - low) / 2);
        placement.fill(items, middle);
        if placement.turns <= turns { high = middle } else { low = middle }
    }
    placement.fill(items, high);
    Some((high, placement))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(uses: &[&[u64]], may_cut: bool) -> Items {
        let mut items = Items { may_cut, ..Items::default() };
        for tensors in uses {
            let first = items.all.len();
            items.all.extend((0..).zip(*tensors).map(|(tensor, &bytes)| Item { tensor, bytes }));
            items.of_use.push(first..items.all.len());
        }
        items
    }

    fn place(items: &Items, ring_bytes: u64) -> Vec<(u32, u32, u64, u64)> {
        let mut placement = Placement::default();
        placement.fill(items, ring_bytes);
        placement.pieces.iter().map(|p| (p.used, p.tensor, p.target, p.bytes)).collect()
    }

    #[test]
    fn tensors_fill_the_end_of_a_turn() {
        let items = items(&[&[4], &[4], &[3, 1]], false);
        let expected = [(0, 0, 0, 4), (1, 0, 4, 4), (2, 1, 8, 1), (2, 0, 0, 3)];
        assert_eq!(place(&items, 10), expected);
    }

    #[test]
    fn a_use_never_lies_over_itself() {
        // The rest of use 1, 5 bytes, would reach over its own byte at 4.
        let items = items(&[&[4], &[5, 1]], false);
        assert_eq!(place(&items, 6), [(0, 0, 0, 4), (1, 0, 0, 5), (1, 1, 5, 1)]);
    }

    #[test]
    fn bytes_are_cut_by_the_end_of_a_turn() {
        let items = items(&[&[4], &[4], &[4]], true);
        let expected = [(0, 0, 0, 4), (1, 0, 4, 4), (2, 0, 8, 2), (2, 0, 0, 2)];
        assert_eq!(place(&items, 10), expected);
    }

    #[test]
    fn two_sides_take_turns() {
        let items = items(&[&[4], &[], &[3, 1], &[2]], false);
        let mut placement = Placement::default();
        placement.alternate(&items, 6);
        let found: Vec<(u32, u64)> = placement.pieces.iter().map(|p| (p.used, p.target)).collect();
        assert_eq!((found, placement.turns), (vec![(0, 0), (2, 2), (2, 5), (3, 0)], 3));
    }

    #[test]
    fn the_smallest_ring_is_passed_as_often_as_asked() {
        let items = items(&[&[4_u64][..]; 6], false);
        for (turns, ring_bytes) in [(2, 12), (3, 8), (6, 4)] {
            let (found, placement) = smallest_ring(&items, turns, 100, 1).expect("enough");
            assert_eq!((found, placement.turns), (ring_bytes, turns));
        }
        assert!(smallest_ring(&items, 2, 11, 1).is_none());
        assert_eq!(smallest_ring(&items, 4, 100, 1).expect("enough").0, 8, "tensors are whole");
    }
}

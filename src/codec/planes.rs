//! Between a byte for each element and a word for each lane and plane.
//!
//! Words of 64 bits hold the eight elements of a group, a byte each. The four groups of a lane fit
//! into one such word for each two planes. The place of a bit in it is a number of six bits: from
//! the highest, three for the element, two for the group (`j`, its low bit first), one for the
//! plane. In the lane's two words they come in another order, so bits of the number are exchanged,
//! a pair at a time.

use super::{Groups, LANES, Words};
use crate::units::index;

/// The low two bits of each half byte, and the low one.
const TWO: u64 = 0x3333_3333_3333_3333;
const ONE: u64 = 0x1111_1111_1111_1111;

/// The codes of all elements of a tile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Codes {
    /// First level, two bits.
    pub(super) first: Groups,
    /// Second level, three bits; anything below 8 for an element that has none.
    pub(super) second: Groups,
}

/// A word for each lane of all planes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Planes {
    /// First level, the low bit first.
    pub(super) first: [Words; 2],
    /// Second level, the low bit first, at the places of their elements.
    pub(super) second: [Words; 3],
}

impl Codes {
    pub(super) const ZERO: Self = Self { first: [[0; 8]; 4 * LANES], second: [[0; 8]; 4 * LANES] };

    /// The planes of the codes.
    pub(super) fn gather(&self) -> Planes {
        let mut planes = Planes { first: [[0; LANES]; 2], second: [[0; LANES]; 3] };
        let ([first_0, first_1], [low, mid, high]) = (&mut planes.first, &mut planes.second);
        for lane in 0..LANES {
            // Of groups 0 and 1, and of 2 and 3.
            let [even, odd] = halves(&self.first, lane);
            [first_0[lane], first_1[lane]] = to_words(even | odd << 2);
            let [even, odd] = halves(&self.second, lane);
            [low[lane], mid[lane]] = to_words(even & TWO | (odd & TWO) << 2);
            [high[lane], _] = to_words(even >> 2 & ONE | odd & ONE << 2);
        }
        planes
    }
}

impl Planes {
    /// The elements that have a second-level code.
    pub(super) fn masks(&self) -> Words {
        std::array::from_fn(|lane| self.first[0][lane] & self.first[1][lane])
    }

    /// The elements whose exponents are escapes.
    pub(super) fn escaping(&self) -> Words {
        let [low, mid, high] = &self.second;
        let masks = self.masks();
        std::array::from_fn(|lane| masks[lane] & low[lane] & mid[lane] & high[lane])
    }

    /// The codes of the planes.
    pub(super) fn scatter(&self) -> Codes {
        let mut codes = Codes::ZERO;
        let [low, mid, high] = &self.second;
        for lane in 0..LANES {
            let bits = from_words(self.first[0][lane], self.first[1][lane]);
            put_halves(&mut codes.first, lane, [bits & TWO, bits >> 2 & TWO]);
            let bits = from_words(low[lane], mid[lane]);
            let top = from_words(high[lane], 0);
            let even = bits & TWO | (top & ONE) << 2;
            let odd = bits >> 2 & TWO | top & ONE << 2;
            put_halves(&mut codes.second, lane, [even, odd]);
        }
        codes
    }
}

/// Groups 0 and 1 of a lane in the half bytes of one word, 2 and 3 in those of another.
fn halves(groups: &Groups, lane: usize) -> [u64; 2] {
    let group = |j: usize| u64::from_le_bytes(groups[LANES * j + lane]);
    [group(0) | group(1) << 4, group(2) | group(3) << 4]
}

/// The inverse of [`halves`].
fn put_halves(groups: &mut Groups, lane: usize, [even, odd]: [u64; 2]) {
    let low = 0x0f0f_0f0f_0f0f_0f0f;
    for (j, half) in [even, even >> 4, odd, odd >> 4].into_iter().enumerate() {
        groups[LANES * j + lane] = (half & low).to_le_bytes();
    }
}

/// Exchanges the bits at the places in `mask` with those `distance` above them.
fn exchange(bits: u64, distance: u32, mask: u64) -> u64 {
    let changed = (bits ^ bits >> distance) & mask;
    bits ^ changed ^ changed << distance
}

/// The lane's words of two planes.
fn to_words(mut bits: u64) -> [u32; 2] {
    bits = exchange(bits, 1, 0x2222_2222_2222_2222);
    bits = exchange(bits, 30, 0x0000_0000_cccc_cccc);
    bits = exchange(bits, 8, 0x0000_ff00_0000_ff00);
    bits = exchange(bits, 7, 0x00aa_00aa_00aa_00aa);
    [(bits & 0xffff_ffff) as u32, (bits >> 32) as u32]
}

/// The inverse of [`to_words`].
fn from_words(low: u32, high: u32) -> u64 {
    let mut bits = u64::from(low) | u64::from(high) << 32;
    bits = exchange(bits, 7, 0x00aa_00aa_00aa_00aa);
    bits = exchange(bits, 8, 0x0000_ff00_0000_ff00);
    bits = exchange(bits, 30, 0x0000_0000_cccc_cccc);
    exchange(bits, 1, 0x2222_2222_2222_2222)
}

/// Visits the elements whose bits are set, in order of lane and bit: the group of each, and its
/// place in it.
pub(super) fn each_place(words: &Words, mut visit: impl FnMut(usize, usize)) {
    // Few lanes have any, and which is hard to predict: those that have none are not branched on.
    let mut lanes = 0_u32;
    for (lane, &bits) in words.iter().enumerate() {
        lanes |= u32::from(bits != 0) << lane;
    }
    while lanes != 0 {
        let lane = index(lanes.trailing_zeros());
        let mut bits = words[lane];
        while bits != 0 {
            let bit = index(bits.trailing_zeros());
            visit(LANES * (bit >> 2 & 3) + lane, 2 * (bit & 3) + (bit >> 4 & 1));
            bits &= bits - 1;
        }
        lanes &= lanes - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_its_bit_in_every_plane() {
        for (lane, j, i) in (0..1024).map(|n| (n / 8 % 32, n / 256, n % 8)) {
            let bit = 16 * (i % 2) + 4 * j + i / 2;
            let (group, n) = (32 * j + lane, i);
            let mut words = [0; LANES];
            words[lane] = 1 << bit;
            let mut visited = Vec::new();
            each_place(&words, |group, n| visited.push((group, n)));
            assert_eq!(visited, [(group, n)]);
            for plane in 0..5 {
                let mut codes = Codes::ZERO;
                let mut planes = Planes { first: [[0; LANES]; 2], second: [[0; LANES]; 3] };
                if plane < 2 {
                    codes.first[group][n] = 1 << plane;
                    planes.first[plane][lane] = 1 << bit;
                } else {
                    codes.second[group][n] = 1 << (plane - 2);
                    planes.second[plane - 2][lane] = 1 << bit;
                }
                assert_eq!(codes.gather(), planes, "lane {lane}, bit {bit} in plane {plane}");
                assert_eq!(planes.scatter(), codes, "lane {lane}, bit {bit} in plane {plane}");
            }
        }
    }

    #[test]
    fn elements_are_visited_in_order_of_lane_and_bit() {
        let mut words = [0; LANES];
        (words[3], words[31]) = (1 << 4 | 1 << 16, 1 << 31 | 1);
        let mut visited = Vec::new();
        each_place(&words, |group, n| visited.push((group, n)));
        assert_eq!(visited, [(32 + 3, 0), (3, 1), (31, 0), (96 + 31, 7)]);
    }
}

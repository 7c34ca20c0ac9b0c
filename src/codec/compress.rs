//! Moves the bits of a word that a mask has together, and apart again: 32 words at a time.
//!
//! Hacker's Delight, 2nd edition, 7-4 and 7-5: a bit moves down by the number of places below it
//! that the mask has not, one binary digit of that number after the other. Which bits move at
//! which digit depends on the mask alone, so all planes share that work.

use super::{LANES, Words};

/// For each digit the bits that move down by it.
pub(super) struct Moves([Words; 5]);

impl Moves {
    /// Of 32 masks.
    pub(super) fn new(masks: &Words) -> Self {
        let mut moves = [[0; LANES]; 5];
        for lane in 0..LANES {
            let mut mask = masks[lane];
            // Places whose number of zeros below them has the digit: the parity of those zeros.
            let mut zeros = !mask << 1;
            for (digit, moving) in moves.iter_mut().enumerate() {
                let mut parity = zeros ^ zeros << 1;
                parity ^= parity << 2;
                parity ^= parity << 4;
                parity ^= parity << 8;
                parity ^= parity << 16;
                let bits = parity & mask;
                moving[lane] = bits;
                mask = mask ^ bits | bits >> (1 << digit);
                zeros &= !parity;
            }
        }
        Self(moves)
    }

    /// The bits of the masks, together at the low end of each word. Other bits must be zero.
    pub(super) fn compress(&self, words: &mut Words) {
        for (lane, word) in words.iter_mut().enumerate() {
            for (digit, moving) in self.0.iter().enumerate() {
                let bits = *word & moving[lane];
                *word = *word ^ bits | bits >> (1 << digit);
            }
        }
    }

    /// The inverse: the low bits of each word, at the places that its mask has. Other places have
    /// anything.
    pub(super) fn expand(&self, words: &mut Words) {
        for (lane, word) in words.iter_mut().enumerate() {
            for (digit, moving) in self.0.iter().enumerate().rev() {
                let moving = moving[lane];
                *word = *word & !moving | *word << (1 << digit) & moving;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Random;
    use super::*;

    /// Bit by bit.
    fn slow(word: u32, mask: u32) -> u32 {
        let kept = (0..32).filter(|bit| mask >> bit & 1 == 1);
        kept.enumerate().map(|(to, from)| (word >> from & 1) << to).sum()
    }

    #[test]
    fn bits_of_any_mask_go_together_in_order_and_back() {
        let mut random = Random(11);
        let mut word = || u32::try_from(random.word() >> 32).expect("32 bits");
        for density in 0..30 {
            let mut masks = [0; LANES];
            masks.fill_with(|| match density % 3 {
                0 => word() & word(),
                1 => word(),
                _ => word() | word() | word(),
            });
            (masks[0], masks[1], masks[2], masks[3]) = (0, u32::MAX, 1, 1 << 31);
            let mut words = [0; LANES];
            words.fill_with(&mut word);
            let moves = Moves::new(&masks);
            let mut kept: Words = std::array::from_fn(|lane| words[lane] & masks[lane]);
            moves.compress(&mut kept);
            assert_eq!(kept, std::array::from_fn(|lane| slow(words[lane], masks[lane])));
            moves.expand(&mut kept);
            let expected: Words = std::array::from_fn(|lane| words[lane] & masks[lane]);
            assert_eq!(std::array::from_fn(|lane| kept[lane] & masks[lane]), expected);
        }
    }
}

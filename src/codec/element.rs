//! What the weights are that are encoded.

use super::ELEMENTS;

/// The type of the elements of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// Sign, eight bits of exponent, seven of mantissa.
    Bf16,
    /// Sign, four bits of exponent, three of mantissa: e4m3, as torch's `float8_e4m3fn`.
    Fp8,
}

impl Element {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Bf16, Self::Fp8];

    /// Raw bytes of one tile, the unit that is encoded.
    pub const fn tile_bytes(self) -> usize {
        match self {
            Self::Bf16 => 2 * ELEMENTS,
            Self::Fp8 => ELEMENTS,
        }
    }

    /// The first four bytes of a segment, "DGW1" or "DGF1".
    pub(super) const fn magic(self) -> u32 {
        match self {
            Self::Bf16 => 0x3157_4744,
            Self::Fp8 => 0x3146_4744,
        }
    }

    /// Bytes of the signs and mantissas of one tile: half of all bits.
    pub(super) const fn signs_bytes(self) -> usize {
        self.tile_bytes() / 2
    }

    /// The bits that an exponent has.
    pub(super) const fn exponent_bits(self) -> u8 {
        match self {
            Self::Bf16 => 0xff,
            Self::Fp8 => 0x0f,
        }
    }

    /// How far an exponent is above a base; what no code says is 10 or more. Of fp8 the exponents
    /// are a circle: the base may be above the most frequent ones.
    pub(super) const fn above(self, exponent: u8, base: u8) -> u8 {
        match self {
            Self::Bf16 if exponent < base => u8::MAX,
            Self::Bf16 => exponent - base,
            Self::Fp8 => exponent.wrapping_sub(base) & 0x0f,
        }
    }

    /// The base whose first-level codes begin with this exponent, or near it.
    pub(super) const fn base_of(self, first: u8) -> u8 {
        match self {
            Self::Bf16 => first.saturating_sub(4),
            Self::Fp8 => first.wrapping_sub(4) & 0x0f,
        }
    }

    /// Parts the elements of a tile: signs and mantissas, and a byte for each exponent.
    pub(super) fn split(self, raw: &[u8], signs: &mut [u8], exponents: &mut [u8]) {
        match self {
            Self::Bf16 => {
                let each = signs.iter_mut().zip(exponents);
                for ((sign, exponent), raw) in each.zip(raw.chunks_exact(2)) {
                    let value = u16::from_le_bytes([raw[0], raw[1]]);
                    *sign = (value >> 8 & 0x80) as u8 | (value & 0x7f) as u8;
                    *exponent = (value >> 7 & 0xff) as u8;
                }
            }
            Self::Fp8 => {
                let half = |value: u8| value >> 4 & 0x08 | value & 0x07;
                for (signs, raw) in signs.chunks_exact_mut(4).zip(raw.chunks_exact(8)) {
                    let (low, high) = raw.split_at(4);
                    for ((sign, &low), &high) in signs.iter_mut().zip(low).zip(high) {
                        *sign = half(low) | half(high) << 4;
                    }
                }
                for (exponent, value) in exponents.iter_mut().zip(raw) {
                    *exponent = value >> 3 & 0x0f;
                }
            }
        }
    }

    /// The inverse of [`Element::split`].
    pub(super) fn join(self, signs: &[u8], exponents: &[u8], raw: &mut [u8]) {
        match self {
            Self::Bf16 => {
                let each = raw.chunks_exact_mut(2).zip(signs).zip(exponents);
                for ((raw, &sign), &exponent) in each {
                    let (sign, exponent) = (u16::from(sign), u16::from(exponent));
                    let value = (sign & 0x80) << 8 | exponent << 7 | sign & 0x7f;
                    raw.copy_from_slice(&value.to_le_bytes());
                }
            }
            Self::Fp8 => {
                let whole = |half: u8| (half & 0x08) << 4 | half & 0x07;
                for (raw, signs) in raw.chunks_exact_mut(8).zip(signs.chunks_exact(4)) {
                    let (low, high) = raw.split_at_mut(4);
                    for ((low, high), &sign) in low.iter_mut().zip(high).zip(signs) {
                        *low = whole(sign & 0x0f);
                        *high = whole(sign >> 4);
                    }
                }
                for (raw, exponent) in raw.iter_mut().zip(exponents) {
                    *raw |= exponent << 3 & 0x78;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Random;
    use super::*;

    #[test]
    fn what_is_parted_comes_together_again() {
        let mut random = Random(3);
        for element in Element::ALL {
            let (mut signs, mut exponents) = (vec![0; element.signs_bytes()], vec![0; ELEMENTS]);
            let raw: Vec<u8> =
                (0..element.tile_bytes()).map(|_| random.word().to_le_bytes()[6]).collect();
            element.split(&raw, &mut signs, &mut exponents);
            assert!(exponents.iter().all(|exponent| *exponent <= element.exponent_bits()));
            let mut joined = vec![0xa5; raw.len()];
            element.join(&signs, &exponents, &mut joined);
            assert_eq!(joined, raw, "{element:?}");
        }
    }

    #[test]
    fn signs_of_fp8_are_half_a_byte_each_four_elements_apart() {
        let (mut signs, mut exponents) = ([0; 512], [0; 1024]);
        let mut raw = [0; 1024];
        (raw[8 + 1], raw[8 + 5]) = (0b1011_0101, 0b0111_1010);
        Element::Fp8.split(&raw, &mut signs, &mut exponents);
        assert_eq!((signs[4 + 1], exponents[8 + 1], exponents[8 + 5]), (0b0010_1101, 6, 15));
    }

    #[test]
    fn exponents_of_fp8_are_a_circle() {
        assert_eq!([0, 5, 12, 15].map(|exponent| Element::Fp8.above(exponent, 12)), [4, 9, 0, 3]);
        assert_eq!([0, 3, 4, 15].map(|first| Element::Fp8.base_of(first)), [12, 15, 0, 11]);
        assert_eq!(
            [0, 11, 12, 255].map(|exponent| Element::Bf16.above(exponent, 12)),
            [255, 255, 0, 243]
        );
        assert_eq!([0, 3, 4, 255].map(|first| Element::Bf16.base_of(first)), [0, 0, 0, 251]);
    }
}

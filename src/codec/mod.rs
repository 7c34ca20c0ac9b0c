//! The lossless encoded form of bf16 and fp8 weights, on the CPU. Pure; `docs/encoded-format.md`
//! decides.
//!
//! All loops that touch every element go over arrays of fixed size and do the same to each, so
//! that the compiler makes vector instructions of them.

mod base;
mod compress;
mod decode;
mod element;
mod encode;
mod layout;
mod planes;
pub mod stream;

pub use decode::{Malformed, decode};
pub use element::Element;
pub use encode::encode;
pub use layout::most_encoded_bytes;

/// Raw bytes of one segment at most, as the engine cuts tensors.
pub const SEGMENT_BYTES: usize = 4 << 20;
/// Tiles of one segment at most, as the format allows.
pub const MOST_TILES: usize = 8192;

/// Elements of one tile, the unit that is encoded.
const ELEMENTS: usize = 1024;
/// Threads that decode a tile on the device.
const LANES: usize = 32;

/// A byte for each element of a tile, by eight neighbours: group `32·j + l` is of lane `l`.
type Groups = [[u8; 8]; ELEMENTS / 8];
/// A word for each lane.
type Words = [u32; LANES];

#[cfg(test)]
mod tests {
    use super::*;

    const TILE_BYTES: usize = Element::Bf16.tile_bytes();

    /// Numbers that look random and are the same each time.
    pub(super) struct Random(pub(super) u64);

    impl Random {
        pub(super) fn word(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        pub(super) fn below(&mut self, end: usize) -> usize {
            usize::try_from(self.word() >> 32).expect("64 bit addresses") % end
        }

        /// About normally distributed.
        fn normal(&mut self) -> f32 {
            let words = [self.word(), self.word(), self.word()];
            let parts = words.iter().flat_map(|word| word.to_le_bytes());
            let parts: Vec<u8> = parts.collect();
            let uniform = |pair: &[u8]| f32::from(u16::from_le_bytes([pair[0], pair[1]])) / 65536.0;
            parts.chunks_exact(2).map(uniform).sum::<f32>() - 6.0
        }
    }

    pub(super) fn raw(elements: impl IntoIterator<Item = u16>) -> Vec<u8> {
        elements.into_iter().flat_map(u16::to_le_bytes).collect()
    }

    /// Weights of so many tiles as a trained layer has them.
    pub(super) fn normal(tiles: usize, seed: u64) -> Vec<u8> {
        let mut random = Random(seed);
        let mut next = || (random.normal() * 0.02).to_bits().to_le_bytes();
        (0..tiles * ELEMENTS).map(|_| next()).flat_map(|[_, _, low, high]| [low, high]).collect()
    }

    /// As [`normal`], in fp8 after so much was divided out, as far as fp8 goes.
    fn normal_fp8(tiles: usize, seed: u64, scale: f32) -> Vec<u8> {
        let mut random = Random(seed);
        (0..tiles * ELEMENTS).map(|_| fp8(random.normal() / scale)).collect()
    }

    /// The nearest e4m3 value, of which 448 is the largest.
    fn fp8(value: f32) -> u8 {
        let (size, sign) = (value.abs().min(448.0), u8::from(value < 0.0) << 7);
        // Below 2^-6 the steps are 2^-9, from there on an eighth of the power of two.
        let exponent = (size.to_bits() >> 23).max(121) - 121;
        let step = f32::from_bits((exponent + 118) << 23);
        // A power of two more counts eight steps less in it. Adding 2^23 rounds to whole ones.
        let steps = (size / step + 8_388_608.0).to_bits() & 0x007f_ffff;
        let code = exponent * 8 + steps;
        sign | u8::try_from(code).expect("seven bits")
    }

    pub(super) fn encoded(raw: &[u8]) -> Vec<u8> {
        encoded_as(Element::Bf16, raw)
    }

    pub(super) fn encoded_as(element: Element, raw: &[u8]) -> Vec<u8> {
        let mut segment = Vec::new();
        assert!(encode(element, raw, &mut segment), "{} bytes are a segment", raw.len());
        segment
    }

    fn round_trip(raw: &[u8]) -> usize {
        round_trip_as(Element::Bf16, raw)
    }

    /// Encodes and decodes; returns the encoded size.
    fn round_trip_as(element: Element, raw: &[u8]) -> usize {
        let segment = encoded_as(element, raw);
        assert_eq!(segment.len() % 256, 0);
        assert!(segment.len() <= most_encoded_bytes(element, raw.len()), "{} bytes", segment.len());
        let mut found = vec![0xa5; raw.len()];
        decode(element, &segment, &mut found).expect("what was encoded can be decoded");
        let wrong = found.iter().zip(raw).position(|(found, expected)| found != expected);
        assert_eq!(wrong, None, "first byte that differs");
        segment.len()
    }

    #[test]
    fn normal_weights_come_back_and_take_less_than_11_05_bits() {
        let raw = normal(256, 1);
        let milli_bits = round_trip(&raw) * 8000 / (raw.len() / 2);
        assert!((10_700..11_050).contains(&milli_bits), "{milli_bits} / 1000 bits");
    }

    #[test]
    fn weights_in_fp8_come_back_and_take_6_to_7_bits() {
        let milli_bits = |raw: &[u8]| round_trip_as(Element::Fp8, raw) * 8000 / raw.len();
        // As they are, most below or near the smallest normal number; scaled so that the largest is
        // about the largest of fp8.
        for (scale, range) in [(50.0, 5_900..6_300), (25.0, 6_000..6_500), (0.013, 6_700..7_200)] {
            let found = milli_bits(&normal_fp8(256, 1, scale));
            assert!(range.contains(&found), "{found} / 1000 bits at {scale}");
        }
    }

    #[test]
    fn every_pattern_of_fp8_comes_back_whatever_is_frequent() {
        let fp8 = |raw: &[u8]| round_trip_as(Element::Fp8, raw);
        for step in (1_u32..256).step_by(2) {
            fp8(&(0..1024).map(|n| (n * step).to_le_bytes()[0]).collect::<Vec<u8>>());
        }
        let mut random = Random(17);
        for frequent in 0..16 {
            // All exponents, and most often this one and its neighbours.
            let mut next = || match random.word().to_le_bytes() {
                [0..=150, byte, near, ..] => ((frequent + near % 3) % 16) << 3 | byte & 0x87,
                [_, byte, ..] => byte,
            };
            let raw: Vec<u8> = (0..3 * ELEMENTS).map(|_| next()).collect();
            fp8(&raw);
        }
        for value in 0..=255 {
            fp8(&[value; ELEMENTS]);
        }
        let most = [normal_fp8(MOST_TILES - 1, 5, 25.0), (0..4).flat_map(|_| 0..=255).collect()];
        fp8(&most.concat());
        assert!(!encode(Element::Fp8, &[0; 1023], &mut Vec::new()));
    }

    #[test]
    fn every_bit_pattern_comes_back() {
        round_trip(&raw(0..=u16::MAX));
        round_trip(&raw((0..=u16::MAX).map(|n| n.wrapping_mul(0x9e37))));
        round_trip(&raw((0..=u16::MAX).map(u16::reverse_bits)));
    }

    #[test]
    fn tiles_of_one_value_come_back() {
        for value in [0, 0x8000, 1, 0x7f, 0x3f80, 0x7f80, 0xff80, 0x7fc1, 0xffff, 0x0400, 0x7e00] {
            round_trip(&raw([value; ELEMENTS]));
        }
    }

    #[test]
    fn random_bits_come_back_and_extremes_do_with_any_base() {
        let mut random = Random(7);
        let bits: Vec<u8> =
            (0..8 * TILE_BYTES / 8).flat_map(|_| random.word().to_le_bytes()).collect();
        round_trip(&bits);
        for exponent in (0..=255).rev() {
            // Most have this exponent, so that the base follows it; the others are far from it.
            let at = |e: u16| if e % 5 == 0 { (e * 37) << 7 } else { exponent << 7 | (e & 0x807f) };
            round_trip(&raw((0..1024).map(at)));
        }
    }

    #[test]
    fn as_many_tiles_as_there_may_be_come_back_and_no_more_are_taken() {
        let tile = normal(1, 3);
        let mut all = tile.repeat(MOST_TILES);
        all[5 * TILE_BYTES..6 * TILE_BYTES].fill(0xff);
        round_trip(&all);
        let mut out = vec![1, 2, 3];
        all.extend_from_slice(&tile);
        for bytes in [0, 1, TILE_BYTES - 1, TILE_BYTES + 2, all.len()] {
            let is_one = encode(Element::Bf16, &all[..bytes], &mut out);
            assert!(!is_one, "{bytes} bytes are no segment");
        }
        assert_eq!(out, [1, 2, 3]);
    }

    #[test]
    fn a_segment_begins_where_what_is_there_ends() {
        let raw = normal(3, 4);
        let mut out = vec![9; 77];
        assert!((0..2).all(|_| encode(Element::Bf16, &raw, &mut out)));
        let segment = encoded(&raw);
        assert_eq!(out, [vec![9; 77], segment.clone(), segment].concat());
    }
}

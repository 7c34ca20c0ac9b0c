//! The lossless encoded form of bf16 weights, on the CPU. Pure; `docs/encoded-format.md` decides.
//!
//! All loops that touch every element go over arrays of fixed size and do the same to each, so
//! that the compiler makes vector instructions of them.

mod base;
mod compress;
mod decode;
mod encode;
mod layout;
mod planes;
pub mod stream;

pub use decode::{Malformed, decode};
pub use encode::encode;
pub use layout::most_encoded_bytes;

/// Raw bytes of one tile, the unit that is encoded.
pub const TILE_BYTES: usize = 2048;
/// Raw bytes of one segment at most, as the engine cuts tensors.
pub const SEGMENT_BYTES: usize = 4 << 20;
/// Tiles of one segment at most, as the format allows.
pub const MOST_TILES: usize = 8192;

/// Elements of one tile.
const ELEMENTS: usize = TILE_BYTES / 2;
/// Threads that decode a tile on the device.
const LANES: usize = 32;

/// A byte for each element of a tile, by eight neighbours: group `32·j + l` is of lane `l`.
type Groups = [[u8; 8]; ELEMENTS / 8];
/// A word for each lane.
type Words = [u32; LANES];

#[cfg(test)]
mod tests {
    use super::*;

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

    pub(super) fn encoded(raw: &[u8]) -> Vec<u8> {
        let mut segment = Vec::new();
        assert!(encode(raw, &mut segment), "{} bytes are a segment", raw.len());
        segment
    }

    /// Encodes and decodes; returns the encoded size.
    fn round_trip(raw: &[u8]) -> usize {
        let segment = encoded(raw);
        assert_eq!(segment.len() % 256, 0);
        assert!(segment.len() <= most_encoded_bytes(raw.len()), "{} bytes", segment.len());
        let mut found = vec![0xa5; raw.len()];
        decode(&segment, &mut found).expect("what was encoded can be decoded");
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
            assert!(!encode(&all[..bytes], &mut out), "{bytes} bytes are no segment");
        }
        assert_eq!(out, [1, 2, 3]);
    }

    #[test]
    fn a_segment_begins_where_what_is_there_ends() {
        let raw = normal(3, 4);
        let mut out = vec![9; 77];
        assert!(encode(&raw, &mut out) && encode(&raw, &mut out));
        let segment = encoded(&raw);
        assert_eq!(out, [vec![9; 77], segment.clone(), segment].concat());
    }
}

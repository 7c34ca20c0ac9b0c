//! The kernel `decode`, written from `docs/encoded-format.md` alone: a check of the product's.

use crate::codes::{Answer, LAUNCH_FAILED};
use crate::work::Span;

const MAGIC: u32 = 0x3157_4744;
const MAGIC_OF_FP8: u32 = 0x3146_4744;
/// The alignment of a segment's parts, and the size of its header.
const PART: usize = 256;
const TILE_ELEMENTS: usize = 1024;
const MOST_TILES: usize = 8192;
const MOST_SEGMENTS: usize = 32;
/// One warp decodes a tile.
const BLOCK_TILES: u32 = 8;

/// The kernel's argument: segments whose tiles are numbered through.
#[repr(C)]
pub(crate) struct Batch {
    count: u32,
    first_tile: [u32; MOST_SEGMENTS + 1],
    /// Of each segment the source and the target.
    addresses: [[usize; 2]; MOST_SEGMENTS],
}

const _: () = assert!(size_of::<Batch>() == 648);

impl Batch {
    /// How many blocks the launch needs; `None` if the kernel crashes whatever it gets.
    pub(crate) fn blocks(&self) -> Option<u32> {
        Some(self.first_tile[self.count()?].div_ceil(BLOCK_TILES))
    }

    /// Decodes the segments, up to the first that is not what the launch says or the format allows.
    ///
    /// Who makes a batch promises what the kernel asks: the sources hold segments and the targets
    /// have room for their elements until the stream has passed the work.
    pub(crate) fn decode(&self) -> Answer {
        self.try_decode().ok_or(LAUNCH_FAILED)
    }

    fn try_decode(&self) -> Option<()> {
        let first_tile = &self.first_tile[..=self.count()?];
        if first_tile[0] != 0 {
            return None;
        }
        for (tiles, &[source, target]) in first_tile.windows(2).zip(&self.addresses) {
            let tiles = tiles[1].checked_sub(tiles[0])? as usize;
            let elements = Segment { address: source, tiles }.elements()?;
            let source = elements.as_ptr().expose_provenance();
            Span { source, target, bytes: elements.len() }.copy();
        }
        Some(())
    }

    fn count(&self) -> Option<usize> {
        let count = self.count as usize;
        (1..=MOST_SEGMENTS).contains(&count).then_some(count)
    }
}

#[derive(Clone, Copy)]
struct Segment {
    address: usize,
    tiles: usize,
}

impl Segment {
    /// The bytes of the elements.
    fn elements(self) -> Option<Vec<u8>> {
        let [magic, tiles, second, escapes] = self.words(0, 4).try_into().ok()?;
        if ![MAGIC, MAGIC_OF_FP8].contains(&magic) || tiles as usize != self.tiles {
            return None;
        }
        let is_fp8 = magic == MAGIC_OF_FP8;
        if !(1..=MOST_TILES).contains(&self.tiles) {
            return None;
        }
        let signs_bytes = TILE_ELEMENTS * self.tiles / if is_fp8 { 2 } else { 1 };
        let planes_at = PART + signs_bytes;
        let table_at = planes_at + PART * self.tiles;
        let signs = self.bytes(PART, signs_bytes);
        let planes = self.words(planes_at, 64 * self.tiles);
        let table = self.words(table_at, 2 * self.tiles);
        let second_at = table_at + (8 * self.tiles).next_multiple_of(PART);
        let mut rare = Rare::find(self, &planes, second_at, [second, escapes])?;
        let mut elements = vec![0; TILE_ELEMENTS * self.tiles * if is_fp8 { 1 } else { 2 }];
        for tile in 0..self.tiles {
            let [rank, word] = [table[2 * tile], table[2 * tile + 1]];
            if [rank as usize, (word & 0x00FF_FFFF) as usize] != [rare.codes, rare.escapes] {
                return None;
            }
            for (lane, bit) in (0..32).flat_map(|lane| (0..32).map(move |bit| (lane, bit))) {
                let plane = |plane: usize| planes[64 * tile + 32 * plane + lane] >> bit & 1;
                let code = plane(0) + 2 * plane(1);
                let exponent =
                    if code == 3 { rare.next(word >> 24) } else { (word >> 24) + 4 + code };
                let at = TILE_ELEMENTS * tile + element(lane, bit);
                if is_fp8 {
                    let half = signs[at / 8 * 4 + at % 4] >> (4 * (at / 4 % 2)) & 0x0F;
                    let exponent = u8::try_from(exponent % 16).ok()?;
                    elements[at] = (half & 0x08) << 4 | exponent << 3 | half & 0x07;
                    continue;
                }
                let exponent = u16::from(u8::try_from(exponent).ok()?);
                let sign = u16::from(signs[at]);
                let element = (sign & 0x80) << 8 | exponent << 7 | sign & 0x7F;
                elements[2 * at..][..2].copy_from_slice(&element.to_le_bytes());
            }
        }
        Some(elements)
    }

    fn bytes(self, at: usize, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let target = bytes.as_mut_ptr().expose_provenance();
        Span { source: self.address + at, target, bytes: count }.copy();
        bytes
    }

    fn words(self, at: usize, count: usize) -> Vec<u32> {
        let bytes = self.bytes(at, 4 * count);
        let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        bytes.chunks_exact(4).map(word).collect()
    }
}

/// The element of a tile that is `bit` in the words of `lane`.
fn element(lane: usize, bit: usize) -> usize {
    let (h, j, m) = (bit / 16, bit % 16 / 4, bit % 4);
    256 * j + 8 * lane + 2 * m + h
}

/// A segment's second-level codes and escapes, and how many were taken.
struct Rare {
    segment: Segment,
    groups: Vec<u32>,
    escapes_at: usize,
    codes: usize,
    escapes: usize,
}

impl Rare {
    /// `said` are the offsets in the header; they have to be where the parts before them end.
    fn find(segment: Segment, planes: &[u32], second_at: usize, said: [u32; 2]) -> Option<Self> {
        let of_tile = |tile: &[u32]| -> u32 {
            tile[..32].iter().zip(&tile[32..]).map(|(low, high)| (low & high).count_ones()).sum()
        };
        let codes: u32 = planes.chunks_exact(64).map(of_tile).sum();
        let groups = codes.div_ceil(32) as usize;
        let escapes_at = (second_at + 12 * (groups + 2)).next_multiple_of(PART);
        if said.map(|offset| offset as usize) != [second_at, escapes_at] {
            return None;
        }
        let groups = segment.words(second_at, 3 * groups);
        Some(Self { segment, groups, escapes_at, codes: 0, escapes: 0 })
    }

    /// The next exponent, of a tile with this base.
    fn next(&mut self, base: u32) -> u32 {
        let group = &self.groups[3 * (self.codes / 32)..][..3];
        let bit = self.codes % 32;
        self.codes += 1;
        match (0..).zip(group).map(|(place, word)| (word >> bit & 1) << place).sum() {
            code @ 0..=3 => base + code,
            code @ 4..=6 => base + code + 3,
            _ => {
                let at = self.escapes_at + self.escapes;
                self.escapes += 1;
                self.segment.bytes(at, 1)[0].into()
            }
        }
    }
}

#[cfg(test)]
impl Batch {
    /// A batch of one segment.
    pub(crate) fn of(segment: &[u8], target: &mut [u16]) -> Self {
        let mut addresses = [[0; 2]; MOST_SEGMENTS];
        let target = target.as_mut_ptr().expose_provenance();
        addresses[0] = [segment.as_ptr().expose_provenance(), target];
        let mut first_tile = [0; MOST_SEGMENTS + 1];
        first_tile[1] = segment[4].into();
        Self { count: 1, first_tile, addresses }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::plain_segment;

    fn put_words(segment: &mut [u8], at: usize, words: &[u32]) {
        for (bytes, word) in segment[at..].chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Two tiles with codes of all kinds: 33 of the second level in the first, one in the second.
    fn mixed_segment() -> Vec<u8> {
        let mut segment = plain_segment(&[100, 20]);
        for (byte, sign) in segment[256..][..2048].iter_mut().zip((0..=255).cycle()) {
            *byte = sign;
        }
        let (planes, second_plane) = (2304, 2304 + 128);
        // Lane 0 has second-level codes only, lane 1 one in bit 0; lane 2 has 1 in bit 0 and 2 in
        // bit 31.
        put_words(&mut segment, planes, &[!0, 1, 1]);
        put_words(&mut segment, second_plane, &[!0, 1, 1 << 31]);
        // The second tile's lane 31, bit 16.
        put_words(&mut segment, planes + 256 + 124, &[1 << 16]);
        put_words(&mut segment, second_plane + 256 + 124, &[1 << 16]);
        put_words(&mut segment, 2816, &[0, 100 << 24, 33, 20 << 24 | 4]);
        // Numbers 0 to 31 are 0 to 7 again and again, number 32 is 6, number 33 is 7.
        put_words(&mut segment, 3072, &[0xAAAA_AAAA, 0xCCCC_CCCC, 0xF0F0_F0F0, 2, 3, 3]);
        segment[3328..][..5].copy_from_slice(&[0, 255, 99, 42, 17]);
        segment
    }

    /// The exponent that the page gives the element (`j`, `i`) of a lane.
    fn mixed_exponent(tile: usize, lane: usize, j: usize, i: usize) -> u16 {
        let bit = 16 * (i % 2) + 4 * j + i / 2;
        match (tile, lane, bit) {
            (0, 0, _) if bit % 8 == 7 => [0, 255, 99, 42][bit / 8],
            (0, 0, _) => 100 + [0, 1, 2, 3, 7, 8, 9][bit % 8],
            (0, 1, 0) => 109,
            (0, 2, 0) => 105,
            (0, 2, 31) => 106,
            (0, ..) => 104,
            (1, 31, 16) => 17,
            _ => 24,
        }
    }

    #[test]
    fn all_kinds_of_codes_are_decoded() {
        let (segment, mut target) = (mixed_segment(), [0; 2 * TILE_ELEMENTS]);
        assert_eq!(Batch::of(&segment, &mut target).decode(), Ok(()));
        for (at, &element) in (0..).zip(&target) {
            let (tile, j, lane, i) = (at / 1024, at / 256 % 4, at / 8 % 32, at % 8);
            let sign = u16::try_from(at % 256).unwrap();
            let exponent = mixed_exponent(tile, lane, j, i);
            let expected = (sign & 0x80) << 8 | exponent << 7 | sign & 0x7F;
            assert_eq!(element, expected, "tile {tile}, lane {lane}, j {j}, i {i}");
        }
    }

    #[test]
    fn in_fp8_signs_are_half_a_byte_and_exponents_a_circle() {
        let mut segment = mixed_segment();
        // Half of the signs go; all behind them is 1024 bytes nearer to the start.
        segment.drain(256..1280);
        put_words(&mut segment, 0, &[MAGIC_OF_FP8, 2, 2048, 2304]);
        segment[1792 + 7] = 14;
        segment[1792 + 15] = 9;
        let mut target = [0; TILE_ELEMENTS];
        assert_eq!(Batch::of(&segment, &mut target).decode(), Ok(()));
        let bytes = target.iter().flat_map(|pair| pair.to_le_bytes());
        for (at, element) in bytes.enumerate() {
            let (tile, j, lane, i) = (at / 1024, at / 256 % 4, at / 8 % 32, at % 8);
            let byte = u16::from(segment[256 + at / 8 * 4 + at % 4]);
            let half = if at / 4 % 2 == 0 { byte % 16 } else { byte / 16 };
            // Of the exponents of bf16 those of escapes are as they are, others by their base.
            let exponent = match mixed_exponent(tile, lane, j, i) {
                escape @ (0 | 255 | 99 | 42 | 17) => escape % 16,
                other if tile == 0 => (other - 100 + 14) % 16,
                other => (other - 20 + 9) % 16,
            };
            let expected = (half & 8) << 4 | exponent << 3 | half & 7;
            assert_eq!(u16::from(element), expected, "tile {tile}, lane {lane}, j {j}, i {i}");
        }
    }

    #[test]
    fn what_breaks_the_format_makes_the_kernel_fail() {
        let (good, mut target) = (mixed_segment(), [0; 2 * TILE_ELEMENTS]);
        // Magic, tiles, both offsets; of the tiles the ranks, the escapes before and a base that is
        // too high; a first-level code that becomes a 3.
        for at in [0, 4, 9, 13, 2816, 2824, 2820, 2828, 2823, 2315] {
            let mut segment = good.clone();
            let batch = Batch::of(&segment, &mut target);
            assert_eq!(batch.decode(), Ok(()));
            segment[at] = 255;
            assert_eq!(batch.decode(), Err(LAUNCH_FAILED), "byte {at}");
        }
    }

    #[test]
    fn a_batch_has_one_to_32_segments_and_its_tiles_count_from_0() {
        let (segment, mut target) = (plain_segment(&[9, 9]), [0; 2 * TILE_ELEMENTS]);
        let batch = Batch::of(&segment, &mut target);
        assert_eq!((batch.blocks(), batch.decode()), (Some(1), Ok(())));
        for count in [0, 33] {
            let batch = Batch { count, ..batch };
            assert_eq!((batch.blocks(), batch.decode()), (None, Err(LAUNCH_FAILED)), "{count}");
        }
        for tiles in [[0, 1], [0, 3], [1, 3], [2, 0]] {
            let mut first_tile = batch.first_tile;
            first_tile[..2].copy_from_slice(&tiles);
            let batch = Batch { first_tile, ..batch };
            assert_eq!(batch.decode(), Err(LAUNCH_FAILED), "{tiles:?}");
        }
    }
}

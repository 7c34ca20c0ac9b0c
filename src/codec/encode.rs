//! Encodes raw elements as one segment.

use super::base::base;
use super::compress::Moves;
use super::layout::{ENTRY_BYTES, HEADER_BYTES, Layout, PLANES_BYTES};
use super::planes::{Codes, Planes, each_place};
use super::{ELEMENTS, Element, Groups, LANES, MOST_TILES};
use crate::units::index;

/// Appends the segment of `raw`, little-endian elements, to `out`, if it is a whole number of tiles
/// from 1 to [`MOST_TILES`]; appends nothing if not. Returns whether it did.
pub fn encode(element: Element, raw: &[u8], out: &mut Vec<u8>) -> bool {
    let tile_bytes = element.tile_bytes();
    let tiles = raw.len() / tile_bytes;
    if raw.len() % tile_bytes != 0 || !(1..=MOST_TILES).contains(&tiles) {
        return false;
    }
    let layout = Layout::new(element, tiles);
    let start = out.len();
    out.resize(start + layout.second, 0);
    let (front, table) = out[start..].split_at_mut(layout.table);
    let (front, planes) = front.split_at_mut(layout.planes);
    let (mut second, mut escapes) = (Second::default(), Vec::new());
    let (mut exponents, mut codes) = ([[0; 8]; ELEMENTS / 8], Codes::ZERO);
    let parts = front[HEADER_BYTES..].chunks_exact_mut(element.signs_bytes());
    let parts = parts.zip(planes.chunks_exact_mut(PLANES_BYTES));
    let parts = parts.zip(table.chunks_exact_mut(ENTRY_BYTES));
    for (raw, ((signs, planes), entry)) in raw.chunks_exact(tile_bytes).zip(parts) {
        element.split(raw, signs, exponents.as_flattened_mut());
        let base = base(element, &exponents);
        let base_and_escapes = u32::from(base) << 24 | number(escapes.len());
        write(entry, &[second.codes, base_and_escapes]);
        // One loop of each kind, so that the kind is asked for once.
        match element {
            Element::Bf16 => choose(&exponents, &mut codes, |e| Element::Bf16.above(e, base)),
            Element::Fp8 => choose(&exponents, &mut codes, |e| Element::Fp8.above(e, base)),
        }
        let tile = codes.gather();
        write(planes, tile.first.as_flattened());
        let escaping = tile.escaping();
        second.add(&tile);
        each_place(&escaping, |group, n| escapes.push(exponents[group][n]));
    }
    let at = layout.escapes(second.total());
    let end = layout.end(second.total(), escapes.len());
    write(&mut out[start..], &[element.magic(), number(tiles), number(layout.second), number(at)]);
    second.finish(out);
    out.resize(start + at, 0);
    out.extend_from_slice(&escapes);
    out.resize(start + end, 0);
    true
}

/// A size or count within a segment as it is written; each is below 2^25.
fn number(value: usize) -> u32 {
    u32::try_from(value).expect("sizes within a segment fit 32 bits")
}

/// Writes words, little-endian.
fn write(bytes: &mut [u8], words: &[u32]) {
    for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

/// The codes of all elements, by how far their exponents are above the base.
fn choose(exponents: &Groups, codes: &mut Codes, above: impl Fn(u8) -> u8) {
    let first = codes.first.as_flattened_mut().iter_mut();
    let each = first.zip(codes.second.as_flattened_mut()).zip(exponents.as_flattened());
    for ((first, second), &exponent) in each {
        let above = above(exponent);
        *first = above.wrapping_sub(4).min(3);
        *second = above.min(3).max(above.saturating_sub(3).min(7));
    }
}

/// The second-level codes so far.
#[derive(Default)]
struct Second {
    bytes: Vec<u8>,
    /// Bits of each plane that do not make a word yet.
    rest: [u64; 3],
    codes: u32,
}

impl Second {
    /// Adds the codes of a tile.
    fn add(&mut self, tile: &Planes) {
        let masks = tile.masks();
        let mut planes = tile.second;
        let moves = Moves::new(&masks);
        let mut counts = [0; LANES];
        for (count, mask) in counts.iter_mut().zip(&masks) {
            *count = mask.count_ones();
        }
        for plane in &mut planes {
            for (word, mask) in plane.iter_mut().zip(&masks) {
                *word &= mask;
            }
            moves.compress(plane);
        }
        // At most 32 groups become full; all of the room but theirs is never read.
        let mut groups = [[0_u32; 3]; 64];
        let (mut full, mut held, mut rest) = (0, self.codes % 32, self.rest);
        for lane in 0..LANES {
            for (rest, plane) in rest.iter_mut().zip(&planes) {
                *rest |= u64::from(plane[lane]) << held;
            }
            groups[full % 64] = rest.map(|rest| (rest & 0xffff_ffff) as u32);
            held += counts[lane];
            if held >= 32 {
                rest = rest.map(|rest| rest >> 32);
                full += 1;
                held -= 32;
            }
        }
        self.rest = rest;
        self.codes += counts.iter().sum::<u32>();
        for word in groups[..full].as_flattened() {
            self.bytes.extend_from_slice(&word.to_le_bytes());
        }
    }

    fn total(&self) -> usize {
        index(self.codes)
    }

    /// Appends all groups.
    fn finish(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.bytes);
        if self.codes % 32 > 0 {
            for word in self.rest {
                out.extend_from_slice(&word.to_le_bytes()[..4]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Random, encoded, normal, raw};
    use super::*;

    fn word(segment: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(segment[at..at + 4].try_into().expect("four bytes"))
    }

    /// Decodes as the format page says it, bit by bit.
    fn slow(segment: &[u8]) -> Vec<u8> {
        let [tiles, second_at, escapes_at] = [4, 8, 12].map(|at| index(word(segment, at)));
        let mut elements = vec![0_u16; tiles * 1024];
        let (mut rank, mut escaped) = (0, 0);
        let bit_of = |at: usize, bit: usize| word(segment, at) >> bit & 1;
        for tile in 0..tiles {
            let planes = 256 + 1024 * tiles + 256 * tile;
            let entry = 256 + 1280 * tiles + 8 * tile;
            assert_eq!(word(segment, entry), u32::try_from(rank).expect("32 bits"), "tile {tile}");
            assert_eq!(index(word(segment, entry + 4)) % (1 << 24), escaped, "tile {tile}");
            let base = u32::from(segment[entry + 7]);
            for lane in 0..32 {
                for bit in 0..32 {
                    let code =
                        bit_of(planes + 4 * lane, bit) | bit_of(planes + 128 + 4 * lane, bit) << 1;
                    let mut exponent = base + 4 + code;
                    if code == 3 {
                        let group = second_at + rank / 32 * 12;
                        let other: u32 =
                            (0..3).map(|n| bit_of(group + 4 * n, rank % 32) << n).sum();
                        rank += 1;
                        exponent = base + if other < 4 { other } else { other + 3 };
                        if other == 7 {
                            exponent = segment[escapes_at + escaped].into();
                            escaped += 1;
                        }
                    }
                    let (h, j, m) = (bit / 16, bit / 4 % 4, bit % 4);
                    let element = 1024 * tile + 256 * j + 8 * lane + 2 * m + h;
                    let sign = u16::from(segment[256 + element]);
                    let exponent = u16::try_from(exponent).expect("16 bits");
                    elements[element] = (sign & 0x80) << 8 | exponent << 7 | sign & 0x7f;
                }
            }
        }
        raw(elements)
    }

    #[test]
    fn what_is_encoded_is_what_the_format_page_says() {
        let mut random = Random(5);
        let bits: Vec<u8> = (0..2048 / 8).flat_map(|_| random.word().to_le_bytes()).collect();
        let low = raw((0..1024).map(|n| if n % 9 == 0 { n << 5 } else { 0x7f00 | n & 0x80ff }));
        let all = [normal(3, 2), bits, raw([0; 1024]), low, raw([0x3f80; 1024]), normal(2, 9)];
        let all = all.concat();
        assert_eq!(slow(&encoded(&all)), all);
    }

    #[test]
    fn the_last_group_may_have_any_number_of_codes() {
        for count in 0..70 {
            // So many elements have an exponent 3 above the base, the others are frequent.
            let exponent = |e: u16| if e % 10 == 0 && e < 10 * count { 119 } else { 120 + e % 3 };
            let raw = raw((0..1024).map(|e| exponent(e) << 7));
            let segment = encoded(&raw);
            assert_eq!(slow(&segment), raw, "{count} codes");
        }
    }

    #[test]
    fn sizes_are_those_of_the_format_page() {
        // All exponents are one of the frequent three: no second level but the groups of zeros.
        assert_eq!(encoded(&raw([0x3f80; 1024])).len(), 256 + 1024 + 256 + 256 + 256);
        // Exponent 0 has base 0, so each element has a second-level code: 32 groups and two.
        let zeros = encoded(&raw([0; 1024]));
        assert_eq!(zeros.len(), 256 + 1024 + 256 + 256 + (12_usize * 34).next_multiple_of(256));
    }

    #[test]
    fn a_tile_made_by_hand_has_its_fields_where_they_belong() {
        // Exponents 120, 121 and 122 are frequent, so the base is 116.
        let mut elements: [u16; 1024] = std::array::from_fn(|e| [120, 121, 122][e % 3] << 7);
        // Lane 2, j = 1, i = 5: bit 16 + 4 + 2 = 22. One below the base, so an escape.
        elements[256 + 16 + 5] = 0x8000 | 115 << 7 | 0x2a;
        // Lane 2, j = 0, i = 0: bit 0. d = 8, second-level code 5.
        elements[16] = 124 << 7;
        // Lane 31, j = 3, i = 7: bit 31. d = 1, second-level code 1.
        elements[1023] = 117 << 7 | 0x7f;
        let segment = encoded(&raw(elements));
        assert_eq!(segment.len(), 256 + 1024 + 256 + 256 + 256 + 256);
        assert_eq!(&segment[..4], b"DGW1");
        assert_eq!([4, 8, 12].map(|at| word(&segment, at)), [1, 1792, 2048]);
        assert_eq!(segment[16..256], [0; 240]);
        let signs = &segment[256..1280];
        assert_eq!((signs[277], signs[16], signs[1023]), (0xaa, 0, 0x7f));
        let plane = |n: usize, lane: usize| word(&segment, 1280 + 128 * n + 4 * lane);
        // Lane 0, i from 0, has elements 0 to 7, 256 to 263 and so on: codes e mod 3.
        let expected = |n: usize| {
            let bit = |j: usize, i: usize| 16 * (i % 2) + 4 * j + i / 2;
            let all = (0..4).flat_map(|j| (0..8).map(move |i| (j, i)));
            all.map(|(j, i)| u32::from((256 * j + i) % 3 == 1 + n) << bit(j, i)).sum::<u32>()
        };
        assert_eq!([plane(0, 0), plane(1, 0)], [expected(0), expected(1)]);
        for (lane, bit) in [(2, 22), (2, 0), (31, 31)] {
            assert_eq!([0, 1].map(|n| plane(n, lane) >> bit & 1), [1, 1], "lane {lane}");
        }
        let threes: u32 = (0..32).map(|lane| (plane(0, lane) & plane(1, lane)).count_ones()).sum();
        assert_eq!(threes, 3);
        // The table: rank 0, no escapes before, base 116.
        assert_eq!([word(&segment, 1536), word(&segment, 1540)], [0, 116 << 24]);
        assert_eq!(segment[1544..1792], [0; 248]);
        // The second level, in order of lane and bit: 5, 7, 1; a group of three words.
        assert_eq!([0, 4, 8].map(|n| word(&segment, 1792 + n)), [0b111, 0b010, 0b011]);
        assert_eq!(segment[1804..2048], [0; 244]);
        assert_eq!(segment[2048], 115);
        assert_eq!(segment[2049..], [0; 255]);
    }
}

//! Decodes a segment; the inverse of encoding. Reads nothing unchecked.

use super::compress::Moves;
use super::layout::{ENTRY_BYTES, GROUP_BYTES, HEADER_BYTES, Layout, PLANES_BYTES};
use super::planes::{Planes, each_place};
use super::{Element, Groups, LANES, MOST_TILES, Words};
use crate::units::index;

/// Bytes that are no encoded segment, or not the segment of so many raw bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// Raw bytes that no segment can have.
    #[error(
        "a segment decodes to 1 to {MOST_TILES} tiles of {tile} bytes, found room for {found} bytes"
    )]
    Raw {
        /// Raw bytes of a tile.
        tile: usize,
        /// The bytes there is room for.
        found: usize,
    },
    /// A part is not there as a whole.
    #[error("{part} of an encoded segment: {need} bytes needed, found {found}")]
    Short {
        /// The part.
        part: &'static str,
        /// The bytes it has at least.
        need: usize,
        /// The bytes that are there.
        found: usize,
    },
    /// A number is not what follows from the others.
    #[error("the {what} of an encoded segment must be {need:#x}, found {found:#x}")]
    Differs {
        /// The number.
        what: &'static str,
        /// What it has to be.
        need: usize,
        /// What it is.
        found: usize,
    },
}

/// Decodes exactly one segment of such elements to exactly its raw bytes.
///
/// # Errors
///
/// [`Malformed`], with anything in `raw`, if the segment contradicts itself or the size of `raw`.
/// One that does not may still hold other weights than were encoded: there is no checksum.
pub fn decode(element: Element, segment: &[u8], raw: &mut [u8]) -> Result<(), Malformed> {
    let (tile, found) = (element.tile_bytes(), raw.len());
    let tiles = found / tile;
    if found % tile != 0 || !(1..=MOST_TILES).contains(&tiles) {
        return Err(Malformed::Raw { tile, found });
    }
    let layout = Layout::new(element, tiles);
    let header = part(segment, "header", 0, HEADER_BYTES)?;
    let [magic, found_tiles, second_at, escapes_at] = words::<4>(header).map(index);
    same("magic number", index(element.magic()), magic)?;
    same("number of tiles", tiles, found_tiles)?;
    same("offset of the second level", layout.second, second_at)?;
    let signs = part(segment, "signs", HEADER_BYTES, layout.planes)?;
    let planes = part(segment, "planes", layout.planes, layout.table)?;
    let table = part(segment, "tile table", layout.table, layout.second)?;
    let second = part(segment, "second level", second_at, escapes_at.max(layout.escapes(0)))?;
    let escapes = part(segment, "escapes", escapes_at, segment.len())?;
    let mut rest = Rest { element, second, codes: 0, escapes, escaped: 0 };
    let parts = signs.chunks_exact(element.signs_bytes()).zip(planes.chunks_exact(PLANES_BYTES));
    let parts = parts.zip(table.chunks_exact(ENTRY_BYTES));
    for (raw, ((signs, planes), entry)) in raw.chunks_exact_mut(tile).zip(parts) {
        let [rank, base_and_escapes] = words::<2>(entry);
        same("rank of a tile", rest.codes, index(rank))?;
        same("escapes before a tile", rest.escaped, index(base_and_escapes & 0x00ff_ffff))?;
        let base = (base_and_escapes >> 24) as u8;
        let exponents = rest.exponents(planes, base)?;
        element.join(signs, exponents.as_flattened(), raw);
    }
    same("offset of the escapes", layout.escapes(rest.codes), escapes_at)?;
    same("size", layout.end(rest.codes, rest.escaped), segment.len())
}

/// The bytes from one offset to another.
fn part<'a>(
    segment: &'a [u8],
    part: &'static str,
    start: usize,
    end: usize,
) -> Result<&'a [u8], Malformed> {
    let found = segment.len().saturating_sub(start);
    let short = Malformed::Short { part, need: end.saturating_sub(start), found };
    segment.get(start..end).ok_or(short)
}

/// Refuses a number that is not what it has to be.
fn same(what: &'static str, need: usize, found: usize) -> Result<(), Malformed> {
    if need == found { Ok(()) } else { Err(Malformed::Differs { what, need, found }) }
}

/// The first words, little-endian; zeros where there are none.
pub(super) fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    words
}

/// What is read from the start to the end, and how far it is.
struct Rest<'a> {
    element: Element,
    second: &'a [u8],
    codes: usize,
    escapes: &'a [u8],
    escaped: usize,
}

impl Rest<'_> {
    /// The exponents of the next tile.
    fn exponents(&mut self, planes: &[u8], base: u8) -> Result<Groups, Malformed> {
        let planes: [u32; 2 * LANES] = words(planes);
        let first = [0, LANES].map(|n| std::array::from_fn(|lane| planes[n + lane]));
        let mut planes = Planes { first, second: [[0; LANES]; 3] };
        planes.second = self.second(&planes.masks())?;
        let codes = planes.scatter();
        let (mut exponents, bits) = (codes.first, self.element.exponent_bits());
        let each = exponents.as_flattened_mut().iter_mut().zip(codes.second.as_flattened());
        for (byte, &second) in each {
            let other = if second < 4 { second } else { second + 3 };
            *byte = base.wrapping_add(if *byte < 3 { *byte + 4 } else { other }) & bits;
        }
        self.put_escapes(&planes.escaping(), &mut exponents)?;
        Ok(exponents)
    }

    /// The next second-level codes, at the places that the masks have; elsewhere anything.
    fn second(&mut self, masks: &Words) -> Result<[Words; 3], Malformed> {
        let mut planes = [[0; LANES]; 3];
        for (lane, mask) in masks.iter().enumerate() {
            let start = self.codes / 32 * GROUP_BYTES;
            // The part of the second level ends with groups that no code is in.
            let end = start + 2 * GROUP_BYTES;
            let (part, need, found) = ("second level", end, self.second.len());
            let six = self.second.get(start..end);
            let six = six.ok_or(Malformed::Short { part, need, found })?;
            let six = words::<6>(six);
            for (n, plane) in planes.iter_mut().enumerate() {
                let both = u64::from(six[n]) | u64::from(six[n + 3]) << 32;
                plane[lane] = (both >> (self.codes % 32) & 0xffff_ffff) as u32;
            }
            self.codes += index(mask.count_ones());
        }
        let moves = Moves::new(masks);
        for plane in &mut planes {
            moves.expand(plane);
        }
        Ok(planes)
    }

    /// Puts the next escapes at the places whose bits are set.
    fn put_escapes(&mut self, escaping: &Words, exponents: &mut Groups) -> Result<(), Malformed> {
        let count: u32 = escaping.iter().map(|bits| bits.count_ones()).sum();
        let end = self.escaped + index(count);
        let (part, need, found) = ("escapes", end, self.escapes.len());
        let escapes = self.escapes.get(self.escaped..end);
        let mut escapes = escapes.ok_or(Malformed::Short { part, need, found })?.iter();
        each_place(escaping, |group, n| {
            if let Some(&escape) = escapes.next() {
                exponents[group][n] = escape;
            }
        });
        self.escaped = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Random, encoded, normal};
    use super::*;

    fn decode(segment: &[u8], raw: &mut [u8]) -> Result<(), Malformed> {
        super::decode(Element::Bf16, segment, raw)
    }

    /// Weights with escapes, and their segment.
    fn sample() -> (Vec<u8>, Vec<u8>) {
        let raw = normal(3, 21);
        let segment = encoded(&raw);
        (raw, segment)
    }

    fn put(segment: &mut [u8], at: usize, value: u32) {
        segment[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn get(segment: &[u8], at: usize) -> u32 {
        words::<1>(&segment[at..])[0]
    }

    #[test]
    fn what_is_cut_short_or_has_more_is_refused() {
        let (mut raw, mut segment) = sample();
        for end in (0..segment.len()).step_by(64).chain([segment.len() - 1]) {
            decode(&segment[..end], &mut raw).expect_err("a part is missing");
        }
        assert_eq!(
            decode(&segment[..1000], &mut raw).expect_err("no signs").to_string(),
            "signs of an encoded segment: 3072 bytes needed, found 744"
        );
        decode(&segment, &mut raw).expect("whole");
        segment.extend_from_slice(&[0; 256]);
        decode(&segment, &mut raw).expect_err("256 bytes too many");
    }

    #[test]
    fn raw_bytes_of_another_size_are_refused() {
        let (raw, segment) = sample();
        for bytes in [0, 2047, 2048, raw.len() - 1, raw.len() + 2048, 2048 * 8193] {
            decode(&segment, &mut vec![0; bytes]).expect_err("another size");
        }
        let error = decode(&segment, &mut vec![0; 4096]).expect_err("two tiles");
        let (what, need, found) = ("number of tiles", 2, 3);
        assert_eq!(error, Malformed::Differs { what, need, found });
        let error = decode(&segment, &mut [0; 1024]).expect_err("half a tile").to_string();
        assert_eq!(
            error,
            "a segment decodes to 1 to 8192 tiles of 2048 bytes, found room for 1024 bytes"
        );
    }

    #[test]
    fn weights_of_another_kind_are_refused() {
        let (raw, segment) = sample();
        let fp8 = super::decode(Element::Fp8, &segment, &mut vec![0; raw.len() / 2]);
        let (what, need, found) = ("magic number", 0x3146_4744, 0x3157_4744);
        assert_eq!(fp8, Err(Malformed::Differs { what, need, found }));
    }

    #[test]
    fn wrong_numbers_in_header_and_table_are_refused() {
        let (mut raw, segment) = sample();
        let table = 256 + 3 * 1280;
        let end = u32::try_from(segment.len()).expect("small");
        for at in [0, 4, 8, 12, table, table + 4, table + 8, table + 12, table + 20] {
            let right = get(&segment, at);
            let other = [0, 1, 1 << 24, end, end + 256, 0x00ff_ff00, 0xffff_ff00, u32::MAX];
            let near = [256, 1_u32.wrapping_neg(), 256_u32.wrapping_neg()];
            let near = near.map(|by| right.wrapping_add(by));
            for value in other.into_iter().chain(near) {
                // The base, in the high byte of a table's second word, is never wrong.
                let base = at > 12 && at % 8 == 4;
                if value == right || base && value << 8 == right << 8 {
                    continue;
                }
                let mut wrong = segment.clone();
                put(&mut wrong, at, value);
                decode(&wrong, &mut raw).expect_err(&format!("{value:#x} at {at}"));
            }
        }
        let mut wrong = segment.clone();
        put(&mut wrong, 8, 0);
        let (what, need, found) = ("offset of the second level", table + 256, 0);
        let error = decode(&wrong, &mut raw).expect_err("the second level is not there");
        assert_eq!(error, Malformed::Differs { what, need, found });
        let mut wrong = segment;
        put(&mut wrong, 0, 0);
        assert_eq!(
            decode(&wrong, &mut raw).expect_err("no magic number").to_string(),
            "the magic number of an encoded segment must be 0x31574744, found 0x0"
        );
    }

    #[test]
    fn more_codes_or_escapes_than_there_are_are_refused() {
        let (mut raw, segment) = sample();
        let mut wrong = segment.clone();
        // The last tile says that each of its elements has a second-level code.
        wrong[256 + 3 * 1024 + 512..256 + 3 * 1280].fill(0xff);
        let error = decode(&wrong, &mut raw).expect_err("too few codes").to_string();
        assert!(error.starts_with("second level of an encoded segment: "), "{error}");
        let mut wrong = segment;
        let [second, escapes] = [8, 12].map(|at| index(get(&wrong, at)));
        // Its codes say that they are all escapes.
        let last = index(get(&wrong, 256 + 3 * 1280 + 16)) / 32 * 12 + 12;
        wrong[second + last..escapes].fill(0xff);
        let error = decode(&wrong, &mut raw).expect_err("too few escapes").to_string();
        assert!(error.starts_with("escapes of an encoded segment: "), "{error}");
    }

    #[test]
    fn nothing_that_is_changed_makes_it_panic() {
        let (raw, segment) = sample();
        let (mut random, mut refused, mut found) = (Random(77), 0, raw.clone());
        for _ in 0..2000 {
            let mut changed = segment.clone();
            for _ in 0..=random.below(4) {
                let at = random.below(changed.len());
                // Half of the changes where the numbers are.
                let at = if random.below(2) == 0 { at } else { at % 16 + 3840 * random.below(2) };
                changed[at.min(segment.len() - 1)] ^= 1 << random.below(8);
            }
            if random.below(4) == 0 {
                changed.truncate(random.below(changed.len()));
            }
            match decode(&changed, &mut found) {
                Ok(()) => {}
                Err(_) => refused += 1,
            }
        }
        assert!((500..2000).contains(&refused), "{refused} of 2000");
        for bytes in [0, 16, 256, 8192] {
            let noise: Vec<u8> = (0..bytes).map(|_| random.word().to_le_bytes()[3]).collect();
            decode(&noise, &mut found).expect_err("noise");
        }
        decode(&segment, &mut found).expect("unchanged");
        assert_eq!(found, raw);
    }
}

//! Streams: bf16 weights of any size as bytes that say themselves what they are. Pure;
//! `docs/encoded-format.md` decides.

use super::decode::words;
use super::layout::{Layout, padded};
use super::{Element, MOST_TILES, Malformed, SEGMENT_BYTES};
use super::{decode as decode_segment, encode as encode_segment, most_encoded_bytes};
use crate::units::index;

/// What all streams are of.
const ELEMENT: Element = Element::Bf16;
const TILE_BYTES: usize = ELEMENT.tile_bytes();
/// The first four bytes, "DGWS".
const MAGIC: u32 = 0x5357_4744;
/// The only version there is.
const VERSION: u32 = 1;
/// Bytes before the table.
const HEADER_BYTES: usize = 24;
/// Bytes of one segment in the table.
const ENTRY_BYTES: usize = 8;

/// Bytes that are no stream, or not the stream of so many elements; weights that make none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadStream {
    /// Half an element.
    #[error("bf16 weights have two bytes for each element, found {0} bytes")]
    Odd(usize),
    /// No memory to encode in.
    #[error("encoding needs {0} bytes of memory, and the system does not give them")]
    Memory(usize),
    /// It is the stream of another tensor.
    #[error("{asked} elements were asked for, found an encoded stream of {found}")]
    Elements {
        /// What was asked for.
        asked: u64,
        /// What the stream has.
        found: u64,
    },
    /// A part is not there as a whole.
    #[error("{part} of an encoded stream: {need} bytes needed, found {found}")]
    Short {
        /// The part.
        part: &'static str,
        /// The bytes it has.
        need: u64,
        /// The bytes that are there.
        found: usize,
    },
    /// A number is not what it has to be.
    #[error("the {what} of an encoded stream must be {need:#x}, found {found:#x}")]
    Differs {
        /// The number.
        what: &'static str,
        /// What it has to be.
        need: u64,
        /// What it is.
        found: u64,
    },
    /// A segment with sizes that none can have.
    #[error(
        "segment {number} of an encoded stream must have 1 to {MOST_TILES} tiles of {TILE_BYTES} \
         bytes, as they are or in fewer bytes, found {raw} raw bytes in {held}"
    )]
    Sizes {
        /// Its number, from 0.
        number: usize,
        /// Raw bytes.
        raw: usize,
        /// Bytes in the stream.
        held: usize,
    },
    /// An encoded segment contradicts itself.
    #[error("segment {number} of an encoded stream: {why}")]
    Segment {
        /// Its number, from 0.
        number: usize,
        /// What is wrong with it.
        why: Malformed,
    },
}

/// The stream of `raw`, little-endian bf16.
///
/// # Errors
///
/// [`BadStream`], if a byte is over or there is no memory.
pub fn encode(raw: &[u8]) -> Result<Vec<u8>, BadStream> {
    cut(raw, SEGMENT_BYTES)
}

/// The stream with segments of so many raw bytes, whole tiles.
fn cut(raw: &[u8], segment_bytes: usize) -> Result<Vec<u8>, BadStream> {
    if raw.len() % 2 != 0 {
        return Err(BadStream::Odd(raw.len()));
    }
    let (tiles, rest) = raw.split_at(raw.len() / TILE_BYTES * TILE_BYTES);
    let segments = tiles.chunks(segment_bytes);
    let front = padded(HEADER_BYTES + ENTRY_BYTES * segments.len());
    // None is longer than its raw bytes when the next begins.
    let most = front.saturating_add(raw.len());
    let most = most.saturating_add(most_encoded_bytes(ELEMENT, segment_bytes.min(tiles.len())));
    let mut out = Vec::new();
    out.try_reserve_exact(most).map_err(|_| BadStream::Memory(most))?;
    out.extend_from_slice(&MAGIC.to_le_bytes());
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&((raw.len() / 2) as u64).to_le_bytes());
    out.extend_from_slice(&(segments.len() as u64).to_le_bytes());
    out.resize(front, 0);
    for (number, segment) in segments.enumerate() {
        let start = out.len();
        if !encode_segment(ELEMENT, segment, &mut out) || out.len() - start >= segment.len() {
            out.truncate(start);
            out.extend_from_slice(segment);
        }
        let sizes = [segment.len(), out.len() - start].map(size).map(u32::to_le_bytes);
        let entry = HEADER_BYTES + ENTRY_BYTES * number;
        out[entry..entry + ENTRY_BYTES].copy_from_slice(sizes.as_flattened());
    }
    out.extend_from_slice(rest);
    Ok(out)
}

/// A size of a segment as it is written.
fn size(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a segment has at most 16 MiB")
}

/// A stream whose sizes all fit each other.
#[derive(Debug, Clone, Copy)]
pub struct Stream<'a> {
    elements: u64,
    table: &'a [u8],
    /// Segments and rest.
    body: &'a [u8],
}

impl<'a> Stream<'a> {
    /// Checks all but the insides of the segments. Then the weights have less than twice the bytes
    /// of the stream, and it is safe to take memory for them.
    ///
    /// # Errors
    ///
    /// [`BadStream`], if this is not the stream of so many elements.
    pub fn new(bytes: &'a [u8], elements: u64) -> Result<Self, BadStream> {
        let found = bytes.len();
        let short = |part, need| BadStream::Short { part, need, found };
        let header = bytes.get(..HEADER_BYTES);
        let header = header.ok_or_else(|| short("header", HEADER_BYTES as u64))?;
        let [magic, version, counts @ ..] = words::<6>(header).map(u64::from);
        same("magic number", MAGIC.into(), magic)?;
        same("version", VERSION.into(), version)?;
        let [of, segments] = [0, 2].map(|at| counts[at] | counts[at + 1] << 32);
        if of != elements {
            return Err(BadStream::Elements { asked: elements, found: of });
        }
        let entries = segments.saturating_mul(ENTRY_BYTES as u64);
        let entries_end = entries.saturating_add(HEADER_BYTES as u64);
        let table_end = usize::try_from(entries_end).ok().filter(|end| *end <= found);
        let table_end = table_end.ok_or_else(|| short("table", entries_end))?;
        let start = padded(table_end);
        let zeros = bytes.get(table_end..start).ok_or_else(|| short("table", start as u64))?;
        let other = zeros.iter().find(|byte| **byte != 0);
        same("padding of the table", 0, other.copied().unwrap_or(0).into())?;
        let stream =
            Self { elements, table: &bytes[HEADER_BYTES..table_end], body: &bytes[start..] };
        let (mut raw_end, mut held_end) = (0_u64, start as u64);
        for (number, (raw, held)) in stream.sizes().enumerate() {
            let tiles = raw / TILE_BYTES;
            let whole = raw % TILE_BYTES == 0 && (1..=MOST_TILES).contains(&tiles);
            let least = Layout::new(ELEMENT, tiles).end(0, 0);
            let encoded = held % 256 == 0 && (least..raw).contains(&held);
            if !whole || !(held == raw || encoded) {
                return Err(BadStream::Sizes { number, raw, held });
            }
            raw_end = raw_end.saturating_add(raw as u64);
            held_end = held_end.saturating_add(held as u64);
        }
        let tile = TILE_BYTES as u64;
        same("raw bytes of all segments", (elements / (tile / 2)).saturating_mul(tile), raw_end)?;
        same("size", held_end.saturating_add(2 * (elements % (tile / 2))), found as u64)?;
        Ok(stream)
    }

    /// Writes exactly the raw bytes.
    ///
    /// # Errors
    ///
    /// [`BadStream`], with anything in `raw`, if that has another size or a segment is malformed.
    pub fn decode(&self, raw: &mut [u8]) -> Result<(), BadStream> {
        same("raw bytes", self.elements.saturating_mul(2), raw.len() as u64)?;
        let (mut body, mut left) = (self.body, raw);
        for (number, (raw_bytes, held_bytes)) in self.sizes().enumerate() {
            let (held, after) = body.split_at(held_bytes);
            let (raw, raw_after) = left.split_at_mut(raw_bytes);
            (body, left) = (after, raw_after);
            if held.len() == raw.len() {
                raw.copy_from_slice(held);
            } else {
                let segment = |why| BadStream::Segment { number, why };
                decode_segment(ELEMENT, held, raw).map_err(segment)?;
            }
        }
        left.copy_from_slice(body);
        Ok(())
    }

    /// Of each segment the raw bytes and those in the stream.
    fn sizes(&self) -> impl Iterator<Item = (usize, usize)> + use<'a> {
        let entries = self.table.chunks_exact(ENTRY_BYTES);
        entries.map(|entry| words::<2>(entry).map(index).into())
    }
}

/// Refuses a number that is not what it has to be.
fn same(what: &'static str, need: u64, found: u64) -> Result<(), BadStream> {
    if need == found { Ok(()) } else { Err(BadStream::Differs { what, need, found }) }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Random, normal};
    use super::*;

    fn decoded(stream: &[u8], elements: u64) -> Result<Vec<u8>, BadStream> {
        let stream = Stream::new(stream, elements)?;
        let mut raw = vec![0xa5; index(2 * elements)];
        stream.decode(&mut raw).map(|()| raw)
    }

    /// Weights with each kind of part: encoded segments, one kept as it is, a rest.
    fn sample() -> (u64, Vec<u8>, Vec<u8>) {
        let mut raw = normal(10, 31);
        let mut random = Random(32);
        raw[4 * TILE_BYTES..8 * TILE_BYTES].fill_with(|| random.word().to_le_bytes()[5]);
        raw.truncate(raw.len() - 500);
        let stream = cut(&raw, 4 * TILE_BYTES).expect("memory");
        (raw.len() as u64 / 2, raw, stream)
    }

    #[test]
    fn any_number_of_elements_comes_back() {
        for elements in [0, 1, 2, 1023, 1024, 1025, 5 * 1024 - 1] {
            let mut raw = normal(5, 11);
            raw.truncate(2 * elements);
            let stream = encode(&raw).expect("memory");
            assert_eq!(decoded(&stream, elements as u64).expect("whole"), raw);
            assert!(stream.len() <= 256 + raw.len());
        }
    }

    #[test]
    fn segments_are_cut_as_the_engine_cuts_tensors() {
        let tile = normal(1, 12);
        let raw = [tile.repeat(SEGMENT_BYTES / TILE_BYTES + 3), vec![1, 2, 3, 4]].concat();
        let stream = encode(&raw).expect("memory");
        let parts = Stream::new(&stream, raw.len() as u64 / 2).expect("whole");
        let raws: Vec<_> = parts.sizes().map(|(raw, _)| raw).collect();
        assert_eq!(raws, [SEGMENT_BYTES, 3 * TILE_BYTES]);
        assert!(stream.len() < raw.len() * 3 / 4);
        assert!(decoded(&stream, raw.len() as u64 / 2).expect("whole") == raw);
    }

    #[test]
    fn a_stream_is_laid_out_as_the_page_says() {
        let (elements, raw, stream) = sample();
        assert_eq!(&stream[..4], b"DGWS");
        let numbers = words::<5>(&stream[4..]);
        assert_eq!(numbers, [1, size(index(elements)), 0, 3, 0]);
        let sizes = words::<6>(&stream[24..]);
        let [first, third] = [0, 8].map(|tile| {
            let mut segment = Vec::new();
            let end = if tile == 0 { 4 } else { 9 } * TILE_BYTES;
            assert!(encode_segment(ELEMENT, &raw[tile * TILE_BYTES..end], &mut segment));
            segment
        });
        // The third, one tile, would not become smaller.
        assert!(third.len() >= TILE_BYTES);
        assert_eq!(sizes, [8192, size(first.len()), 8192, 8192, 2048, 2048]);
        assert_eq!(stream[48..256], [0; 208]);
        assert_eq!(stream[256..], [&first, &raw[4 * TILE_BYTES..]].concat());
    }

    #[test]
    fn random_bits_grow_by_the_front_alone() {
        let mut random = Random(13);
        let raw: Vec<u8> =
            (0..20 * TILE_BYTES + 6).map(|_| random.word().to_le_bytes()[2]).collect();
        assert_eq!(encode(&raw).expect("memory").len(), 256 + raw.len());
        let stream = cut(&raw, 2 * TILE_BYTES).expect("memory");
        assert_eq!(stream[256..], raw);
        assert_eq!(decoded(&stream, raw.len() as u64 / 2).expect("whole"), raw);
    }

    #[test]
    fn half_an_element_and_another_number_of_elements_are_refused() {
        let error = encode(&[1, 2, 3]).expect_err("odd").to_string();
        assert_eq!(error, "bf16 weights have two bytes for each element, found 3 bytes");
        let (elements, raw, stream) = sample();
        for asked in [0, 1, elements - 1, elements + 1, 1 << 62, u64::MAX] {
            let error = Stream::new(&stream, asked).expect_err("another number");
            assert_eq!(error, BadStream::Elements { asked, found: elements });
        }
        let right = Stream::new(&stream, elements).expect("whole");
        for bytes in [0, raw.len() - 1, raw.len() + 2] {
            right.decode(&mut vec![0; bytes]).expect_err("another size");
        }
    }

    #[test]
    fn what_is_cut_short_or_has_more_is_refused() {
        let (elements, _, mut stream) = sample();
        for end in 0..stream.len() {
            Stream::new(&stream[..end], elements).expect_err("a part is missing");
        }
        let error = |end| Stream::new(&stream[..end], elements).expect_err("short").to_string();
        assert_eq!(error(23), "header of an encoded stream: 24 bytes needed, found 23");
        assert_eq!(error(47), "table of an encoded stream: 48 bytes needed, found 47");
        assert_eq!(error(48), "table of an encoded stream: 256 bytes needed, found 48");
        stream.push(0);
        Stream::new(&stream, elements).expect_err("a byte too many");
    }

    #[test]
    fn wrong_numbers_in_the_front_are_refused() {
        let (elements, _, stream) = sample();
        for at in (0..256).step_by(4) {
            let [right] = words(&stream[at..]);
            let near = [1, 256, 2048, 1_u32.wrapping_neg(), 256_u32.wrapping_neg()];
            let near = near.map(|by| right.wrapping_add(by));
            for value in near.into_iter().chain([0, 1 << 24, 1 << 31, u32::MAX]) {
                let mut wrong = stream.clone();
                wrong[at..at + 4].copy_from_slice(&value.to_le_bytes());
                if value != right {
                    let refused = decoded(&wrong, elements).is_err();
                    assert!(refused, "{value:#x} at {at}");
                }
            }
        }
    }

    #[test]
    fn a_header_alone_takes_no_memory() {
        // As many elements and segments as can be said.
        for (elements, segments) in [(1 << 60, 1 << 50), (u64::MAX, u64::MAX), (1023, 0), (1024, 0)]
        {
            let mut stream = encode(&[]).expect("memory");
            stream[8..16].copy_from_slice(&u64::to_le_bytes(elements));
            stream[16..24].copy_from_slice(&u64::to_le_bytes(segments));
            Stream::new(&stream, elements).expect_err("nothing is there");
        }
    }

    #[test]
    fn nothing_that_is_changed_makes_it_panic() {
        let (elements, raw, stream) = sample();
        let (mut random, mut refused) = (Random(78), 0);
        for _ in 0..2000 {
            let mut changed = stream.clone();
            for _ in 0..=random.below(4) {
                let at = random.below(changed.len());
                // Two thirds of the changes in the front and in the header of the first segment.
                let at = [at, at % 48, 256 + at % 16][random.below(3)];
                changed[at] ^= 1 << random.below(8);
            }
            if random.below(4) == 0 {
                changed.truncate(random.below(changed.len()));
            }
            match decoded(&changed, elements) {
                Ok(found) => assert_eq!(found.len(), raw.len()),
                Err(_) => refused += 1,
            }
        }
        assert!((1000..2000).contains(&refused), "{refused} of 2000");
        assert_eq!(decoded(&stream, elements).expect("unchanged"), raw);
    }
}

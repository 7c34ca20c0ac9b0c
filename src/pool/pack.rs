//! What goes into a staging chunk together: neighbours in a file are read at once, whichever
//! tensors they belong to. Pure.

use crate::driver::host::shim::SECTOR_BYTES;
use crate::driver::{H2d, Source};

/// Bytes between two neighbours that are read rather than skipped: less than a read of its own
/// costs.
const MOST_GAP: u64 = 32 << 10;
/// Memory is copied from any place; whole cache lines are copied fastest.
const LINE_BYTES: u64 = 64;

/// One copy that has to be staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The copy.
    pub copy: H2d,
    /// The tensor that it is of, and its first byte within that.
    pub part_of: (u32, u64),
}

/// A stretch of a source that is read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// First byte.
    pub source: Source,
    /// Where it goes within the chunk. Of a file, the place within a sector is the one that it has
    /// there, and the sector behind it is free, for reads of whole sectors.
    pub at: u64,
    /// Size.
    pub bytes: u64,
}

/// What one chunk is filled with, and the copies out of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fill {
    /// What is read.
    pub reads: Vec<Read>,
    /// The pieces that arrive, with the place of each within the chunk.
    pub pieces: Vec<(u64, Piece)>,
}

impl Fill {
    /// The copies out of a chunk at `address`; neighbours of one read are one copy.
    pub fn copies(&self, address: u64) -> Vec<H2d> {
        let mut copies: Vec<H2d> = Vec::with_capacity(self.pieces.len());
        let mut last_source = None;
        for (at, piece) in &self.pieces {
            let next = H2d { source: Source::Memory { address: address + at }, ..piece.copy };
            let filed = matches!(piece.copy.source, Source::File { .. });
            let follows = filed && last_source == Some(piece.copy.source);
            last_source = Some(piece.copy.source.advanced(piece.copy.bytes));
            match copies.last_mut() {
                Some(last) if follows && last.meets(&next) => last.bytes += next.bytes,
                _ => copies.push(next),
            }
        }
        copies
    }

    /// Bytes that are read.
    pub fn bytes(&self) -> u64 {
        self.reads.iter().map(|read| read.bytes).sum()
    }
}

/// Packs pieces, whose order does not matter, into chunks of `chunk_bytes` bytes, a multiple of
/// [`SECTOR_BYTES`].
pub fn pack(mut pieces: Vec<Piece>, chunk_bytes: u64) -> Vec<Fill> {
    pieces.sort_by_key(|piece| (place(piece.copy.source), piece.copy.target));
    let mut fills = Vec::new();
    let mut fill = Fill::default();
    for mut piece in pieces {
        loop {
            let source = piece.copy.source;
            let joined = fill.reads.last().and_then(|last| behind(last, source));
            let at = joined.unwrap_or_else(|| next_place(&fill, source));
            let room = chunk_bytes.saturating_sub(at);
            let bytes = piece.copy.bytes.min(room);
            // A little of a piece is not worth a copy of its own.
            let little = bytes < piece.copy.bytes.min(chunk_bytes / 4);
            if bytes == 0 || (little && !fill.reads.is_empty()) {
                fills.push(std::mem::take(&mut fill));
                continue;
            }
            match (joined, fill.reads.last_mut()) {
                // Tensors may share bytes: what is there already is not read again.
                (Some(at), Some(last)) => last.bytes = last.bytes.max(at + bytes - last.at),
                _ => fill.reads.push(Read { source, at, bytes }),
            }
            let part = Piece { copy: H2d { bytes, ..piece.copy }, ..piece };
            fill.pieces.push((at, part));
            if bytes == piece.copy.bytes {
                break;
            }
            let copy = H2d {
                source: source.advanced(bytes),
                target: piece.copy.target + bytes,
                bytes: piece.copy.bytes - bytes,
            };
            piece = Piece { copy, part_of: (piece.part_of.0, piece.part_of.1 + bytes) };
            fills.push(std::mem::take(&mut fill));
        }
    }
    if !fill.reads.is_empty() {
        fills.push(fill);
    }
    fills
}

/// Files by number, then memory; each by the place in it.
fn place(source: Source) -> (u64, u64) {
    match source {
        Source::File { file, offset } => (u64::from(file), offset),
        Source::Memory { address } | Source::Encoded { address, .. } => (u64::MAX, address),
    }
}

/// Where `source` lies in the chunk, if it is within or soon behind what `read` reads. Each tensor
/// in memory is copied alone: a call of its own costs nothing there.
fn behind(read: &Read, source: Source) -> Option<u64> {
    let (kind, start) = place(read.source);
    let (other, next) = place(source);
    let filed = matches!(source, Source::File { .. });
    let near = filed && kind == other && next >= start && next - start <= read.bytes + MOST_GAP;
    near.then(|| read.at + (next - start))
}

/// The first free place in the chunk at which `source` may lie.
fn next_place(fill: &Fill, source: Source) -> u64 {
    let end = fill.reads.last().map_or(0, |last| match last.source {
        Source::File { .. } => (last.at + last.bytes).next_multiple_of(SECTOR_BYTES),
        Source::Memory { .. } | Source::Encoded { .. } => {
            (last.at + last.bytes).next_multiple_of(LINE_BYTES)
        }
    });
    match source {
        Source::File { offset, .. } => end.next_multiple_of(SECTOR_BYTES) + offset % SECTOR_BYTES,
        Source::Memory { .. } | Source::Encoded { .. } => end,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(tensor: u32, offset: u64, target: u64, bytes: u64) -> Piece {
        let source = Source::File { file: 0, offset };
        Piece { copy: H2d { source, target, bytes }, part_of: (tensor, 0) }
    }

    #[test]
    fn neighbours_of_a_file_are_one_read_whatever_their_order() {
        let pieces =
            vec![piece(2, 5300, 2048, 1000), piece(0, 4300, 1024, 700), piece(1, 5000, 1724, 300)];
        let fills = pack(pieces, 1 << 16);
        let source = Source::File { file: 0, offset: 4300 };
        assert_eq!(fills.len(), 1);
        assert_eq!(fills[0].reads, [Read { source, at: 4300 - 4096, bytes: 2000 }]);
        let copies = fills[0].copies(1 << 20);
        let spans: Vec<(u64, u64)> = copies.iter().map(|copy| (copy.target, copy.bytes)).collect();
        assert_eq!(spans, [(1024, 1000), (2048, 1000)], "two of them meet in the arena as well");
        assert_eq!(copies[1].source, Source::Memory { address: (1 << 20) + 204 + 1000 });
    }

    #[test]
    fn small_gaps_are_read_and_large_ones_skipped() {
        let near = vec![piece(0, 0, 0, 100), piece(1, 30_000, 256, 100)];
        assert_eq!(pack(near, 1 << 16)[0].reads.len(), 1);
        let far = vec![piece(0, 0, 0, 100), piece(1, 300_000, 256, 100)];
        let fills = pack(far, 1 << 16);
        assert_eq!(fills.len(), 1, "in one chunk all the same");
        assert_eq!(fills[0].reads.len(), 2);
        assert_eq!(fills[0].reads[1].at % 4096, 300_000 % 4096);
    }

    /// Any pieces: each byte arrives once, from its place, inside of the chunk, and no read of
    /// whole sectors touches what another read wrote.
    #[test]
    fn every_byte_has_its_place() {
        let mut random = 11_u64;
        let mut below = |limit: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % limit
        };
        for _ in 0..2000 {
            let chunk_bytes = 4096 * (1 + below(8));
            let (mut offset, mut target) = (0, 0);
            let mut pieces = Vec::new();
            for tensor in 0..8 {
                offset += [0, 0, 7, 5000, 100_000][usize::try_from(below(5)).expect("small")];
                let bytes = 1 + below(20_000);
                let source = if below(4) == 0 {
                    Source::Memory { address: (1 << 40) + offset }
                } else {
                    Source::File { file: 0, offset }
                };
                let copy = H2d { source, target, bytes };
                pieces.push(Piece { copy, part_of: (tensor, 0) });
                offset += bytes;
                target += bytes.next_multiple_of(256);
            }
            let fills = pack(pieces.clone(), chunk_bytes);
            for fill in &fills {
                let mut free = 0;
                for read in &fill.reads {
                    let (mut start, mut end) = (read.at, read.at + read.bytes);
                    if let Source::File { offset, .. } = read.source {
                        assert_eq!(offset % 4096, read.at % 4096);
                        (start, end) = (start / 4096 * 4096, end.next_multiple_of(4096));
                    }
                    assert!(start >= free && end <= chunk_bytes, "{fill:?}");
                    free = end;
                }
                for (at, piece) in &fill.pieces {
                    let inside = fill.reads.iter().any(|read| {
                        (behind(read, piece.copy.source) == Some(*at)
                            || read.source == piece.copy.source)
                            && at + piece.copy.bytes <= read.at + read.bytes
                    });
                    assert!(inside, "{piece:?} in {fill:?}");
                }
                let copied: u64 = fill.copies(0).iter().map(|copy| copy.bytes).sum();
                assert_eq!(copied, fill.pieces.iter().map(|(_, p)| p.copy.bytes).sum::<u64>());
            }
            for whole in pieces {
                let parts = fills.iter().flat_map(|fill| &fill.pieces);
                let mut next = 0;
                for (_, part) in parts.filter(|(_, part)| part.part_of.0 == whole.part_of.0) {
                    assert_eq!(part.part_of.1, next);
                    assert_eq!(part.copy.source, whole.copy.source.advanced(next));
                    assert_eq!(part.copy.target, whole.copy.target + next);
                    next += part.copy.bytes;
                }
                assert_eq!(next, whole.copy.bytes);
            }
        }
    }
}

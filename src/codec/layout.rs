//! Where the parts of a segment are.

use super::{ELEMENTS, Element, LANES};

/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = 256;
/// Bytes of the planes of one tile.
pub(super) const PLANES_BYTES: usize = 2 * 4 * LANES;
/// Bytes of one tile in the table.
pub(super) const ENTRY_BYTES: usize = 8;
/// Bytes of 32 second-level codes.
pub(super) const GROUP_BYTES: usize = 12;
/// Groups of zeros that end the second level.
const SPARE_GROUPS: usize = 2;

/// The offsets that follow from the elements and the number of tiles.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) planes: usize,
    pub(super) table: usize,
    pub(super) second: usize,
}

impl Layout {
    pub(super) fn new(element: Element, tiles: usize) -> Self {
        let planes = tiles.saturating_mul(element.signs_bytes()).saturating_add(HEADER_BYTES);
        let table = tiles.saturating_mul(PLANES_BYTES).saturating_add(planes);
        let second = padded(tiles.saturating_mul(ENTRY_BYTES)).saturating_add(table);
        Self { planes, table, second }
    }

    /// The offset of the escapes after so many second-level codes.
    pub(super) fn escapes(&self, codes: usize) -> usize {
        let groups = codes.div_ceil(32).saturating_add(SPARE_GROUPS);
        padded(groups.saturating_mul(GROUP_BYTES)).saturating_add(self.second)
    }

    /// The size with so many second-level codes and escapes.
    pub(super) fn end(&self, codes: usize, escapes: usize) -> usize {
        self.escapes(codes).saturating_add(padded(escapes))
    }
}

/// Rounded up to what every part is a multiple of.
pub(super) fn padded(bytes: usize) -> usize {
    bytes.div_ceil(256).saturating_mul(256)
}

/// The most bytes that the segment of `raw_bytes` raw bytes may have: when every element is an
/// escape.
pub fn most_encoded_bytes(element: Element, raw_bytes: usize) -> usize {
    let tiles = raw_bytes.div_ceil(element.tile_bytes());
    let elements = tiles.saturating_mul(ELEMENTS);
    Layout::new(element, tiles).end(elements, elements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_those_of_the_format() {
        let layout = Layout::new(Element::Bf16, 33);
        assert_eq!(layout.planes, 256 + 33 * 1024);
        assert_eq!(layout.table, 256 + 33 * 1280);
        assert_eq!(layout.second, 256 + 33 * 1280 + 512);
        assert_eq!(layout.escapes(0) - layout.second, 256);
        assert_eq!(layout.escapes(19 * 32) - layout.second, 256);
        assert_eq!(layout.escapes(19 * 32 + 1) - layout.second, 512);
        assert_eq!(layout.end(0, 257) - layout.escapes(0), 512);
        let of_fp8 = Layout::new(Element::Fp8, 33);
        assert_eq!([of_fp8.planes, of_fp8.table], [256 + 33 * 512, 256 + 33 * 768]);
    }

    #[test]
    fn the_bound_is_that_of_escapes_alone_and_never_wraps() {
        let bf16 = |bytes| most_encoded_bytes(Element::Bf16, bytes);
        assert_eq!(bf16(2048), 256 + 1024 + 256 + 256 + 512 + 1024);
        assert_eq!(bf16(1), bf16(2048));
        assert_eq!(most_encoded_bytes(Element::Fp8, 1024), bf16(2048) - 512);
        for element in Element::ALL {
            assert_eq!(most_encoded_bytes(element, usize::MAX), usize::MAX);
        }
    }
}

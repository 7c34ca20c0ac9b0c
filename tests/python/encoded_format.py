"""Encodes and decodes bf16 and fp8 weights by itself, as docs/encoded-format.md has it.

Goal: the encoder, the kernel and the decoder on the CPU are judged by code that shares nothing with
them but the page.
Method: no test of its own. Whole arrays at a time; elements are patterns, of 16 bits for bf16 and
of 8 bits for fp8, by which both are told apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

TILE = 1024
MOST_TILES = 8192
ALIGNMENT = 256
MAGIC = 0x31574744
MAGIC_OF_FP8 = 0x31464744

# By d = exponent - base; 3 is "look at the second level", 7 "look at the escapes".
FIRST = {4: 0, 5: 1, 6: 2}
SECOND = {0: 0, 1: 1, 2: 2, 3: 3, 7: 4, 8: 5, 9: 6}


class BadSegment(ValueError):
    """What a segment has that the page does not allow."""


def by_lane(elements: Array) -> Array:
    """From the order of elements to [tile, lane, bit]."""
    # element 256 j + 8 l + 2 m + h is bit 16 h + 4 j + m of lane l
    tile_j_lane_m_h = elements.reshape(-1, 4, 32, 4, 2)
    return tile_j_lane_m_h.transpose(0, 2, 4, 1, 3).reshape(-1, 32, 32)


def by_element(lanes: Array) -> Array:
    """From [tile, lane, bit] to the order of elements."""
    tile_lane_h_j_m = lanes.reshape(-1, 32, 2, 4, 4)
    return tile_lane_h_j_m.transpose(0, 3, 1, 4, 2).reshape(-1)


def words(bits: Array) -> Array:
    """The last axis, 32 bits, as words; bit 0 first."""
    return np.packbits(bits.astype(bool), axis=-1, bitorder="little").view("<u4")[..., 0]


def bits(of: Array) -> Array:
    """Words as 32 bits on a new last axis."""
    return np.unpackbits(of[..., None].astype("<u4").view(np.uint8), axis=-1, bitorder="little")


def padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % ALIGNMENT)


def table(of: dict[int, int], other: int) -> Array:
    """Codes by d + 256, for every d of two bytes."""
    codes = np.full(512, other)
    codes[[d + 256 for d in of]] = list(of.values())
    return codes


def halves(elements: Array) -> Array:
    """Sign and mantissa of fp8 patterns: half a byte each, elements n and n + 4 of eight in one."""
    half = (elements >> 4 & 8 | elements & 7).reshape(-1, 2, 4)
    return (half[:, 0] | half[:, 1] << 4).astype(np.uint8)


def best_bases(exponents: Array, is_fp8: bool) -> Array:
    """One for each tile: what an encoder takes whose sample is the whole tile."""
    found = []
    for tile in exponents.reshape(-1, TILE):
        counts = np.bincount(tile, minlength=258)
        three = counts[:-2] + counts[1:-1] + counts[2:]
        first = int(three.argmax()) - 4
        found.append(first % 16 if is_fp8 else max(first, 0))
    return np.array(found)


def encode(elements: Array, bases: Array | None = None) -> bytes:
    """A segment of patterns, whole tiles of them."""
    tiles, rest = divmod(len(elements), TILE)
    assert rest == 0
    assert 1 <= tiles <= MOST_TILES
    is_fp8 = elements.dtype == np.uint8
    if is_fp8:
        signs = halves(elements)
        exponents = by_lane(elements >> 3 & 15).astype(int)
    else:
        elements = elements.astype(np.uint16)
        signs = (elements >> 8 & 0x80 | elements & 0x7F).astype(np.uint8)
        exponents = by_lane(elements >> 7 & 0xFF).astype(int)
    if bases is None:
        bases = best_bases(exponents, is_fp8)
    d = exponents - bases[:, None, None]
    d = d % 16 if is_fp8 else d

    first = table(FIRST, 3)[d + 256]
    is_second = first == 3
    second = table(SECOND, 7)[d + 256]
    is_escape = is_second & (second == 7)
    planes = np.stack([words(first & 1), words(first >> 1)], axis=1)
    entries = np.zeros((tiles, 2), "<u4")
    entries[1:, 0] = np.cumsum(is_second.sum((1, 2)))[:-1]
    entries[1:, 1] = np.cumsum(is_escape.sum((1, 2)))[:-1]
    entries[:, 1] |= (bases << 24).astype("<u4")

    codes = second[is_second]
    groups = np.resize(codes, (-(-len(codes) // 32), 32)) if len(codes) else codes.reshape(0, 32)
    groups.reshape(-1)[len(codes) :] = 0
    triples = np.stack([words(groups >> level & 1) for level in range(3)], axis=1)

    before = [signs.tobytes(), planes.tobytes(), padded(entries.tobytes())]
    second_at = ALIGNMENT + sum(map(len, before))
    second_level = padded(triples.tobytes() + bytes(24))
    magic = MAGIC_OF_FP8 if is_fp8 else MAGIC
    header = np.array([magic, tiles, second_at, second_at + len(second_level)], "<u4")
    escapes = exponents[is_escape].astype(np.uint8)
    return b"".join([padded(header.tobytes()), *before, second_level, padded(escapes.tobytes())])


def decode(segment: bytes) -> Array:
    """The patterns of a segment.

    Raises:
        BadSegment: It is not laid out as the page says.
    """
    raw = np.frombuffer(segment, np.uint8)
    magic, tiles, second_at, escapes_at = raw[:16].view("<u4").tolist()
    is_fp8 = magic == MAGIC_OF_FP8
    planes_at = ALIGNMENT + (512 if is_fp8 else 1024) * tiles
    table_at = planes_at + 256 * tiles
    if not (is_fp8 or magic == MAGIC) or not 1 <= tiles <= MOST_TILES or raw[16:ALIGNMENT].any():
        raise BadSegment("header")
    if len(raw) % ALIGNMENT or second_at != table_at + len(padded(bytes(8 * tiles))):
        raise BadSegment("sizes")

    planes = bits(raw[planes_at:table_at].view("<u4").reshape(tiles, 2, 32))
    entries = raw[table_at : table_at + 8 * tiles].view("<u4").reshape(tiles, 2)
    first = planes[:, 0] + 2 * planes[:, 1]
    is_second = first == 3
    count = int(is_second.sum())
    groups = -(-count // 32)
    level = raw[second_at : second_at + 12 * (groups + 2)].view("<u4").reshape(groups + 2, 3)
    if escapes_at != second_at + len(padded(level.tobytes())):
        raise BadSegment("offset of the escapes")
    paddings = (table_at + 8 * tiles, second_at), (second_at + 12 * groups, escapes_at)
    if any(raw[start:end].any() for start, end in paddings):
        raise BadSegment("padding")
    places = bits(level)  # [group, level, bit]
    codes = (places[:, 0] + 2 * places[:, 1] + 4 * places[:, 2]).reshape(-1)
    if codes[count:].any():
        raise BadSegment("codes after the last")

    d = np.select([first == code for code in FIRST.values()], list(FIRST), 0)
    of_second = {code: difference for difference, code in SECOND.items()} | {7: 0}
    d[is_second] = np.array([of_second[code] for code in range(8)])[codes[:count]]
    is_escape = np.zeros(is_second.shape, bool)
    is_escape[is_second] = codes[:count] == 7
    escapes = int(is_escape.sum())
    if len(raw) != escapes_at + len(padded(bytes(escapes))) or raw[escapes_at + escapes :].any():
        raise BadSegment("escapes")
    for word, of in ((entries[:, 0], is_second), (entries[:, 1] & 0xFFFFFF, is_escape)):
        each = of.sum((1, 2))
        if not np.array_equal(word, np.cumsum(each) - each):
            raise BadSegment("counts in the tile table")

    exponents = (entries[:, 1] >> 24).astype(int)[:, None, None] + d
    exponents %= 16 if is_fp8 else 1 << 16
    exponents[is_escape] = raw[escapes_at : escapes_at + escapes]
    if is_fp8:
        if exponents.max() > 15:
            raise BadSegment("an exponent of more than four bits")
        half = raw[ALIGNMENT:planes_at].reshape(-1, 4)
        each = np.stack([half & 15, half >> 4], axis=1).reshape(-1)
        return ((each & 8) << 4 | by_element(exponents).astype(np.uint8) << 3 | each & 7).astype(
            np.uint8
        )
    if exponents.max() > 255:
        raise BadSegment("an exponent of more than a byte")
    signs = raw[ALIGNMENT:planes_at].astype(np.uint16)
    return (signs & 0x80) << 8 | by_element(exponents).astype(np.uint16) << 7 | signs & 0x7F

"""The kernel that decodes weights, run on the CPU, and the PTX that is made of it.

Goal: the kernel's source gives back every bit of every kind of weights, in batches of any shape,
and writes nothing else; the committed PTX is of that source and loads where we promise.
Method: tests/kernels/ compiles the source for the CPU; segments come from encoded_format.py, which
follows the page and shares nothing with the kernel.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from encoded_format import MOST_TILES, TILE, Array, BadSegment, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "src" / "driver" / "cuda" / "kernels"
MOST_SEGMENTS = 32
GUARD = 48  # bytes of GUARD_BYTE around each target: alignment is 16 and no more
GUARD_BYTE = 0xA5


class Segment(ctypes.Structure):
    _fields_ = (("source", ctypes.c_uint64), ("target", ctypes.c_uint64))


class Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_uint32),
        ("first_tile", ctypes.c_uint32 * (MOST_SEGMENTS + 1)),
        ("segments", Segment * MOST_SEGMENTS),
    )


def normal(tiles: int, scale: float = 0.02) -> Array:
    values = np.random.default_rng(0).normal(0, scale, tiles * TILE).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def random_bits(tiles: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 1 << 16, tiles * TILE, np.uint16)


def with_exponents(lowest: int, highest: int, tiles: int = 2) -> Array:
    """Random signs and mantissas; the exponents are those from the lowest to the highest."""
    exponents = np.random.default_rng(1).integers(lowest, highest + 1, tiles * TILE)
    return random_bits(tiles) & 0x807F | exponents.astype(np.uint16) << 7


def one_stranger(element: int) -> Array:
    """Equal weights but for one, whose exponent is far from theirs."""
    weights = np.full(TILE, 0x3F80, np.uint16)
    weights[element] = 0x0123
    return weights


def normal_fp8(tiles: int, scale: float) -> Array:
    values = np.random.default_rng(0).normal(0, scale, tiles * TILE).astype(np.float32)
    return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def random_fp8(tiles: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 1 << 8, tiles * TILE, np.uint8)


# Every way that a tile can be: mostly first level, second, escapes, none of them, and the borders.
WEIGHTS: dict[str, Array] = {
    "normal": normal(13),
    "wide": normal(2, 3e37),
    "all patterns": np.arange(1 << 16, dtype=np.uint16),
    "all patterns, shuffled": np.random.default_rng(2).permutation(1 << 16).astype(np.uint16),
    "random bits": random_bits(5),
    "zeros": np.zeros(TILE, np.uint16),
    "minus zeros": np.full(3 * TILE, 0x8000, np.uint16),
    "ones": np.full(TILE, 0xFFFF, np.uint16),
    "NaN and infinity": with_exponents(255, 255),
    "denormal": with_exponents(0, 0),
    "smallest": with_exponents(0, 9),
    "largest": with_exponents(246, 255),
    "second level only": np.where(with_exponents(0, 1) >> 7 & 1, 0x3D80, 0x3F80).astype(np.uint16),
    "first lane's first": one_stranger(0),
    "last lane's last": one_stranger(TILE - 1),
    "in between": one_stranger(333),
}
WEIGHTS_OF_FP8: dict[str, Array] = {
    "as they are": normal_fp8(13, 0.02),
    "scaled": normal_fp8(5, 90),
    "all patterns": np.tile(np.arange(256, dtype=np.uint8), 4),
    "random bits": random_fp8(7),
    "the largest": np.full(TILE, 0x7E, np.uint8),
    "NaN": np.full(TILE, 0xFF, np.uint8),
    "zeros": np.zeros(3 * TILE, np.uint8),
    "minus zeros": np.full(TILE, 0x80, np.uint8),
    "denormal": random_fp8(2) & 0x87,
    "one stranger": np.where(np.arange(TILE) == 333, 0xE5, 0x38).astype(np.uint8),
}
BASES = (0, 1, 100, 118, 246, 250, 252, 255)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """The kernel for the CPU: called with a batch and the number of blocks."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("NOT TESTED: the decoder's kernel, which needs a C++ compiler")
    library = tmp_path_factory.mktemp("kernel") / "libkernel.so"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    sources = [str(path) for path in sorted((ROOT / "tests" / "kernels").glob("*.cpp"))]
    command = [*compiler, *options, *warnings, *sources, "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(library)).run


def aligned(size: int, alignment: int, apart: int = 0) -> Array:
    """Bytes whose address is so much more than a multiple of the alignment."""
    memory = np.full(size + alignment + apart, GUARD_BYTE, np.uint8)
    start = -memory.ctypes.data % alignment + apart
    return memory[start : start + size]


def is_fp8(segment: bytes) -> bool:
    return segment[:4] == b"DGF1"


def run(kernel: Callable[..., int], segments: list[bytes]) -> list[Array]:
    """What the kernel makes of a batch: the elements of each segment."""
    batch = Batch(count=len(segments))
    kept, targets = [], []
    for number, segment in enumerate(segments):
        source = aligned(len(segment), 256)
        source[:] = np.frombuffer(segment, np.uint8)
        tiles = int(source[4:8].view("<u4")[0])
        size = 1 if is_fp8(segment) else 2
        target = aligned(2 * GUARD + tiles * TILE * size, 256, 16 * (number % 16))
        batch.first_tile[number + 1] = batch.first_tile[number] + tiles
        batch.segments[number] = Segment(source.ctypes.data, target.ctypes.data + GUARD)
        kept.append(source)
        targets.append(target)
    # What is behind the last is nobody's.
    for number in range(len(segments) + 1, MOST_SEGMENTS + 1):
        batch.first_tile[number] = 0
    tiles = batch.first_tile[len(segments)]
    assert kernel(ctypes.byref(batch), -(-tiles // 8)) == 0
    for target in targets:
        around = np.concatenate([target[:GUARD], target[-GUARD:]])
        assert (around == GUARD_BYTE).all(), "written outside"
    types = ["u1" if is_fp8(segment) else "<u2" for segment in segments]
    return [target[GUARD:-GUARD].view(kind) for target, kind in zip(targets, types, strict=True)]


def check(kernel: Callable[..., int], weights: list[Array], segments: list[bytes]) -> None:
    for number, (got, expected) in enumerate(zip(run(kernel, segments), weights, strict=True)):
        wrong = np.flatnonzero(got != expected)
        assert not len(wrong), f"segment {number}: {len(wrong)} wrong, the first {wrong[0]}"


def test_the_reference_decodes_what_it_encodes() -> None:
    for name, weights in WEIGHTS.items():
        assert np.array_equal(decode(encode(weights)), weights), name
    for base in BASES:
        for weights in (random_bits(3), with_exponents(max(base - 3, 0), min(base + 12, 255))):
            bases = np.full(len(weights) // TILE, base)
            assert np.array_equal(decode(encode(weights, bases)), weights), base


def test_sizes_are_those_of_the_page() -> None:
    assert 10.85 < len(encode(normal(512))) * 8 / (512 * TILE) < 11
    # header, signs, planes, table, two groups of zeros, no escapes
    assert len(encode(np.full(TILE, 0x3F80, np.uint16))) == 256 + 1024 + 256 + 256 + 256
    # 1024 second-level codes and as many escapes
    assert len(encode(WEIGHTS["zeros"], np.array([9]))) == 256 + 1024 + 256 + 256 + 512 + 1024


def test_the_reference_decodes_fp8() -> None:
    for name, weights in WEIGHTS_OF_FP8.items():
        assert np.array_equal(decode(encode(weights)), weights), name
    for base in range(16):
        weights = random_fp8(3, base)
        assert np.array_equal(decode(encode(weights, np.full(3, base))), weights), base
    assert 5.9 < len(encode(normal_fp8(512, 0.02))) * 8 / (512 * TILE) < 6.3
    assert 6.7 < len(encode(normal_fp8(512, 90))) * 8 / (512 * TILE) < 7.2


@pytest.mark.parametrize("at", [0, 4, 8, 12, 16, 256 + 5 * 1280 + 8, 256 + 5 * 1280 + 40])
def test_the_reference_notices_a_broken_segment(at: int) -> None:
    segment = bytearray(encode(WEIGHTS["random bits"]))
    segment[at] ^= 1
    with pytest.raises(BadSegment):
        decode(bytes(segment))


def test_every_kind_of_weights(kernel: Callable[..., int]) -> None:
    for weights in WEIGHTS.values():
        check(kernel, [weights], [encode(weights)])


def test_any_base(kernel: Callable[..., int]) -> None:
    """The base decides the size, never the result; below the lowest and above the highest too."""
    weights = [random_bits(len(BASES)), WEIGHTS["smallest"], WEIGHTS["largest"], normal(3)]
    for base in BASES:
        bases = [np.full(len(each) // TILE, base) for each in weights]
        bases[0] = np.array(BASES)
        check(kernel, weights, [encode(*both) for both in zip(weights, bases, strict=True)])


def test_fp8(kernel: Callable[..., int]) -> None:
    for weights in WEIGHTS_OF_FP8.values():
        check(kernel, [weights], [encode(weights)])
    weights = random_fp8(16, 5)
    check(kernel, [weights], [encode(weights, np.arange(16))])


def test_a_batch_of_both(kernel: Callable[..., int]) -> None:
    weights = [normal(3), *WEIGHTS_OF_FP8.values(), random_bits(2), normal_fp8(1, 0.1), normal(1)]
    check(kernel, weights, [encode(each) for each in weights])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 17, 31, MOST_SEGMENTS])
def test_batches(kernel: Callable[..., int], count: int) -> None:
    """Segments of different sizes, so that blocks and segments do not end together."""
    weights = [random_bits(1 + 5 * i % 11, i) if i % 3 else normal(1 + i % 9) for i in range(count)]
    check(kernel, weights, [encode(each) for each in weights])


def test_the_largest_segment(kernel: Callable[..., int]) -> None:
    """The most of everything: each element has a second-level code and an escape."""
    tiles = random_bits(MOST_TILES)
    weights = [normal(1), tiles, normal(2)]
    bases = [np.full(len(each) // TILE, 255) for each in weights]
    weights[1] = tiles & 0xBFFF  # exponents of 127 at most
    segments = [encode(*both) for both in zip(weights, bases, strict=True)]
    assert len(segments[1]) < 1 << 25
    check(kernel, weights, segments)


def test_the_ptx_is_of_this_source() -> None:
    """Whether NVRTC makes the same of it `scripts/ptx.py --check` says, which needs NVRTC."""
    first = (KERNELS / "decode.ptx").read_text().splitlines()[0]
    hexadecimal = hashlib.sha256((KERNELS / "decode.cu").read_bytes()).hexdigest()
    assert first == f"// sha256 of decode.cu: {hexadecimal}", "python scripts/ptx.py writes it anew"


def test_what_the_ptx_needs() -> None:
    ptx = (KERNELS / "decode.ptx").read_text()
    assert re.findall(r"^\.(?:version|target) .*", ptx, re.M) == [".version 7.0", ".target sm_70"]
    entry = re.search(r"\.visible \.entry decode\(\s*(.*?)\s*\)", ptx, re.S)
    assert entry is not None
    assert entry[1] == f".param .align 8 .b8 decode_param_0[{ctypes.sizeof(Batch)}]"
    assert ctypes.sizeof(Batch) == 648
    assert Batch.segments.offset == 136
    assert len(re.findall(r"\.entry", ptx)) == 1
    # No memory but the global one and the parameters: nothing to set up, nothing spilled.
    assert not re.search(r"\.(local|shared|extern|func)\b", ptx)

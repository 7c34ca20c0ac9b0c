"""Malformed safetensors files.

Goal: a truncated, forged or damaged file is a ValueError that names the file, what it needs and
what it has instead, and never an allocation by a number that was not checked.
Method: headers written by hand, and seeded damage to a good file with the safetensors package as
the second opinion.
"""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dgls_torch import header
from dgls_torch.files import SafetensorsFile

if TYPE_CHECKING:
    from pathlib import Path

SPELLED = {dtype: name for name, dtype in header.DTYPES.items()}


def write(path: Path, entries: object, data: bytes = b"") -> Path:
    """Writes a file by hand: a header of any JSON, or any bytes at all."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: object, begin: int, end: int, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "model.safetensors"


@pytest.fixture(autouse=True)
def _folder(path: Path) -> None:
    path.parent.mkdir()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "needs the 8 bytes of the header's length, found 0 bytes"),
        (b"\2\0\0\0\0\0\0", "found 7 bytes"),
        (b"\2\0\0\0\0\0\0\0{", "needs 2 bytes of header, found 1 bytes: it is truncated"),
        (b"\0" * 8, r"needs a header that starts with \{, found b''"),
        (b"PK\3\4" + b"\0" * 4, "needs 67324752 bytes of header, found 0 bytes"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00state", "needs a header of at most 100000000 bytes"),
        (b"\1\0\0\0\0\0\0\0[", r"starts with \{, found b'\['"),
        (b"\3\0\0\0\0\0\0\0 {}", r"starts with \{, found b' \{\}'"),
        (b"\4\0\0\0\0\0\0\0{\xff\xfe}", "needs a JSON object, found 4 B of else: .*utf-8"),
        (b"\2\0\0\0\0\0\0\0{]", "needs a JSON object, found 2 B of else: "),
        (b"\3\0\0\0\0\0\0\0{}]", "needs a JSON object, found 3 B of else: Extra data"),
        (b"\2\0\0\0\0\0\0\0{}trailing", "needs to end after the header at 10, found 18 bytes"),
    ],
)
def test_files_that_are_none_are_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^model\.safetensors .*{message}"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ({"a": 1}, b"", "'a' needs dtype, shape and data_offsets, found 1"),
        ({"a": {}}, b"", "'a' needs dtype, shape and data_offsets, found {}"),
        ({"a": entry([1], 0, 1) | {"x": 1}}, b"a", "'a' needs dtype, shape and data_offsets"),
        ({"a": entry([1], 0, 1, "F3")}, b"a", "'a' needs a dtype of F64, .*, found 'F3'"),
        ({"a": entry([1], 0, 1, "u8")}, b"a", "'a' needs a dtype of .*, found 'u8'"),
        ({"a": entry([1], 0, 1, None)}, b"a", "'a' needs a dtype of .*, found None"),
        ({"a": entry([1], 0, 1, ["U8"])}, b"a", r"'a' needs a dtype of .*, found \['U8'\]"),
        ({"a": entry([-1], 0, 1)}, b"a", r"needs a shape of sizes below 2\*\*63, found \[-1\]"),
        ({"a": entry([True], 0, 1)}, b"a", r"needs a shape of sizes .* found \[True\]"),
        ({"a": entry([1.0], 0, 1)}, b"a", r"needs a shape of sizes .* found \[1\.0\]"),
        ({"a": entry(["1"], 0, 1)}, b"a", r"needs a shape of sizes .* found \['1'\]"),
        ({"a": entry(1, 0, 1)}, b"a", "needs a shape of sizes .* found 1"),
        ({"a": entry({}, 0, 1)}, b"a", "needs a shape of sizes .* found {}"),
        ({"a": entry([2**63], 0, 1)}, b"a", "needs a shape of sizes"),
        ({"a": entry([10**30], 0, 1)}, b"a", "needs a shape of sizes"),
        ({"a": entry([2**62, 4], 0, 1)}, b"a", r"needs less than 2\*\*63 bytes, found the shape"),
        ({"a": entry([2**40] * 5 + [0], 0, 0)}, b"", r"needs less than 2\*\*63 bytes"),
        ({"a": entry([2**60], 0, 1, "F64")}, b"a", r"needs less than 2\*\*63 bytes"),
        ({"a": entry([2**61], 0, 1)}, b"a", rf"needs {2**61} bytes for the shape .* found 1 bytes"),
        ({"a": entry([2], 0, 1)}, b"a", r"needs 2 bytes for the shape \[2\] of U8, found 1 bytes"),
        ({"a": entry([1], 0, 2)}, b"ab", r"needs 1 bytes for the shape \[1\] of U8, found 2 bytes"),
        ({"a": entry([1], 0, 2, "F32")}, b"ab", "needs 4 bytes for .* of F32, found 2 bytes"),
        ({"a": entry([], 0, 0)}, b"", r"needs 1 bytes for the shape \[\] of U8, found 0 bytes"),
        ({"a": entry([1], 0, 2)}, b"a", "needs data within 1 bytes, found 0 to 2"),
        ({"a": entry([1], 2**62, 2**62 + 1)}, b"a", "needs data within 1 bytes, found 46116"),
        ({"a": entry([1], 1, 0)}, b"ab", "needs data within 2 bytes, found 1 to 0"),
        ({"a": entry([1], -1, 0)}, b"a", r"needs two data_offsets, found \[-1, 0\]"),
        ({"a": entry([1], 0, True)}, b"a", "needs two data_offsets"),
        ({"a": entry([1], 0, 1.0)}, b"a", "needs two data_offsets"),
        ({"a": entry([1], 0, 10**20)}, b"a", "needs two data_offsets"),
        ({"a": {**entry([1], 0, 1), "data_offsets": [0]}}, b"a", "needs two data_offsets"),
        ({"a": {**entry([1], 0, 1), "data_offsets": [0, 1, 2]}}, b"a", "needs two data_offsets"),
        ({"a": {**entry([1], 0, 1), "data_offsets": "01"}}, b"a", "needs two data_offsets"),
        (
            {"a": entry([2], 0, 2), "b": entry([2], 1, 3)},
            b"abc",
            "'b' needs to follow 'a' at .* which overlaps it",
        ),
        (
            {"a": entry([2], 0, 2), "b": entry([2], 0, 2)},
            b"ab",
            "'b' needs to follow 'a' at .* which overlaps it",
        ),
        (
            {"a": entry([1], 0, 1), "b": entry([1], 2, 3)},
            b"abc",
            "'b' needs to follow 'a' at .* which leaves a hole",
        ),
        ({"a": entry([1], 1, 2)}, b"ab", "'a' needs to follow the header at .* leaves a hole"),
        ({"a": entry([1], 0, 1)}, b"ab", "needs to end after 'a' at"),
        ({"__metadata__": [], "a": entry([1], 0, 1)}, b"a", "needs an object of texts"),
        ({"__metadata__": {"format": 1}}, b"", "needs an object of texts as __metadata__"),
        (b'{"a":1,"a":2}', b"", "needs a JSON object, .*a key stands twice"),
        (b'{"a":{"dtype":"U8","dtype":"I8"}}', b"", "a key stands twice"),
        (b'{"a":' + b"[" * 200_000, b"", "needs a JSON object"),
        (b'{"a":' + b"9" * 10_000 + b"}", b"", "needs a JSON object"),
    ],
)
def test_headers_that_contradict_are_refused(
    path: Path, entries: object, data: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^model\.safetensors .*{message}") as refused:
        SafetensorsFile(write(path, entries, data))
    assert str(path.parent) not in str(refused.value)


def test_a_forged_name_does_not_fill_the_message(path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.safetensors ") as refused:
        SafetensorsFile(write(path, {"n" * 10_000_000: 1}))
    assert len(str(refused.value)) < 700


@pytest.mark.parametrize("length", [100_000_001, 2**31, 2**40, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("size", [8, 4096, 200_000_000])
def test_a_huge_header_length_allocates_nothing(path: Path, length: int, size: int) -> None:
    path.write_bytes(length.to_bytes(8, "little"))
    os.truncate(path, size)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"at most 100000000 bytes, found {length} bytes"):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_header_longer_than_its_file_allocates_nothing(path: Path) -> None:
    path.write_bytes((100_000_000).to_bytes(8, "little"))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="needs 100000000 bytes of header, found 0 bytes"):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_every_truncation_is_refused(path: Path) -> None:
    save_file({"a": torch.arange(5), "b": torch.ones(3)}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"^model\.safetensors "):
            SafetensorsFile(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="needs to end after"):
        SafetensorsFile(path)


def test_damage_is_refused_or_harmless(path: Path) -> None:
    """What is accepted lies within the file, covers it, and is what safetensors reads too."""
    some = {
        name: torch.zeros(n, 3, dtype=torch.uint8).view(dtype)
        for n, (name, dtype) in enumerate(header.DTYPES.items())
        if dtype.itemsize == 1
    }
    save_file(some | {"scalar": torch.tensor(3.5), "wide": torch.ones(2, 3)}, path)
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    random_ = random.Random(1)
    accepted = refused = 0
    for _ in range(3000):
        damaged = bytearray(good)
        for _ in range(random_.randrange(1, 4)):
            at = random_.randrange(start)
            damaged[at] = random_.choice([random_.randrange(256), *b'0123456789[]{}":, -.eFIU'])
        path.write_bytes(damaged)
        try:
            found = SafetensorsFile(path)
        except ValueError:
            refused += 1
            continue
        accepted += 1
        covered = sum(tensor.bytes for tensor in found.tensors.values())
        data = 8 + int.from_bytes(damaged[:8], "little")
        assert covered == len(good) - data
        with safe_open(path, "pt") as reference:
            assert set(reference.keys()) == set(found.tensors)
            for name, tensor in found.tensors.items():
                assert tuple(reference.get_slice(name).get_shape()) == tensor.shape
                assert reference.get_slice(name).get_dtype() == SPELLED[tensor.dtype]
                assert data <= tensor.offset <= tensor.offset + tensor.bytes <= len(good)
    # Both must happen often, or the loop shows nothing.
    assert accepted > 100
    assert refused > 100


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry([2], 0, 2), "b": entry([2], 1, 3)},
        {"a": entry([1], 1, 2), "b": entry([1], 2, 3)},
        {"a": entry([2**62, 4], 0, 3)},
        {"a": entry([1], 0, 1)},
    ],
)
def test_safetensors_refuses_the_same(path: Path, entries: dict[str, object]) -> None:
    write(path, entries, b"abc")
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(ValueError, match="model"):
        SafetensorsFile(path)

"""Decides whether the header of a safetensors file may be believed, and what it then says.

Pure: it gets the header's text and the file's size. Every number in it is checked against that size
before anything is allocated or read by it, as somebody else wrote it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from dgls_torch.units import MAX_BYTES, format_bytes

# The format's names; torch's, looked up because the last ones came one by one.
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, spelled) for name, spelled in _NAMES.items() if hasattr(torch, spelled)
}
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class FileTensor:
    """Where one tensor lies in its file: ``bytes`` bytes from the absolute ``offset`` on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    bytes: int


def parse_header(
    text: bytes | bytearray, size: int, file: str
) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """Checks a header and returns the tensors it describes and the file's own free text.

    Args:
        text: The header, without the 8 bytes of its length before it.
        size: The size of the whole file in bytes.
        file: The file's name; every message starts with it.

    Raises:
        ValueError: The header is malformed, or contradicts itself or the file's size.
    """
    if not text.startswith(b"{"):
        refuse(file, f"needs a header that starts with {{, found {shown(bytes(text[:8]))}")
    entries = json_object(text, file)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        refuse(file, f"needs an object of texts as __metadata__, found {shown(metadata)}")
    start = 8 + len(text)
    tensors = {name: _tensor(name, entry, start, size, file) for name, entry in entries.items()}
    _check_cover(tensors, start, size, file)
    return tensors, metadata


def json_object(text: bytes | bytearray, file: str) -> dict[str, Any]:
    """Reads JSON text that is one object and names no key twice.

    Raises:
        ValueError: It is anything else.
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        reason = type(found).__name__
    # Not only JSON errors: bad UTF-8, a number of 5,000 digits, brackets nested 100,000 deep.
    except (ValueError, RecursionError) as error:
        found, reason = None, str(error)
    if not isinstance(found, dict):
        refuse(file, f"needs a JSON object, found {format_bytes(len(text))} of else: {reason}")
    return found


def refuse(file: str, message: str) -> NoReturn:
    """Raises a ValueError that names the file by its last part: messages go into public reports."""
    # Not all of it: a forged header can hold a tensor's name of many megabytes.
    raise ValueError(f"{file} {message if len(message) <= 600 else message[:597] + '...'}")


def shown(value: object) -> str:
    """Shows what was found, cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _tensor(name: str, entry: Any, start: int, size: int, file: str) -> FileTensor:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        refuse(file, f"{name!r} needs dtype, shape and data_offsets, found {shown(entry)}")
    spelled, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(spelled) if isinstance(spelled, str) else None
    if dtype is None:
        refuse(file, f"{name!r} needs a dtype of {', '.join(DTYPES)}, found {shown(spelled)}")
    if not _are_sizes(shape):
        refuse(file, f"{name!r} needs a shape of sizes below 2**63, found {shown(shape)}")
    need = dtype.itemsize
    for extent in shape:
        need *= extent
        # Checked at each step, as the format has it: a later 0 does not excuse an overflow.
        if need > MAX_BYTES:
            refuse(file, f"{name!r} needs less than 2**63 bytes, found the shape {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        refuse(file, f"{name!r} needs two data_offsets, found {shown(offsets)}")
    begin, end = offsets
    if not begin <= end <= size - start:
        refuse(file, f"{name!r} needs data within {size - start} bytes, found {begin} to {end}")
    if end - begin != need:
        of = f"the shape {shown(shape)} of {spelled}"
        refuse(file, f"{name!r} needs {need} bytes for {of}, found {end - begin} bytes")
    return FileTensor(dtype, tuple(shape), start + begin, need)


def _are_sizes(found: Any) -> bool:
    # By exact type: to Python, True is an int too.
    return isinstance(found, list) and all(type(n) is int and 0 <= n <= MAX_BYTES for n in found)


def _check_cover(tensors: dict[str, FileTensor], start: int, size: int, file: str) -> None:
    # The format allows neither overlaps nor holes; either means a damaged or forged file.
    covered, before = start, "the header"
    for name in sorted(tensors, key=lambda name: (tensors[name].offset, tensors[name].bytes)):
        offset = tensors[name].offset
        if offset != covered:
            kind = "overlaps it" if offset < covered else "leaves a hole"
            found = f"offset {offset}, which {kind}"
            refuse(file, f"{name!r} needs to follow {before} at {covered}, found {found}")
        covered, before = offset + tensors[name].bytes, repr(name)
    if covered != size:
        refuse(file, f"needs to end after {before} at {covered}, found {size} bytes")

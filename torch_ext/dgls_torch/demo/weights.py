"""Random weights as a .safetensors file, written tensor by tensor: no model is ever whole in RAM.

The file is a header (its length as 8 bytes, little endian, then JSON padded with spaces to a
multiple of 8) and the tensors one after another. Format: safetensors 0.x, "Format" in its README.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_CHUNK_VALUES = 4 << 20
"""Values made at once. Part of the recipe: each chunk has its own seed."""

_RECIPE = "dgls_torch demo weights 1"
"""Names the way the values are made; a new recipe makes every older file stale."""

_SPARE_BYTES = 64 << 20
"""Left free on the disk, so that the demo never fills it to the last byte."""


class _Chunk(NamedTuple):
    """One piece of one tensor: ``values`` bfloat16 numbers."""

    name: str
    part: int
    values: int
    std: float
    """Standard deviation; 0 stands for a norm's weights, which are all one."""


def write_weights(
    model: nn.Module,
    path: Path,
    *,
    seed: int = 0,
    on_bytes: Callable[[int], None] | None = None,
) -> bool:
    """Writes random bfloat16 weights for ``model``, which may be on the meta device, to ``path``.

    The same model and seed always give the same file. It appears whole or not at all. A file that
    is already there is kept when its header and its size are those that would be written.

    Args:
        model: Gives names and shapes; its own values are not read.
        path: Where the file goes.
        seed: Changes every value.
        on_bytes: Called with the bytes written so far, after each piece.

    Returns:
        Whether the file was written; False if the one that was there is right.

    Raises:
        OSError: The disk has too little room, or cannot be written.
    """
    header, data_bytes = _header(model, seed)
    total_bytes = len(header) + data_bytes
    if _matches(path, header, total_bytes):
        return False
    _require_room(path, total_bytes)
    # The process id keeps two demos that run at once out of each other's file.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            written = file.write(header)
            for piece in _pieces(list(_chunks(model)), seed):
                written += file.write(piece)
                if on_bytes is not None:
                    on_bytes(written)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return True


def file_bytes(model: nn.Module) -> int:
    """Counts the bytes of the file that ``write_weights`` makes for ``model``."""
    header, data_bytes = _header(model, 0)
    return len(header) + data_bytes


def _header(model: nn.Module, seed: int) -> tuple[bytes, int]:
    """Makes the file's first bytes and count the bytes that follow them."""
    entries: dict[str, object] = {
        "__metadata__": {"format": "pt", "recipe": _RECIPE, "seed": str(seed)}
    }
    offset = 0
    for name, tensor in model.state_dict().items():
        end = offset + 2 * tensor.numel()
        entries[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _matches(path: Path, header: bytes, total_bytes: int) -> bool:
    try:
        if path.stat().st_size != total_bytes:
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header
    except FileNotFoundError:
        return False


def _require_room(path: Path, total_bytes: int) -> None:
    need_bytes, free_bytes = total_bytes + _SPARE_BYTES, shutil.disk_usage(path.parent).free
    if free_bytes < need_bytes:
        raise OSError(
            f"{path.name} needs {format_bytes(need_bytes)} of disk space but {path.parent} has "
            f"{format_bytes(free_bytes)} free; free some or name another folder with --dir"
        )


def _chunks(model: nn.Module) -> Iterator[_Chunk]:
    for name, tensor in model.state_dict().items():
        std = _std(name, tensor.shape)
        for index, start in enumerate(range(0, tensor.numel(), _CHUNK_VALUES)):
            yield _Chunk(name, index, min(_CHUNK_VALUES, tensor.numel() - start), std)


def _std(name: str, shape: torch.Size) -> float:
    """Chooses the spread of a tensor's values so that activations keep their size."""
    if len(shape) == 1:
        return 0.02 if name.endswith("bias") else 0.0
    return 1 / math.sqrt(shape[1:].numel())


def _pieces(chunks: list[_Chunk], seed: int) -> Iterator[bytearray]:
    """Makes the chunks on all cores, in order, a few ahead of the writer."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[bytearray]] = deque()
        try:
            for chunk in chunks:
                ahead.append(pool.submit(_values, chunk, seed))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _values(chunk: _Chunk, seed: int) -> bytearray:
    """Makes one chunk's bytes; its generator is seeded by the tensor's name alone."""
    piece = bytearray(2 * chunk.values)
    target = torch.frombuffer(piece, dtype=torch.bfloat16)
    if chunk.std == 0.0:
        target.fill_(1.0)
        return piece
    key = f"{seed}/{chunk.name}/{chunk.part}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    # In float32, then rounded: torch fills float32 five times faster than bfloat16 (273 against
    # 55 million values/s on one core of a Zen 4 server).
    target.copy_(torch.empty(chunk.values).normal_(0.0, chunk.std, generator=generator))
    return piece

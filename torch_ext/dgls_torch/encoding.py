"""What of a stream's weights may go over the link encoded, and what that takes of the device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from dgls_torch.arena import empty_arena
from dgls_torch.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dgls_torch.config import StreamConfig
    from dgls_torch.host_budget import HostBudget
    from dgls_torch.weights import Part

BUFFER_BYTES = 128 * MIB
"""Device memory that encoded weights are decoded from, at most: as much as a link brings while a
large kernel lets no other one in. Of a small budget a part."""

BUFFER_LEAST = 32 * MIB
"""With less than this beside the weights nothing is decoded."""

_PART = 32

LEAST_BYTES = MIB
"""Smaller tensors go as they are: the link's latency is most of what they take."""

SHARES = {torch.bfloat16: 10.98 / 16, torch.float8_e4m3fn: 0.85}
"""What may be encoded, and what of a byte then goes over the link, of weights as trained ones are:
normally distributed (docs/encoded-format.md). Of fp8 it is 0.77 as they are, 0.87 scaled."""

_promised: dict[int, int] = {}
"""For each open engine by its number, bytes of host memory that its encoded weights may come to."""

_MODES = {"off": 0, "auto": 1, "on": 2}


def may_encode(part: Part) -> bool:
    """Whether these bytes are worth a try."""
    return part.dtype in SHARES and part.bytes >= LEAST_BYTES


def encoded_bytes(parts: Iterable[Part]) -> int:
    """What the encoded form of all that may be encoded comes to, in bytes."""
    return int(sum(SHARES[part.dtype] * part.bytes for part in parts if may_encode(part)))


def buffer_bytes(
    config: StreamConfig,
    device: torch.device,
    parts: Iterable[Part],
    vram_bytes: int,
    needed_bytes: int,
) -> int:
    """Device memory that is taken beside the weights, in bytes; 0 where nothing is encoded.

    Args:
        config: What was asked for.
        device: Where the model runs.
        parts: What of its weights is streamed.
        vram_bytes: The budget.
        needed_bytes: What of it weights take at least.
    """
    if not _is_on(config, device):
        return 0
    needs_it = device.type == "cuda" or _is_fake()
    if not needs_it or not any(may_encode(part) for part in parts):
        return 0
    return decoder_bytes(config.compress, vram_bytes, needed_bytes)


def decoder_bytes(compress: str, vram_bytes: int, needed_bytes: int) -> int:
    """What a GPU takes of a budget to decode from, in bytes, if ``compress`` is not ``"off"``.

    No more than half of what is left beside ``needed_bytes``: copies need room to come early. The
    least of it is taken all the same, so that with ``needed_bytes`` it is a budget that works;
    ``"auto"`` rather does without.
    """
    left = max(0, vram_bytes - needed_bytes)
    if compress == "auto" and left < BUFFER_LEAST:
        return 0
    part = min(BUFFER_BYTES, vram_bytes // _PART, left // 2)
    return max(BUFFER_LEAST, part // MIB * MIB)


def options(
    config: StreamConfig, device: torch.device, parts: list[Part], host: HostBudget, buffer: int
) -> dict[str, Any]:
    """What ``torch.ops.dgls.create`` is told of it.

    Args:
        config: What was asked for.
        device: Where the model runs.
        parts: All that the engine moves, in its order.
        host: What of the host's memory may be used.
        buffer: What `buffer_bytes` said.

    Raises:
        torch.OutOfMemoryError: The buffer does not fit.
    """
    if not _is_on(config, device):
        return {}
    return {
        "encode": _MODES[config.compress],
        "encodable": _numbers(parts, torch.bfloat16),
        "encodable_fp8": _numbers(parts, torch.float8_e4m3fn),
        "encoded_bytes": host.encoded_bytes,
        "locked_bytes": host.locked_bytes,
        "decode_buffer": empty_arena(buffer, device) if buffer else None,
    }


def _numbers(parts: list[Part], dtype: torch.dtype) -> list[int]:
    """Of which of them may be encoded."""
    return [n for n, part in enumerate(parts) if part.dtype == dtype and may_encode(part)]


def promise(number: int, parts: Iterable[Part], host: HostBudget) -> None:
    """Notes what an engine's encoded weights may come to hold, until `forget`."""
    _promised[number] = min(host.encoded_bytes, encoded_bytes(parts))


def forget(number: int) -> None:
    """The engine is closed, or was never promised anything."""
    _promised.pop(number, None)


def promised_bytes() -> int:
    """Host memory that engines may still take for encoded weights: available, but not free."""
    return sum(max(0, most - _held_bytes(number)) for number, most in list(_promised.items()))


def _held_bytes(number: int) -> int:
    try:
        return int(torch.ops.dgls.stats(number)[16])
    except RuntimeError:  # it was closed just now, or is another process's
        return 0


def _is_on(config: StreamConfig, device: torch.device) -> bool:
    """Whether weights may be encoded; ``"auto"`` decides by times, which only ``adapt`` takes."""
    if config.compress == "off" or (config.compress == "auto" and not config.adapt):
        return False
    # There must be a link that fewer bytes take less time on.
    return device.type == "cuda" or _is_fake() or config.copy_bytes_per_s is not None


def _is_fake() -> bool:
    return os.environ.get("DGLS_TEST_DRIVER", "auto") == "cuda"

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

_SHARE, _BUFFER_LEAST = 32, 32 * MIB

LEAST_BYTES = MIB
"""Smaller tensors go as they are: the link's latency is most of what they take."""

_MODES = {"off": 0, "auto": 1, "on": 2}


def may_encode(part: Part) -> bool:
    """Whether these bytes are worth a try."""
    return part.dtype == torch.bfloat16 and part.bytes >= LEAST_BYTES


def buffer_bytes(
    config: StreamConfig, device: torch.device, parts: Iterable[Part], vram_bytes: int
) -> int:
    """Device memory that is taken beside the weights, in bytes; 0 where nothing is encoded."""
    if not _is_on(config, device):
        return 0
    needs_it = device.type == "cuda" or _is_fake()
    if not needs_it or not any(may_encode(part) for part in parts):
        return 0
    return max(_BUFFER_LEAST, min(BUFFER_BYTES, vram_bytes // _SHARE // MIB * MIB))


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
        "encodable": [number for number, part in enumerate(parts) if may_encode(part)],
        "encoded_bytes": host.encoded_bytes,
        "locked_bytes": host.locked_bytes,
        "decode_buffer": empty_arena(buffer, device) if buffer else None,
    }


def _is_on(config: StreamConfig, device: torch.device) -> bool:
    """Whether weights may be encoded; ``"auto"`` decides by times, which only ``adapt`` takes."""
    if config.compress == "off" or (config.compress == "auto" and not config.adapt):
        return False
    # There must be a link that fewer bytes take less time on.
    return device.type == "cuda" or _is_fake() or config.copy_bytes_per_s is not None


def _is_fake() -> bool:
    return os.environ.get("DGLS_TEST_DRIVER", "auto") == "cuda"

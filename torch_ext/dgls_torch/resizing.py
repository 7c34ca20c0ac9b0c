"""Another budget for an engine that runs: what stays on the device is moved there, not fetched."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from dgls_torch import _C
from dgls_torch.arena import empty_arena, has_room

if TYPE_CHECKING:
    from dgls_torch.native import Engine

_ops = torch.ops.dgls


def resize(engine: Engine, vram_bytes: int) -> None:
    """Plans anew for another budget, with the order and the times learned so far.

    Where there is no room for both arenas the old one goes first, and all is fetched again. Blocks
    until the device is done with the old plan.

    Raises:
        torch.OutOfMemoryError: The new arena does not fit; the engine has its old budget then, or
            is closed where not even that fits any more.
        RuntimeError: A block runs, or the device refuses.
    """
    with engine._rebuilding:
        arena = None
        budget = vram_bytes - engine._layout.outside_bytes
        size = _size(engine, budget)
        if has_room(size, engine._layout.device):
            with contextlib.suppress(RuntimeError):
                arena = empty_arena(size, engine._layout.device)
        if arena is None:
            _vacate(engine)
        try:
            _settle(engine, arena, budget)
        except BaseException:
            if arena is None:
                _settle_again(engine)
            raise
        engine.vram_bytes, engine._budget = vram_bytes, budget
    engine._watch_peak()


def _size(engine: Engine, budget: int) -> int:
    return min(budget, sum(engine._layout.block_bytes))


def _vacate(engine: Engine) -> None:
    device = engine._layout.device
    _ops.vacate(engine.number, torch.empty(0, dtype=torch.uint8, device=device))
    for capsule, made in zip(engine._capsules, engine._made, strict=True):
        _C.set_views(capsule, [])
        made.clear()
    engine._arena = torch.empty(0, dtype=torch.uint8)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else the smaller arena would hold the larger one's segment


def _settle(engine: Engine, arena: torch.Tensor | None, budget: int) -> None:
    if arena is None:
        arena = empty_arena(_size(engine, budget), engine._layout.device)
    _ops.rebuild(engine.number, arena, budget)
    engine._arena = arena
    engine._bind_views()


def _settle_again(engine: Engine) -> None:
    try:
        _settle(engine, None, engine._budget)
    except BaseException:
        engine.close()
        raise

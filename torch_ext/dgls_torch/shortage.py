"""Decides what becomes of a plan when the device runs out of memory: at set-up, and in a pass."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import torch

from dgls_torch.native import Engine
from dgls_torch.units import GIB, KIB, MIB, format_bytes

if TYPE_CHECKING:
    from dgls_torch.config import StreamConfig
    from dgls_torch.layout import Layout
    from dgls_torch.report import Report

_TRIED = re.compile(r"Tried to allocate ([0-9.]+) (GiB|MiB|KiB|bytes)")
_UNITS = {"GiB": GIB, "MiB": MIB, "KiB": KIB, "bytes": 1}


def engine_that_fits(layout: Layout, config: StreamConfig, rebuild: Any) -> Engine:
    """Makes an engine; where the planner chose the budget, it tries a smaller one once.

    What is free may be in pieces, or another program's by now. A budget that was given is an order.

    Raises:
        torch.OutOfMemoryError: Neither fits. The message has the numbers.
    """
    try:
        return Engine(layout, config, rebuild)
    except torch.OutOfMemoryError:
        wanted = layout.vram_bytes
        smaller = min(_less(layout, wanted, 0), _free_now(layout, config))
        if config.vram_bytes is not None or not layout.least_bytes <= smaller < wanted:
            raise
    # Outside of the handler, which would keep alive what the first try made.
    try:
        made = Engine(layout, config, rebuild, vram_bytes=smaller)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"the weights need {format_bytes(layout.least_bytes)} on {layout.device} at least; "
            f"neither {format_bytes(wanted)} nor {format_bytes(smaller)} could be had: free "
            f"device memory, or give a smaller vram ({error})"
        ) from error
    layout.vram_bytes = smaller
    return made


class Shortage:
    """A pass that ran out of device memory, until the next one begins."""

    def __init__(self) -> None:
        """No pass has."""
        self._missing_bytes: int | None = None
        self._last: str | None = None

    @property
    def is_noted(self) -> bool:
        """Whether the next pass is to begin with a smaller plan."""
        return self._missing_bytes is not None

    def note(
        self, error: BaseException, layout: Layout, vram_bytes: int, config: StreamConfig
    ) -> None:
        """Says in the error what helps; where the planner chooses, notes to do it.

        Not at once: the exception keeps the activations alive, and the caller may be about to give
        up. And a pass is not run again by itself: it may have drawn random numbers or filled a
        cache.
        """
        tried = _TRIED.search(str(error))
        missing = int(float(tried[1]) * _UNITS[tried[2]]) if tried else 0
        smaller = _less(layout, vram_bytes, missing)
        held = f"the weights hold {format_bytes(vram_bytes)} of {layout.device}"
        if smaller >= vram_bytes:
            hint = f"{held}, and no less will do"
        elif config.vram_bytes is None:
            self._missing_bytes = missing
            hint = f"{held}; from the next pass on {format_bytes(smaller)}: call the model again"
        else:
            hint = (
                f"{held}, as ordered; replan() with less, down to "
                f"{format_bytes(layout.least_bytes)}, leaves more for the rest"
            )
        error.args = (f"{error}\ndgls_torch: {hint}",)
        self._last = str(error)

    def told(self, engine: Engine) -> Report:
        """The engine's report with the last shortage, of which the engine does not know."""
        report = engine.report()
        last = () if self._last is None else (self._last,)
        return dataclasses.replace(report, last_errors=(*report.last_errors, *last))

    def take(self, layout: Layout, vram_bytes: int) -> int | None:
        """The budget of the next pass, once; ``None`` where there is none to change to."""
        missing, self._missing_bytes = self._missing_bytes, None
        smaller = vram_bytes if missing is None else _less(layout, vram_bytes, missing)
        if layout.device.type == "cuda":
            torch.cuda.empty_cache()
        return smaller if smaller < vram_bytes else None


def _less(layout: Layout, vram_bytes: int, missing_bytes: int) -> int:
    """A budget with what was missing for the rest, and at least a quarter of the blocks' part.

    A quarter: a pass that ran out once has more to allocate than what it was refused.
    """
    room = max(0, vram_bytes - layout.outside_bytes)
    blocks = min(room, sum(layout.block_bytes))
    smaller = layout.outside_bytes + blocks - max(missing_bytes, blocks // 4)
    return max(layout.least_bytes, smaller)


def _free_now(layout: Layout, config: StreamConfig) -> int:
    """What the planner would choose now that nothing is held but the weights outside of blocks."""
    if layout.device.type != "cuda":
        return layout.vram_bytes
    torch.cuda.empty_cache()
    # The buffer to decode from is not held yet.
    return layout.budget(config, None) + layout.outside_bytes - layout.decode_bytes

"""The host's time around each block: in the hooks before and after it, and in its forward."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bench.account import Account

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn


def around(block: nn.Module, tick: Callable[[int], Callable[..., None]]) -> list[Any]:
    """Registers hooks around those that a block has, before and after its forward; their handles.

    ``tick(0)`` is called before all others and ``tick(1)`` after them, both ahead of the forward,
    and so ``tick(2)`` and ``tick(3)`` behind it.
    """
    return [
        block.register_forward_pre_hook(tick(0), prepend=True),
        block.register_forward_pre_hook(tick(1)),
        block.register_forward_hook(tick(2), prepend=True),
        block.register_forward_hook(tick(3)),
    ]


class HookClock:
    """Four hooks on each block; the engine's own run between the first two and the last two."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        """Registers them; an engine must have been attached before."""
        self._walls: list[tuple[float, float, float, float]] = []
        self._cpus: list[tuple[float, float]] = []
        self._now = [0.0] * 4
        self._cpu = [0.0] * 4
        self._handles: list[Any] = []
        for block in blocks:
            self._handles += around(block, self._tick)

    def _tick(self, index: int) -> Callable[..., None]:
        def tick(*_: Any) -> None:
            self._now[index] = time.perf_counter()
            self._cpu[index] = time.thread_time()
            if index == 3:
                t, cpu = self._now, self._cpu
                self._walls.append((t[0], t[1], t[2], t[3]))
                self._cpus.append((cpu[1] - cpu[0], cpu[3] - cpu[2]))

        return tick

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def account(self, passes: int, spent_s: float) -> Account:
        """The account of passes that took ``spent_s`` together, where the host is the device.

        A hook that waits uses no processor: the rest of its time is the exposed copy.
        """
        waits = hooks = compute = 0.0
        for (a, b, c, d), (before, after) in zip(self._walls, self._cpus, strict=True):
            used = min(before, b - a) + min(after, d - c)
            hooks += used
            waits += (b - a) + (d - c) - used
            compute += c - b
        launch = spent_s - compute - waits - hooks
        count = len(self._walls) // passes
        return Account(
            compute=compute / passes,
            exposed_copy=waits / passes,
            launch=(launch + hooks) / passes,
            kernels=count,
            hooks=hooks / passes,
        )

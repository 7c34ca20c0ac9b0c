"""The policy of the original DGLS, re-stated as its schedule.

The biggest blocks stay, first come first, until one does not fit; the rest is a contiguous tail.
A block that is missing is fetched together with the ``prefetch`` after it, parameter by parameter,
from memory that is not page-locked and on the compute stream; what is not needed is let go first.
Nothing is fetched while the needed block is there, so nothing overlaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bench.engines import Attached
from bench.links import Link, open_link
from bench.stacks import weight_bytes

if TYPE_CHECKING:
    from torch import nn

    from bench.engines import Setup
    from bench.stacks import Block

_OVERHEAD = 1.1
"""Of its largest block for each block on the device at a time, as the original reckons."""


def residents(sizes: list[int], budget: int, prefetch: int) -> set[int]:
    """The blocks that stay: by size, stopping at the first that does not fit."""
    room = budget - _OVERHEAD * max(sizes) * (prefetch + 1)
    chosen: set[int] = set()
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if sizes[index] > room:
            break
        room -= sizes[index]
        chosen.add(index)
    return chosen


class Swapper:
    """Holds ``prefetch + 1`` blocks of the tail."""

    def __init__(self, tail: list[Block], prefetch: int, link: Link) -> None:
        """Remembers the masters."""
        self._tail, self._link, self._span = tail, link, prefetch + 1
        self._masters: list[list[tuple[nn.Parameter, torch.Tensor]]] = [
            [(parameter, parameter.data) for parameter in block.parameters()] for block in tail
        ]
        self._held: set[int] = set()
        for index, block in enumerate(tail):
            block.register_forward_pre_hook(lambda *_, i=index: self._enter(i))

    def _enter(self, index: int) -> None:
        if index in self._held:
            return
        span = min(self._span, len(self._tail))
        needed = {(index + ahead) % len(self._tail) for ahead in range(span)}
        for other in self._held - needed:
            for parameter, master in self._masters[other]:
                parameter.data = master
        missing = sorted(needed - self._held, key=lambda i: (i - index) % len(self._tail))
        for other in missing:
            for parameter, master in self._masters[other]:
                slot = torch.empty_like(master, device=self._link.device)
                self._link.blocking_copy(slot, master)
                parameter.data = slot
        self._held = needed


def attach(setup: Setup, prefetch: int = 1) -> Attached:
    """Keeps the residents and swaps the tail."""
    stack, link = setup.stack, open_link(setup.device, setup.link_bytes_per_s)
    sizes = [weight_bytes(block) for block in stack.order]
    least = int(max(sizes) * (prefetch + 1))
    if setup.budget_bytes < least:
        raise ValueError(f"needs {least} bytes, found a budget of {setup.budget_bytes} bytes")
    stay = residents(sizes, setup.budget_bytes, prefetch)
    for part in (stack.inp, stack.out, *(stack.order[i] for i in stay)):
        part.to(setup.device)
    tail = [block for i, block in enumerate(stack.order) if i not in stay]
    if tail:
        Swapper(tail, prefetch, link)

    def facts() -> dict[str, Any]:
        return {"residents": len(stay), "prefetch": prefetch}

    return Attached(stack, link.close, facts)

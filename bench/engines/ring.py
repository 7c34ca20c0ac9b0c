"""The bar that plain Python sets: flat page-locked blocks, two device buffers, events.

Residents are evenly spaced and the prefetch carries over from one pass to the next. The hooks are
torch's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bench.cells import even_residents
from bench.engines import Attached
from bench.links import Link, open_link
from bench.stacks import weight_bytes

if TYPE_CHECKING:
    from torch import nn

    from bench.engines import Setup
    from bench.stacks import Block

Binding = tuple["nn.Parameter", int, int, torch.Size]


class Ring:
    """Use ``u`` runs streamed block ``u % blocks`` from buffer ``u % slots``."""

    def __init__(self, blocks: list[Block], slots: int, link: Link) -> None:
        """Packs each block into one host buffer and lets go of its own weights."""
        self._link, self._count, self._slots_count = link, len(blocks), slots
        size = max(map(weight_bytes, blocks), default=0)
        self._slots = [
            torch.empty(size, dtype=torch.uint8, device=link.device) for _ in range(slots)
        ]
        self._ready = [link.mark() for _ in self._slots]
        self._free = [link.mark() for _ in self._slots]
        self._flat = [self._pack(block) for block in blocks]
        self._sent = self._used = 0
        for block in blocks:
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave)

    def _pack(self, block: Block) -> tuple[torch.Tensor, list[Binding]]:
        flat, at = self._link.host_buffer(weight_bytes(block)), 0
        bindings: list[Binding] = []
        # The widest first, so that every view is aligned to its element.
        for parameter in sorted(block.parameters(), key=lambda p: -p.element_size()):
            size = parameter.numel() * parameter.element_size()
            flat[at : at + size].copy_(parameter.data.reshape(-1).view(torch.uint8))
            bindings.append((parameter, at, size, parameter.shape))
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._link.device)
            at += size
        return flat, bindings

    def _fill(self) -> None:
        while self._sent < self._used + self._slots_count:
            slot = self._sent % self._slots_count
            flat = self._flat[self._sent % self._count][0]
            self._link.copies_wait(self._free[slot])
            self._link.copy(self._slots[slot][: flat.numel()], flat)
            self._link.record_copies(self._ready[slot])
            self._sent += 1

    def _enter(self, *_: Any) -> None:
        self._fill()
        slot = self._used % self._slots_count
        self._link.compute_waits(self._ready[slot])
        for parameter, at, size, shape in self._flat[self._used % self._count][1]:
            raw = self._slots[slot][at : at + size]
            parameter.data = raw.view(parameter.dtype).view(shape)

    def _leave(self, *_: Any) -> None:
        self._link.record_compute(self._free[self._used % self._slots_count])
        self._used += 1
        self._fill()


def attach(setup: Setup) -> Attached:
    """Keeps what fits beside the buffers, and rings the rest through them."""
    stack, link = setup.stack, open_link(setup.device, setup.link_bytes_per_s)
    ends = weight_bytes(stack.inp) + weight_bytes(stack.out)
    sizes = [weight_bytes(block) for block in stack.order]
    residents = even_residents(sizes, setup.budget_bytes - ends, setup.slots)
    for part in (stack.inp, stack.out, *(stack.order[i] for i in residents)):
        part.to(setup.device)
    streamed = [block for i, block in enumerate(stack.order) if i not in residents]
    if streamed:
        Ring(streamed, setup.slots, link)
    return Attached(stack, link.close, lambda: {"residents": len(residents)})

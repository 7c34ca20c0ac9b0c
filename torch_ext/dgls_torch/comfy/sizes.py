"""How many bytes a model's blocks and the rest of it take, before anything is moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgls_torch.layout import aligned
from dgls_torch.units import format_bytes
from dgls_torch.weights import inner_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

    from dgls_torch.comfy.containers import Named


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a whole model, and of each block as it lies in the arena."""

    total_bytes: int
    outside_bytes: int
    blocks: tuple[tuple[str, int], ...]

    @property
    def largest(self) -> tuple[str, int]:
        """The largest block, which sets the smallest budget."""
        return max(self.blocks, key=lambda block: block[1])

    @property
    def least_bytes(self) -> int:
        """The smallest budget that works: all that is outside, and the largest block."""
        return self.outside_bytes + self.largest[1]

    def check(self, vram_bytes: int) -> None:
        """Refuses a budget that is too small.

        Raises:
            ValueError: With the sizes and the smallest budget that works.
        """
        if vram_bytes >= self.least_bytes:
            return
        name, size = self.largest
        raise ValueError(
            f"vram is {format_bytes(vram_bytes)}, which is too small for this model: what is not "
            f"in blocks takes {format_bytes(self.outside_bytes)} and the largest block, '{name}', "
            f"{format_bytes(size)}; allowed is auto or at least {format_bytes(self.least_bytes)} "
            f"({self.least_bytes} bytes)"
        )


def measure(model: nn.Module, blocks: Iterable[Named]) -> Sizes:
    """Measures ``model``, of which ``blocks`` are streamed and the rest is not."""
    blocks = list(blocks)
    total = sum(_unique(model.parameters())) + sum(_bytes(b) for b in model.buffers())
    inside = {id(p): _bytes(p) for _, block in blocks for p in block.parameters()}
    sizes = tuple((name, sum(map(_aligned, block.parameters()))) for name, block in blocks)
    outside = total - sum(inside.values())
    return Sizes(total_bytes=total, outside_bytes=outside, blocks=sizes)


def _unique(params: Iterable[torch.Tensor]) -> Iterable[int]:
    return {id(p): _bytes(p) for p in params}.values()


def _bytes(tensor: torch.Tensor) -> int:
    plain = inner_tensors(tensor) or [tensor]
    return sum(t.numel() * t.element_size() for t in plain)


def _aligned(tensor: torch.Tensor) -> int:
    plain = inner_tensors(tensor) or [tensor]
    return sum(aligned(t.numel() * t.element_size()) for t in plain)

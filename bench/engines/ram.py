"""RamTorch's OffloadModel: a loader thread, a window of chunks, pinned layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ramtorch import OffloadModel

from bench.cells import even_residents
from bench.engines import Attached
from bench.stacks import weight_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from bench.engines import Setup


def attach(setup: Setup) -> Attached:
    """Gives it the stack as a list of chunks, with the same residents as others get."""
    stack = setup.stack
    chunks = [stack.inp, *stack.order, stack.out]
    ends = weight_bytes(stack.inp) + weight_bytes(stack.out)
    sizes = [weight_bytes(block) for block in stack.order]
    residents = even_residents(sizes, setup.budget_bytes - ends, setup.slots)
    pinned = [0, len(chunks) - 1, *(i + 1 for i in sorted(residents))]
    model = OffloadModel(chunks, device=setup.device, window=setup.slots, pin_layers=pinned)

    def step(x: Tensor, c: Tensor) -> Tensor:
        out: Tensor = model((x, c))[0]
        return out

    def facts() -> dict[str, Any]:
        return {"residents": len(residents)}

    return Attached(step, model.close, facts)

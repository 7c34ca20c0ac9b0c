"""accelerate's cpu_offload: blocking copies of single tensors, as their modules run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate import cpu_offload

from bench.cells import even_residents
from bench.engines import Attached
from bench.stacks import weight_bytes

if TYPE_CHECKING:
    from bench.engines import Setup


def attach(setup: Setup) -> Attached:
    """Hides the residents from it, which is a favour: it has no budget of its own."""
    stack = setup.stack
    sizes = [weight_bytes(block) for block in stack.order]
    residents = even_residents(sizes, setup.budget_bytes, 1)
    stack.hide(residents, setup.device)
    for parameter in stack.blocks.parameters():  # another favour: it does not page-lock
        parameter.data = parameter.data.pin_memory()
    cpu_offload(stack, execution_device=setup.device)
    return Attached(stack, lambda: None, lambda: {"residents": len(residents)})

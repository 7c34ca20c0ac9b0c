"""diffusers' group offload, by blocks or leaves, with a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers.hooks import apply_group_offloading

from bench.cells import even_residents
from bench.engines import Attached
from bench.stacks import weight_bytes

if TYPE_CHECKING:
    from bench.engines import Setup


def attach(setup: Setup, kind: str, record_stream: bool) -> Attached:
    """Hides the residents from it, which is a favour: it copies all that it sees in every pass.

    The ends stay in the registry: a root that has nothing outside of its ModuleList would run
    without any prefetch in 0.42.1.
    """
    stack = setup.stack
    ends = weight_bytes(stack.inp) + weight_bytes(stack.out)
    sizes = [weight_bytes(block) for block in stack.order]
    residents = even_residents(sizes, setup.budget_bytes - ends, setup.slots)
    stack.hide(residents, setup.device)
    apply_group_offloading(
        stack,
        onload_device=setup.device,
        offload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
        non_blocking=True,
        use_stream=setup.device.type == "cuda",
        record_stream=record_stream and setup.device.type == "cuda",
        low_cpu_mem_usage=False,
    )
    return Attached(stack, lambda: None, lambda: {"residents": len(residents)})

"""cache-dit's layerwise offload: leaves, with evenly spread persistent ones and a byte budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cache_dit

from bench.cells import even_residents
from bench.engines import Attached
from bench.stacks import weight_bytes

if TYPE_CHECKING:
    from torch import nn

    from bench.engines import Setup


def _leaves(module: nn.Module) -> int:
    """The modules that it offloads: those with parameters of their own."""
    return sum(any(True for _ in part.parameters(recurse=False)) for part in module.modules())


def attach(setup: Setup) -> Attached:
    """Gives it as many persistent leaves as the budget leaves beside its bytes in flight."""
    stack = setup.stack
    sizes = [weight_bytes(block) for block in stack.order]
    residents = even_residents(sizes, setup.budget_bytes, setup.slots)
    # Its persistent leaves are counted, not weighed: the share of leaves is the share of bytes.
    share = sum(sizes[i] for i in residents) / sum(sizes)
    persistent = int(share * _leaves(stack))
    on_cuda = setup.device.type == "cuda"
    handle = cache_dit.layerwise_offload(
        stack,
        onload_device=setup.device,
        offload_device="cpu",
        async_transfer=on_cuda,
        transfer_buckets=4,
        prefetch_limit=True,
        max_copy_streams=4 if on_cuda else None,
        max_inflight_prefetch_bytes=setup.slots * max(sizes),
        persistent_buckets=persistent,
        persistent_bins=max(1, len(residents)),
    )
    return Attached(stack, handle.remove, lambda: {"persistent_leaves": persistent})

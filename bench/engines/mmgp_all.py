"""mmgp's shuttle: evenly spaced preloaded blocks and two more in turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from mmgp import offload

from bench.engines import Attached
from bench.stacks import CastLinear

if TYPE_CHECKING:
    from bench.engines import Setup

_MIB = 1 << 20


def attach(setup: Setup) -> Attached:
    """Gives it the budget by model, in MiB: it ignores a bare number."""
    for module in setup.stack.modules():
        if isinstance(module, CastLinear):  # it takes one dtype, but for modules marked like this
            module._lock_dtype = module.weight.dtype  # type: ignore[assignment]
    handle = offload.all(
        {"transformer": setup.stack},
        pinnedMemory=setup.device.type == "cuda",
        quantizeTransformer=False,
        asyncTransfers=True,
        budgets={"transformer": setup.budget_bytes / _MIB},
        convertWeightsFloatTo=None,
        perc_reserved_mem_max=0.9,
        verboseLevel=1,
    )
    torch.set_default_device("cpu")  # it leaves CUDA behind
    return Attached(setup.stack, handle.release)

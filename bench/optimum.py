"""What the best of all policies could reach in a cell, by the planner's own proof.

The planner solves a linear program whose solution no policy beats, whatever it keeps and copies
when (docs/plan-format.md). It knows the blocks' bytes and what each of them computes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

import dgls_torch  # noqa: F401 - registers the planner
from bench.stacks import weight_bytes

if TYPE_CHECKING:
    from bench.stacks import Stack


def optimum_s(
    stack: Stack, budget_bytes: int, link_bytes_per_s: float, block_s: list[float], compute_s: float
) -> float:
    """Seconds of a pass that no policy beats.

    Args:
        stack: The model; only its sizes count.
        budget_bytes: For all weights and every buffer.
        link_bytes_per_s: The measured rate.
        block_s: What each block computes; scaled so that all together take ``compute_s``.
        compute_s: A pass of the resident model.
    """
    sizes = [weight_bytes(block) for block in stack.order]
    room = budget_bytes - weight_bytes(stack.inp) - weight_bytes(stack.out)
    if sum(sizes) <= room:
        return compute_s
    scale = compute_s / sum(block_s)
    blocks = [
        {"bytes": size, "tensor_bytes": [size], "compute_s": scale * seconds}
        for size, seconds in zip(sizes, block_s, strict=True)
    ]
    question = {"blocks": blocks, "budget_bytes": room, "h2d_bytes_per_s": link_bytes_per_s}
    question |= {"copy_latency_s": 0.0, "verify": True}
    answer = json.loads(torch.ops.dgls.plan.json(json.dumps(question)))
    return float(answer["optimum_s"])

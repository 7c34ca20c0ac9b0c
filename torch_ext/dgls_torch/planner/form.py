"""The planner's own form: JSON of numbers in, JSON of a plan out; see docs/plan-format.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dgls_torch.planner.sizes import ModelSizes

Inputs = dict[str, Any]


class DoesNotFit(ValueError):
    """No plan exists within the budget.

    Attributes:
        block: The index of the block that does not fit.
        need_bytes: What it needs.
        budget_bytes: The budget of all blocks.
        text: The planner's answer as JSON.
    """

    def __init__(self, block: int, need_bytes: int, budget_bytes: int, text: str) -> None:
        """Says so with the numbers."""
        super().__init__(
            f"block {block} needs {need_bytes} bytes and the budget is {budget_bytes} bytes"
        )
        self.block, self.need_bytes = block, need_bytes
        self.budget_bytes, self.text = budget_bytes, text


@dataclass(frozen=True)
class Copy:
    """One copy of a cycle: ``bytes`` of a block's streamed bytes from ``source`` on, to ``target``.

    ``wait`` is a block and a lag: the copy may start when the compute of that block in the pass
    ``lag`` passes before has ended. ``pass_number`` is the pass of the cycle, from 0 on.
    """

    block: int
    source: int
    target: int
    bytes: int
    wait: tuple[int, int] | None
    pass_number: int = 0


@dataclass(frozen=True)
class Solution:
    """A plan; the attributes are the fields of the form, and ``text`` is all of it as JSON."""

    resident_bytes: tuple[int, ...]
    streamed_bytes: tuple[int, ...]
    buffer_bytes: int
    copies: tuple[Copy, ...]
    passes: int
    period_s: float
    lower_bound_s: float
    limit: str
    optimum_s: float | None
    text: str


def make_inputs(
    sizes: ModelSizes,
    budget_bytes: int,
    compute_s: Sequence[float],
    h2d_bytes_per_s: float,
    copy_latency_s: float,
    **options: Any,
) -> Inputs:
    """Writes a model down in the planner's form; options that are ``None`` are left out."""
    entries = zip((block.tensor_bytes for block in sizes.blocks), compute_s, strict=True)
    blocks = [
        {
            "bytes": sum(tensor_bytes),
            "compute_s": seconds,
            "count": len(list(same)),
            "tensor_bytes": list(tensor_bytes),
        }
        for (tensor_bytes, seconds), same in groupby(entries)
    ]
    inputs = {
        "blocks": blocks,
        "budget_bytes": budget_bytes,
        "h2d_bytes_per_s": h2d_bytes_per_s,
        "copy_latency_s": copy_latency_s,
        "static_addresses": False,  # as streams are planned, unless their plan is to stay
    }
    return inputs | {name: value for name, value in options.items() if value is not None}


def block_sizes(inputs: Inputs) -> list[int]:
    """Bytes of each block of inputs that the planner took, counted out."""
    return [entry["bytes"] for entry in inputs["blocks"] for _ in range(entry.get("count", 1))]


def compute_seconds(inputs: Inputs) -> float:
    """Seconds of a pass without a stall, of inputs that the planner took."""
    inside = sum(entry["compute_s"] * entry.get("count", 1) for entry in inputs["blocks"])
    return float(inside + inputs.get("outside_s", 0.0))


def solve(inputs: Inputs) -> Solution:
    """Asks the planner.

    Raises:
        ValueError: It refuses the inputs; the message names the field, the value and the range.
        DoesNotFit: There is no plan.
    """
    try:
        text = str(torch.ops.dgls.plan.json(json.dumps(inputs)))
    except RuntimeError as error:
        # torch appends its C++ stack when it is asked to.
        raise ValueError(str(error).strip().splitlines()[0]) from error
    return _parse(text)


def _parse(text: str) -> Solution:
    found = json.loads(text)
    if found.get("infeasible"):
        raise DoesNotFit(found["block"], found["need_bytes"], found["budget_bytes"], text)
    return Solution(
        resident_bytes=tuple(found["resident_bytes"]),
        streamed_bytes=tuple(found["streamed_bytes"]),
        buffer_bytes=found["buffer"]["bytes"],
        copies=tuple(
            Copy(
                block=copy["block"],
                source=copy["src"],
                target=copy["dst"],
                bytes=copy["bytes"],
                wait=tuple(copy["wait"]) if copy["wait"] else None,
                pass_number=copy.get("pass", 0),
            )
            for copy in found["copies"]
        ),
        passes=found.get("passes", 1),
        period_s=found["period_s"],
        lower_bound_s=found["lower_bound_s"],
        limit=found["limit"],
        optimum_s=found.get("optimum_s"),
        text=text,
    )

"""What a plan promises, for people: a table, the predicted pass, its bound, and what would help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgls_torch.planner.encoded import HIDES
from dgls_torch.planner.form import DoesNotFit, block_sizes, compute_seconds, solve
from dgls_torch.planner.sweep import least_budget
from dgls_torch.report import BlockPlan
from dgls_torch.tables import block_table, table
from dgls_torch.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dgls_torch.planner.encoded import Encoded
    from dgls_torch.planner.form import Inputs, Solution

# Less than this is within what a prediction is worth.
_WORTH = 0.98
# What of the inputs is a choice taken from the planner.
_BY_ORDER = {"resident", "prefetch"}


@dataclass(frozen=True)
class Forecast:
    """The plan of a model that was not attached. Sizes are bytes, times seconds of one pass.

    Attributes:
        blocks: What of each block stays on the device and what is streamed.
        vram_bytes: The budget; ``outside_bytes`` of it are taken by all that is no block.
        least_vram_bytes: The smallest budget with a plan.
        compute_s: The pass without a stall; 0 when no compute times were given.
        batched_s: Two passes run as one, their compute doubled and the copies made once; ``None``
            where one pass has no stall already.
        automatic_s: The pass if residents and prefetch were left to the planner; ``None`` where
            they are.
        solution: The plan as the planner gave it, with each copy.
        inputs: What the planner was asked, in its own form.
        encoded: What goes over the link encoded; the rate in ``inputs`` is then that of the weights
            as they are used.
    """

    blocks: tuple[BlockPlan, ...]
    vram_bytes: int
    outside_bytes: int
    least_vram_bytes: int
    compute_s: float
    batched_s: float | None
    automatic_s: float | None
    solution: Solution
    inputs: Inputs
    encoded: Encoded | None = None

    @property
    def period_s(self) -> float:
        """Predicted seconds of a pass."""
        return self.solution.period_s

    @property
    def bound_s(self) -> float:
        """What no schedule can beat: the compute, or the bytes that do not fit over the link."""
        return self.solution.lower_bound_s

    @property
    def least_outside_bytes(self) -> int:
        """What of the smallest budget is no block's."""
        return _least_outside(self.outside_bytes, self.encoded)

    @property
    def efficiency(self) -> float | None:
        """``bound_s / period_s``; ``None`` without compute times."""
        if self.compute_s == 0.0 or self.period_s == 0.0:
            return None
        return self.bound_s / self.period_s

    @property
    def streamed_bytes(self) -> int:
        """Bytes copied in each pass."""
        return sum(block.streamed_bytes for block in self.blocks)

    @property
    def used_bytes(self) -> int:
        """What of the budget the plan takes."""
        return self.outside_bytes + sum(self.solution.resident_bytes) + self.solution.buffer_bytes

    def __str__(self) -> str:
        """The forecast as a table; neighbours of one size share a row."""
        whole = sum(b.resident_bytes + b.streamed_bytes for b in self.blocks)
        buffer = ""
        if self.encoded is not None:
            buffer = f", {format_bytes(self.encoded.buffer_bytes)} of them to decode from"
        lines = [
            f"plan for {format_bytes(self.vram_bytes)}: {format_bytes(self.used_bytes)} used, "
            f"{format_bytes(self.least_vram_bytes)} would do",
            f"  outside of blocks {format_bytes(self.outside_bytes)}{buffer}, which come off the "
            "budget first",
            f"  blocks {format_bytes(whole)}, of which streamed in each pass "
            f"{format_bytes(self.streamed_bytes)}",
        ]
        copies = len(self.solution.copies) // self.solution.passes
        if copies:
            through = f"  through a buffer of {format_bytes(self.solution.buffer_bytes)}"
            lines.append(f"{through}, in {copies} {'copies' if copies > 1 else 'copy'}")
        else:
            lines.append("  everything fits: nothing is streamed")
        if copies and self.encoded is not None:
            held = format_bytes(self.encoded.held_bytes(self.streamed_bytes))
            share = f"{100 * self.encoded.share:.0f} %"
            lines.append(
                f"  encoded on the link, {share} of the bytes: {held} of host memory at most"
            )
        return "\n".join([*lines, *block_table(self.blocks), *self._times(), *self._advice()])

    def _times(self) -> list[str]:
        alone = "" if self.compute_s else " (copies alone: no compute time is known)"
        rows = [("predicted pass", f"{format_seconds(self.period_s)}{alone}")]
        if self.compute_s:
            rows.append(("compute", format_seconds(self.compute_s)))
        latency = format_seconds(self.inputs["copy_latency_s"])
        used = self.inputs["h2d_bytes_per_s"]
        of_weights = "" if self.encoded is None else f"; of encoded weights {format_rate(used)}"
        rate = format_rate(self._link_bytes_per_s)
        rows.append(("link", f"{rate}, {latency} for each copy{of_weights}"))
        limit = "copies" if self._copies_decide else "compute"
        of = f" (the {limit})" if self.compute_s else ""
        rows.append(("bound", f"{format_seconds(self.bound_s)}{of}"))
        if self.efficiency is not None:
            rows.append(("efficiency", f"{100 * self.efficiency:.1f} % of the bound"))
        if self.solution.optimum_s is not None:
            optimum = format_seconds(self.solution.optimum_s)
            rows.append(("optimum", f"{optimum} over all policies, without latency"))
        return table(rows)

    @property
    def _copies_decide(self) -> bool:
        """Whether the bound is the copies'; sums of seconds differ in their last digits."""
        return self.bound_s > self.compute_s * (1 + 1e-9)

    @property
    def _link_bytes_per_s(self) -> float:
        share = 1.0 if self.encoded is None else self.encoded.share
        return share * float(self.inputs["h2d_bytes_per_s"])

    def _advice(self) -> list[str]:
        advice = []
        copies_s = self.streamed_bytes / self._link_bytes_per_s
        if self.encoded is not None and copies_s < HIDES * self.compute_s:
            advice.append('  copies hide as it is: compress="auto" would encode nothing')
        if self.automatic_s is not None and self.automatic_s < _WORTH * self.period_s:
            automatic = format_seconds(self.automatic_s)
            advice.append(f"  left to itself, the planner would take {automatic}")
        if self.compute_s == 0.0 or not self.streamed_bytes:
            return advice
        if self.solution.limit != "copy":
            return [*advice, "  compute bound: a faster link or more memory would gain nothing"]
        if self.automatic_s is not None:
            advice.append("  copy bound: a faster link or more residents shorten the pass")
        elif self._copies_decide:
            advice.append("  copy bound: more memory or a faster link shortens the pass")
        else:
            advice.append("  near balance: a little more memory would hide the rest of the copies")
        batched_s, apart_s = self.batched_s, 2 * self.period_s
        if batched_s is not None and batched_s < _WORTH * apart_s:
            both = f"{format_seconds(batched_s)} for both instead of {format_seconds(apart_s)}"
            advice.append(f"  batch the CFG passes where there are two: {both}")
        return advice


def forecast(
    inputs: Inputs,
    outside_bytes: int = 0,
    names: Sequence[str] | None = None,
    encoded: Encoded | None = None,
) -> Forecast:
    """Plans, and looks at what else the numbers say.

    Args:
        inputs: What to plan; its budget is what ``outside_bytes`` leave of the whole.
        outside_bytes: Bytes that are no block's.
        names: The blocks' names; their numbers if not given.
        encoded: What goes over the link encoded, if anything: the rate and ``outside_bytes`` have
            it in them.

    Raises:
        ValueError: The planner refuses the inputs.
        DoesNotFit: There is no plan; the message names the smallest budget that works.
    """
    check_room(inputs, outside_bytes, names)
    try:
        solution = solve(inputs)
    except DoesNotFit as error:
        raise _too_small(inputs, outside_bytes, names, error) from None
    named = names or [f"block {index}" for index in range(len(solution.resident_bytes))]
    sizes = zip(named, solution.resident_bytes, solution.streamed_bytes, strict=True)
    compute_s = compute_seconds(inputs)
    stalls = compute_s > 0.0 and solution.limit == "copy"
    is_by_order = not _BY_ORDER.isdisjoint(inputs)
    return Forecast(
        blocks=tuple(BlockPlan(*block) for block in sizes),
        vram_bytes=inputs["budget_bytes"] + outside_bytes,
        outside_bytes=outside_bytes,
        least_vram_bytes=_least_outside(outside_bytes, encoded) + least_budget(inputs),
        compute_s=compute_s,
        batched_s=solve(_doubled(inputs)).period_s if stalls else None,
        automatic_s=solve(_left_alone(inputs)).period_s if is_by_order else None,
        solution=solution,
        inputs=inputs,
        encoded=encoded,
    )


def check_room(inputs: Inputs, outside_bytes: int, names: Sequence[str] | None) -> None:
    """Refuses a budget that all that is no block takes alone: the planner has no words for it.

    Raises:
        DoesNotFit: The message names the smallest budget that works.
    """
    if outside_bytes > 0 and inputs["budget_bytes"] <= 0:
        raise _too_small(inputs, outside_bytes, names, None)


def _doubled(inputs: Inputs) -> Inputs:
    blocks = [{**entry, "compute_s": 2 * entry["compute_s"]} for entry in inputs["blocks"]]
    return inputs | {"blocks": blocks, "verify": False}


def _left_alone(inputs: Inputs) -> Inputs:
    left = {name: value for name, value in inputs.items() if name not in _BY_ORDER}
    return left | {"verify": False}


def _least_outside(outside_bytes: int, encoded: Encoded | None) -> int:
    """What is outside of blocks, and the buffer, in the smallest budget."""
    if encoded is None:
        return outside_bytes
    return outside_bytes - encoded.buffer_bytes + encoded.least_buffer_bytes


def _too_small(
    inputs: Inputs, outside_bytes: int, names: Sequence[str] | None, error: DoesNotFit | None
) -> DoesNotFit:
    sizes = block_sizes(inputs)
    block = sizes.index(max(sizes)) if error is None else error.block
    need_bytes = sizes[block] if error is None else error.need_bytes
    name = names[block] if names else f"block {block}"
    vram_bytes = inputs["budget_bytes"] + outside_bytes
    least = outside_bytes + least_budget(inputs)
    text = "" if error is None else error.text
    refused = DoesNotFit(block, need_bytes, inputs["budget_bytes"], text)
    refused.args = (
        f"vram is {format_bytes(vram_bytes)} ({vram_bytes} bytes), which is too small: the "
        f"weights outside of the blocks take {format_bytes(outside_bytes)}, and '{name}' needs "
        f"{format_bytes(need_bytes)}; the smallest budget that works is {format_bytes(least)} "
        f"({least} bytes)",
    )
    return refused

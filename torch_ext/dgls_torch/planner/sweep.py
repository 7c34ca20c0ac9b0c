"""Asks the planner about many budgets: the least, the least without a stall, and a curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgls_torch.planner.form import DoesNotFit, block_sizes, compute_seconds, solve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dgls_torch.planner.form import Inputs, Solution

# A pass counts as free of stalls up to here: the last thousandth would cost the most memory.
_FREE = 1.001
# A budget is found to this part of the blocks' bytes.
_FINE = 1 / 2048
POINTS = 12


@dataclass(frozen=True)
class Point:
    """What one budget of all blocks would give."""

    budget_bytes: int
    solution: Solution


def at_budget(inputs: Inputs, budget_bytes: int) -> Solution:
    """The plan of another budget.

    Raises:
        DoesNotFit: There is none.
    """
    # The optimum of each would take most of the time, and nobody asked for it.
    return solve(inputs | {"budget_bytes": budget_bytes, "verify": False})


def least_budget(inputs: Inputs) -> int:
    """The smallest budget of all blocks that has a plan."""

    def fits(budget_bytes: int) -> bool:
        try:
            at_budget(inputs, budget_bytes)
        except DoesNotFit:
            return False
        return True

    try:
        at_budget(inputs, 1)
    except DoesNotFit as error:
        # Blocks that stay by order may add to what the one that does not fit needs.
        if fits(error.need_bytes):
            return error.need_bytes
        return _least(fits, error.need_bytes, sum(block_sizes(inputs)), 1)
    return 1


def stall_free_budget(inputs: Inputs, least: int, known: Iterable[Point] = ()) -> int | None:
    """The smallest budget whose pass is as long as its compute.

    ``None`` without compute times, and where no budget is enough, as residents are by order.

    Args:
        inputs: What is planned; its own budget does not matter.
        least: The smallest budget with a plan.
        known: Plans that were made already: what is named is no larger than any of them shows.
    """
    free_s = compute_seconds(inputs) * _FREE
    if free_s == 0.0:
        return None

    def is_free(budget_bytes: int) -> bool:
        return at_budget(inputs, budget_bytes).period_s <= free_s

    if is_free(least):
        return least
    whole = max(least, sum(block_sizes(inputs)))
    free = [p.budget_bytes for p in known if p.solution.period_s <= free_s]
    good = min([*free, whole])
    if good == whole and not is_free(whole):
        return None
    stalls = [p.budget_bytes for p in known if p.solution.period_s > free_s]
    bad = max([least, *(budget for budget in stalls if budget < good)])
    return _least(is_free, bad, good, max(1, round(whole * _FINE)))


def _least(is_good: Callable[[int], bool], bad: int, good: int, fine: int) -> int:
    """Bisects to within ``fine`` bytes."""
    while good - bad > fine:
        middle = (bad + good) // 2
        if is_good(middle):
            good = middle
        else:
            bad = middle
    return good


def curve(inputs: Inputs, least: int, points: int = POINTS) -> list[Point]:
    """Plans for budgets from the least to the one that holds all blocks, evenly spaced."""
    most = max(least, sum(block_sizes(inputs)))
    budgets = sorted({least + (most - least) * k // (points - 1) for k in range(points)})
    return [Point(budget, at_budget(inputs, budget)) for budget in budgets]

"""The budgets that a sweep names, over a planner that is a formula.

Goal: the least budget, and the least without a stall, are found to the byte or to a part in two
thousand; a planner that is not quite monotone makes no claim that one of its plans belies.
Method: a stand-in for the planner whose answers are known in advance.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from dgls_torch.planner import sweep
from dgls_torch.planner.form import DoesNotFit, Solution
from dgls_torch.planner.sweep import Point, curve, least_budget, stall_free_budget

SIZE = 10_000


def inputs(compute_s: float = 1.0) -> dict[str, Any]:
    return {"blocks": [{"bytes": SIZE, "compute_s": compute_s, "count": 10}], "verify": True}


def solution(period_s: float) -> Solution:
    return Solution((), (), 0, (), 1, period_s, 0.0, "copy", None, "")


@pytest.fixture
def planner(monkeypatch: Any) -> dict[str, Any]:
    """Answers as told; ``asked`` keeps the budgets."""
    told: dict[str, Any] = {"least": SIZE, "need": SIZE, "period": lambda budget: 10.0, "asked": []}

    def solve(asked: dict[str, Any]) -> Solution:
        budget = asked["budget_bytes"]
        told["asked"].append(budget)
        assert asked["verify"] is False
        if budget < told["least"]:
            raise DoesNotFit(0, told["need"], budget, "")
        return solution(told["period"](budget))

    monkeypatch.setattr(sweep, "solve", solve)
    return told


def test_the_least_budget_is_what_the_planner_says_or_what_it_takes(planner: Any) -> None:
    assert least_budget(inputs()) == SIZE
    assert planner["asked"] == [1, SIZE]
    # Residents by order need more than the block that is named.
    planner["least"] = 34_567
    assert least_budget(inputs()) == 34_567
    planner["least"] = 0
    assert least_budget(inputs()) == 1


def test_the_budget_without_a_stall_is_found(planner: Any) -> None:
    planner["period"] = lambda budget: 10.0 + max(0, 61_234 - budget) * 1e-3
    found = stall_free_budget(inputs(), SIZE)
    # A thousandth of the compute is ten milliseconds, ten bytes here.
    assert found == pytest.approx(61_224, abs=10 * SIZE / 2048)
    assert planner["period"](found) <= 10.01
    assert stall_free_budget(inputs(0.0), SIZE) is None
    planner["period"] = lambda budget: 10.005
    assert stall_free_budget(inputs(), SIZE) == SIZE
    planner["period"] = lambda budget: 10.02
    assert stall_free_budget(inputs(), SIZE) is None


def test_no_plan_belies_the_budget_that_is_named(planner: Any) -> None:
    # Free of stalls by luck at one budget below others that are not.
    planner["period"] = lambda budget: 10.0 if budget in range(30_000, 31_000) else 20.0
    planner["period"] = lambda b, period=planner["period"]: 10.0 if b > 90_000 else period(b)
    assert stall_free_budget(inputs(), SIZE) > 31_000
    known = [Point(budget, solution(planner["period"](budget))) for budget in (20_000, 30_500)]
    assert 30_000 <= stall_free_budget(inputs(), SIZE, known) <= 30_500
    assert stall_free_budget(inputs(), SIZE, known[:1]) > 31_000
    # What is known to stall is not asked about again.
    known.append(Point(30_499, solution(20.0)))
    planner["asked"].clear()
    assert stall_free_budget(inputs(), SIZE, known) == 30_500
    assert planner["asked"] == [SIZE]


def test_the_curve_reaches_from_the_least_to_all(planner: Any) -> None:
    budgets = [point.budget_bytes for point in curve(inputs(), SIZE)]
    assert (budgets[0], budgets[-1], len(budgets)) == (SIZE, 10 * SIZE, 12)
    steps = [b - a for a, b in pairwise(budgets)]
    assert max(steps) - min(steps) <= 1
    assert [point.budget_bytes for point in curve(inputs(), 10 * SIZE)] == [10 * SIZE]

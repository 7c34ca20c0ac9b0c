"""The best plan of a few whole blocks, found by trying all of them.

Goal: where blocks cannot be cut, a bound by linear programming is too low: it lets a block lie in
two places. So small cases are solved for what whole blocks in fixed places really allow.
Method: no test of its own. Every choice of residents, every place of every streamed block at
multiples of a unit that divides all sizes and the budget (places in between are never better: all
rounded down, blocks that did not overlap still do not), and each unit copied by itself, as early as
its cell of the buffer is free.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

from plan_checker import period

if TYPE_CHECKING:
    from plan_checker import Problem


def best_of_whole_blocks(asked: Problem, unit: int) -> float:
    """Seconds of the best plan; latency must be 0, as each unit is a copy."""
    assert asked.latency_s == 0.0
    assert not any(size % unit for size in [*asked.sizes, asked.budget])
    compute = sum(asked.compute_s) + asked.outside_s
    best = float("inf")
    for streamed in product([False, True], repeat=len(asked.sizes)):
        moved = [size if is_in else 0 for size, is_in in zip(asked.sizes, streamed, strict=True)]
        room = asked.budget - asked.whole + sum(moved)
        if room < max(moved) or max(compute, sum(moved) / asked.rate) >= best:
            continue
        places = [range(0, room - size + 1, unit) if size else [0] for size in moved]
        for chosen in product(*places):
            copies = cells(moved, list(chosen), unit)
            best = min(best, period(asked, copies))
    return best


def cells(moved: list[int], places: list[int], unit: int) -> list[list[dict[str, Any]]]:
    """Each unit of each block as a copy that waits for the last block that had its cell."""
    users: dict[int, list[int]] = {}
    for block, (size, place) in enumerate(zip(moved, places, strict=True)):
        for cell in range(place, place + size, unit):
            users.setdefault(cell, []).append(block)
    copies: list[list[dict[str, Any]]] = [[] for _ in moved]
    for block, (size, place) in enumerate(zip(moved, places, strict=True)):
        for cell in range(place, place + size, unit):
            before = users[cell][users[cell].index(block) - 1]
            wait = [before, int(before >= block)]
            copies[block].append({"bytes": unit, "wait": wait})
        # The order within a block is free: what is free first is copied first.
        copies[block].sort(key=lambda copy: _age(copy["wait"]))
    return copies


def _age(wait: list[int] | None) -> tuple[int, int]:
    return (-2, 0) if wait is None else (-wait[1], wait[0])

"""What no plan can beat, by linear programs of our own and an open solver.

Goal: how good a plan is can be said without knowing how it was found.
Method: no test of its own. Any policy, one that changes what is resident from pass to pass as well,
is averaged over its passes: of block i so many bytes are streamed, so many streamed bytes are on
the device when it starts, so many arrive while it computes, and so many in the stall after it. The
averages obey what each pass obeys, since all of that is linear; so the least period of the averages
is a bound for every policy. With blocks streamed whole or not at all it is a mixed-integer program,
whose bound holds for every plan that decides once for each block.
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

if TYPE_CHECKING:
    from plan_checker import Problem

_NODES = 500


def optimum(asked: Problem) -> float:
    """Seconds of the best policy of all, with bytes as the unit and no latency."""
    return _solve(asked, whole=False)


def whole_block_bound(asked: Problem) -> float:
    """Seconds that no plan with whole blocks beats; exact when the solver ends within its nodes."""
    solved = _solve(asked, whole=True)
    return max(optimum(asked), solved, fewest_bytes(asked) / asked.rate)


def fewest_bytes(asked: Problem) -> int:
    """The fewest bytes that whole blocks must stream: the largest of them has to fit as well.

    The solver needs long to see this when all blocks are alike.
    """
    if asked.whole <= asked.budget:
        return 0
    kinds = Counter(asked.sizes)
    fewest = asked.whole
    for counts in product(*(range(count + 1) for count in kinds.values())):
        streamed = sum(size * count for size, count in zip(kinds, counts, strict=True))
        largest = max((s for s, count in zip(kinds, counts, strict=True) if count), default=0)
        if asked.whole - streamed + largest <= asked.budget:
            fewest = min(fewest, streamed)
    return fewest


def _solve(asked: Problem, *, whole: bool) -> float:
    # The time outside of the blocks is one more block without bytes.
    sizes = np.array([*asked.sizes, 0], dtype=float)
    compute = np.array([*asked.compute_s, asked.outside_s])
    if asked.whole <= asked.budget:
        return float(compute.sum())
    unit = sizes.max()
    b, during = sizes / unit, compute * asked.rate / unit
    room = (asked.budget - asked.whole) / unit
    n = len(b)
    # Variables, n of each: streamed (a part of the block, 0 to 1), present, arriving, stalled.
    rows: list[tuple[int, int, float]] = []
    low, high = np.full(3 * n, -np.inf), np.zeros(3 * n)
    for i in range(n):
        after = (i + 1) % n
        # What is present next is what was, what arrived, less what this block gives up.
        rows += [(i, n + after, 1.0), (i, n + i, -1.0), (i, 2 * n + i, -1.0), (i, 3 * n + i, -1.0)]
        rows.append((i, i, b[i]))
        low[i] = 0.0
        # A block starts with all its streamed bytes present.
        rows += [(n + i, i, b[i]), (n + i, n + i, -1.0)]
        # Residents, what is present and what arrives share the budget.
        rows += [(2 * n + i, n + i, 1.0), (2 * n + i, 2 * n + i, 1.0)]
        rows += [(2 * n + i, j, -b[j]) for j in range(n) if b[j]]
        high[2 * n + i] = room
    at, column, value = zip(*rows, strict=True)
    matrix = coo_array((value, (at, column)), shape=(3 * n, 4 * n)).tocsr()
    most = np.concatenate([np.ones(n), np.full(n, np.inf), during, np.full(n, np.inf)])
    stalled = np.concatenate([np.zeros(3 * n), np.ones(n)])
    found = milp(
        stalled,
        constraints=LinearConstraint(matrix, low, high),
        bounds=Bounds(np.zeros(4 * n), most),
        integrality=np.concatenate([np.full(n, float(whole)), np.zeros(3 * n)]),
        # Nodes and no seconds, so that each machine finds the same bound.
        options={"node_limit": _NODES, "mip_rel_gap": 1e-4},
    )
    # With its nodes used up the solver still knows a bound.
    if found.status != 0 and (not whole or found.mip_dual_bound is None):
        raise AssertionError(f"no policy: {found.message}")
    stall = max(0.0, float(found.mip_dual_bound if whole else found.fun))
    return float(compute.sum()) + stall * unit / asked.rate

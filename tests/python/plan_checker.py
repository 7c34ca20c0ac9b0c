"""Runs a plan's list of copies by itself, and proves from the waits that it is legal.

Goal: a plan is judged by what docs/plan-format.md promises, by code that shares nothing with the
planner: what it copies, where to, what it may overwrite, and how long a pass takes.
Method: no test of its own. Ownership of every byte of the buffer is followed through some passes
and compared with what the copy stream has waited for, never with a clock; then two clocks, copy and
compute, run until passes repeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

# A pass repeats after one pass, or after a few that repeat together.
LAPS = range(1, 7)
PASSES_MOST = 4000


class IllegalPlan(AssertionError):
    """What a plan promised and does not hold."""


@dataclass(frozen=True)
class Problem:
    """Inputs of the form, counted out: one entry for each block."""

    sizes: list[int]
    compute_s: list[float]
    tensors: list[list[int]]
    budget: int
    rate: float
    latency_s: float
    outside_s: float
    granularity: int | str
    static: bool

    @property
    def whole(self) -> int:
        return sum(self.sizes)


def problem(inputs: dict[str, Any]) -> Problem:
    entries = [entry for entry in inputs["blocks"] for _ in range(entry.get("count", 1))]
    return Problem(
        sizes=[entry["bytes"] for entry in entries],
        compute_s=[entry["compute_s"] for entry in entries],
        tensors=[entry.get("tensor_bytes", [entry["bytes"]]) for entry in entries],
        budget=inputs["budget_bytes"],
        rate=inputs["h2d_bytes_per_s"],
        latency_s=inputs["copy_latency_s"],
        outside_s=inputs.get("outside_s", 0.0),
        granularity=inputs.get("granularity", "tensor"),
        static=inputs.get("static_addresses", True),
    )


def check(inputs: dict[str, Any], plan: dict[str, Any]) -> float:
    """Returns the seconds of a pass.

    Raises:
        IllegalPlan: The plan breaks a promise; the message says which.
    """
    asked = problem(inputs)
    check_sizes(asked, plan)
    passes = plan.get("passes", 1)
    if not asked.static:
        if passes < 1:
            raise IllegalPlan(f"{passes} passes")
    elif passes != 1 or any("pass" in copy for copy in plan["copies"]):
        raise IllegalPlan("addresses that change from pass to pass")
    cycle = by_use(asked, plan, passes)
    for number, own in enumerate(cycle):
        block = number % len(asked.sizes)
        check_pieces(asked, block, plan["streamed_bytes"][block], own)
    check_order_and_waits(plan["copies"])
    check_ownership(plan, cycle)
    return period(asked, cycle)


def check_sizes(asked: Problem, plan: dict[str, Any]) -> None:
    resident, streamed = plan["resident_bytes"], plan["streamed_bytes"]
    if not len(resident) == len(streamed) == len(asked.sizes):
        raise IllegalPlan(f"{len(asked.sizes)} blocks, {len(resident)} and {len(streamed)} sizes")
    for block, size in enumerate(asked.sizes):
        if min(resident[block], streamed[block]) < 0 or resident[block] + streamed[block] != size:
            raise IllegalPlan(f"block {block} has {size} bytes, not the sum of the plan's")
    used = sum(resident) + plan["buffer"]["bytes"]
    if plan["buffer"]["bytes"] < 0 or used > asked.budget:
        raise IllegalPlan(f"{used} bytes used of a budget of {asked.budget}")


def by_use(asked: Problem, plan: dict[str, Any], passes: int) -> list[list[dict[str, Any]]]:
    """The copies of each use of a cycle: all blocks in turn, pass after pass."""
    blocks = len(asked.sizes)
    copies: list[list[dict[str, Any]]] = [[] for _ in range(blocks * passes)]
    for copy in plan["copies"]:
        if not (0 <= copy["block"] < blocks and 0 <= copy.get("pass", 0) < passes):
            raise IllegalPlan(f"a copy of block {copy['block']} in pass {copy.get('pass', 0)}")
        if copy["bytes"] <= 0 or copy["dst"] < 0 or copy["src"] < 0:
            raise IllegalPlan(f"a copy of nothing, or from or to nowhere: {copy}")
        if copy["dst"] + copy["bytes"] > plan["buffer"]["bytes"]:
            raise IllegalPlan(f"a copy beyond the buffer: {copy}")
        copies[copy.get("pass", 0) * blocks + copy["block"]].append(copy)
    return copies


def check_pieces(asked: Problem, block: int, streamed: int, copies: list[dict[str, Any]]) -> None:
    """Every byte once; and each piece that lies in one run is made of whole units."""
    breaks, at, shift = set(), 0, None
    for copy in sorted(copies, key=lambda copy: copy["src"]):
        if copy["src"] != at:
            raise IllegalPlan(f"block {block}: byte {min(at, copy['src'])} not copied just once")
        if shift is not None and copy["dst"] - copy["src"] != shift:
            breaks.add(at)
        shift = copy["dst"] - copy["src"]
        at += copy["bytes"]
    if at != streamed:
        raise IllegalPlan(f"block {block}: {at} of {streamed} streamed bytes are copied")
    size, unit = asked.sizes[block], asked.granularity
    if unit == "block":
        if streamed not in (0, size) or breaks:
            raise IllegalPlan(f"block {block}: {streamed} of {size} bytes, or not in one run")
    elif unit == "tensor":
        if not tensors_fit(tuple(asked.tensors[block]), streamed, frozenset(breaks)):
            raise IllegalPlan(f"block {block}: no tensors make {streamed} bytes cut at {breaks}")
    elif streamed % int(unit) and streamed != size:
        raise IllegalPlan(f"block {block}: {streamed} bytes are no multiple of {unit}")


@cache
def tensors_fit(tensors: tuple[int, ...], streamed: int, breaks: frozenset[int]) -> bool:
    """Whether some of the tensors, in order, make up the bytes with no tensor across a break."""
    reached = {0}
    for tensor in tensors:
        reached |= {
            start + tensor
            for start in reached
            if start + tensor <= streamed
            and not any(start < cut < start + tensor for cut in breaks)
        }
    return streamed in reached


def check_order_and_waits(copies: list[dict[str, Any]]) -> None:
    uses = [(copy.get("pass", 0), copy["block"]) for copy in copies]
    if uses != sorted(uses):
        raise IllegalPlan("copies are not in order of use")
    for copy in copies:
        if copy["wait"] is None:
            continue
        block, lag = copy["wait"]
        # The end of its own block, or of a later one in the same pass, comes after the copy.
        if lag < 0 or (lag == 0 and block >= copy["block"]):
            raise IllegalPlan(f"a wait for what comes later: {copy}")


def check_ownership(plan: dict[str, Any], cycle: list[list[dict[str, Any]]]) -> None:
    blocks = len(plan["streamed_bytes"])
    lags = [copy["wait"][1] for copy in plan["copies"] if copy["wait"] is not None]
    owners: list[tuple[int, int, tuple[int, int], int]] = []  # from, to, (pass, block), dst - src
    waited = (-1, -1)
    passes = len(cycle) // blocks
    for number in range(blocks * (2 * passes + max(lags, default=0) + 1)):
        lap, block = use = divmod(number, blocks)
        own = cycle[number % len(cycle)]
        for copy in own:
            if copy["wait"] is not None:
                waited = max(waited, (lap - copy["wait"][1], copy["wait"][0]))
            owners = overwritten(owners, copy, use, waited)
        held = sum(high - low for low, high, owner, _ in owners if owner == use)
        if held != plan["streamed_bytes"][block]:
            raise IllegalPlan(f"block {block} finds {held} of its bytes in pass {lap}")


def overwritten(
    owners: list[tuple[int, int, tuple[int, int], int]],
    copy: dict[str, Any],
    use: tuple[int, int],
    waited: tuple[int, int],
) -> list[tuple[int, int, tuple[int, int], int]]:
    """Whose the buffer's bytes are after a copy, which may only take what is no longer read."""
    low, high, shift = copy["dst"], copy["dst"] + copy["bytes"], copy["dst"] - copy["src"]
    left = []
    for owner in owners:
        start, end, before, other = owner
        if end <= low or start >= high:
            left.append(owner)
            continue
        # The same bytes over themselves harm nobody.
        same = before[1] == use[1] and before[0] < use[0] and other == shift
        if not same and (before > waited or before == use):
            raise IllegalPlan(f"{copy} in pass {use[0]} overwrites block {before[1]} in use")
        left += [(start, low, before, other)] * (start < low)
        left += [(high, end, before, other)] * (end > high)
    return [*left, (low, high, use, shift)]


def period(asked: Problem, cycle: list[list[dict[str, Any]]]) -> float:
    """Seconds of a pass once passes repeat: both streams start each thing as early as allowed."""
    copy_at = compute_at = 0.0
    blocks = len(asked.sizes)
    passes = len(cycle) // blocks
    done: list[list[float]] = []
    ends: list[float] = []
    for lap in range(PASSES_MOST):
        done.append([])
        first = lap % passes * blocks
        for block, own in enumerate(cycle[first : first + blocks]):
            for copy in own:
                if copy["wait"] is not None and lap >= copy["wait"][1]:
                    copy_at = max(copy_at, done[lap - copy["wait"][1]][copy["wait"][0]])
                copy_at += asked.latency_s + copy["bytes"] / asked.rate
            if own:
                compute_at = max(compute_at, copy_at)
            compute_at += asked.compute_s[block]
            done[lap].append(compute_at)
        compute_at += asked.outside_s
        ends.append(compute_at)
        for laps in (passes * times for times in LAPS):
            if lap > 4 * laps and repeats(ends, laps):
                return (ends[-1] - ends[-1 - laps]) / laps
    raise IllegalPlan(f"passes do not repeat in {PASSES_MOST}")


def repeats(ends: list[float], laps: int) -> bool:
    spans = [ends[-1 - k * laps] - ends[-1 - (k + 1) * laps] for k in range(3)]
    return max(spans) - min(spans) <= 1e-11 * max(*spans, 1e-9)

"""The checker of plans, on plans made by hand.

Goal: a plan that is right passes with the period one can work out on paper; each way of being wrong
is found, and the bound is the one of the closed form.
Method: two slots that four equal blocks take turns in, and one change at a time.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from plan_checker import IllegalPlan, check, problem, tensors_fit
from plan_exhaustive import best_of_whole_blocks
from plan_optimum import fewest_bytes, optimum, whole_block_bound

SIZE = 1000


def two_slots(
    compute_s: float = 0.5, blocks: int = 4, latency_s: float = 0.0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Blocks of 1000 bytes in two tensors, at 1000 bytes per second, all of them streamed."""
    entry = {"bytes": SIZE, "compute_s": compute_s, "count": blocks, "tensor_bytes": [600, 400]}
    inputs = {
        "blocks": [entry],
        "budget_bytes": 2 * SIZE,
        "h2d_bytes_per_s": float(SIZE),
        "copy_latency_s": latency_s,
    }
    copies = [
        {
            "block": block,
            "src": 0,
            "dst": SIZE * (block % 2),
            "bytes": SIZE,
            "wait": [(block - 2) % blocks, int(block < 2)],
        }
        for block in range(blocks)
    ]
    plan = {
        "resident_bytes": [0] * blocks,
        "streamed_bytes": [SIZE] * blocks,
        "buffer": {"kind": "arena", "bytes": 2 * SIZE},
        "copies": copies,
    }
    return inputs, plan


def test_periods_are_those_on_paper() -> None:
    assert check(*two_slots(0.5)) == pytest.approx(4.0)  # the link is never idle
    assert check(*two_slots(1.5)) == pytest.approx(6.0)  # nor is the compute here
    assert check(*two_slots(0.5, latency_s=0.25)) == pytest.approx(5.0)
    inputs, plan = two_slots(1.0)
    assert check(inputs | {"outside_s": 3.0}, plan) == pytest.approx(7.0)
    for each in plan["copies"]:  # one slot: copies and compute take turns
        each["dst"], each["wait"] = 0, [(each["block"] - 1) % 4, int(each["block"] == 0)]
    assert check(inputs, plan) == pytest.approx(8.0)


def test_a_copy_over_its_own_bytes_needs_no_wait() -> None:
    inputs, plan = two_slots(blocks=2)
    for each in plan["copies"]:
        each["wait"] = None
    assert check(inputs, plan) == pytest.approx(2.0)


def test_a_later_wait_covers_earlier_ones() -> None:
    inputs, plan = two_slots()
    # Block 2 waits for block 1 as well, so block 3 knows already.
    plan["copies"][2]["wait"], plan["copies"][3]["wait"] = [1, 0], None
    check(inputs, plan)


def split(inputs: dict[str, Any], plan: dict[str, Any], at: int) -> None:
    """Cuts the copy of block 0 and moves the second part to another place in a larger buffer."""
    first = plan["copies"][0]
    second = dict(first, src=at, dst=2 * SIZE, bytes=SIZE - at)
    first["bytes"] = at
    plan["copies"].insert(1, second)
    plan["buffer"]["bytes"] = inputs["budget_bytes"] = 3 * SIZE


def split_whole(inputs: dict[str, Any], plan: dict[str, Any]) -> None:
    split(inputs, plan, 600)
    inputs["granularity"] = "block"


def shorten(inputs: dict[str, Any], plan: dict[str, Any]) -> None:
    inputs["granularity"] = 300
    plan["resident_bytes"][0], plan["streamed_bytes"][0] = 1, SIZE - 1
    plan["copies"][0]["bytes"] = SIZE - 1
    inputs["budget_bytes"] += 1


CHANGES: dict[str, tuple[str, Any]] = {
    "a wait left out": ("in use", lambda i, p: p["copies"][2].update(wait=None)),
    "a wait for a block too early": ("in use", lambda i, p: p["copies"][2].update(wait=[3, 1])),
    "a wait for its own end": ("later", lambda i, p: p["copies"][2].update(wait=[2, 0])),
    "a wait for a later block": ("later", lambda i, p: p["copies"][2].update(wait=[3, 0])),
    "a wait for a later pass": ("later", lambda i, p: p["copies"][2].update(wait=[0, -1])),
    "a copy too short": ("999 of 1000", lambda i, p: p["copies"][0].update(bytes=SIZE - 1)),
    "a copy from too far": ("just once", lambda i, p: p["copies"][0].update(src=1)),
    "a copy made twice": ("just once", lambda i, p: p["copies"].insert(1, p["copies"][0])),
    "a copy left out": ("0 of 1000", lambda i, p: p["copies"].pop()),
    "a copy of nothing": ("of nothing", lambda i, p: p["copies"][0].update(bytes=0)),
    "a copy before the buffer": ("nowhere", lambda i, p: p["copies"][0].update(dst=-1)),
    "a copy beyond the buffer": ("beyond", lambda i, p: p["copies"][0].update(dst=SIZE + 1)),
    "a copy of no block": ("of block 4", lambda i, p: p["copies"][0].update(block=4)),
    "copies out of order": ("order", lambda i, p: p["copies"].reverse()),
    "a byte overwritten at once": ("in use", lambda i, p: p["copies"][1].update(dst=0)),
    "more than the budget": ("budget", lambda i, p: i.update(budget_bytes=2 * SIZE - 1)),
    "a resident byte too many": ("sum", lambda i, p: p["resident_bytes"].__setitem__(0, 1)),
    "a block forgotten": ("4 blocks", lambda i, p: p["resident_bytes"].pop()),
    "a tensor torn apart": ("no tensors", lambda i, p: split(i, p, 500)),
    "a whole block torn apart": ("one run", split_whole),
    "no whole unit": ("multiple of 300", shorten),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_wrong_is_found(name: str) -> None:
    inputs, plan = copy.deepcopy(two_slots())
    said, change = CHANGES[name]
    check(inputs, plan)
    change(inputs, plan)
    with pytest.raises(IllegalPlan, match=said):
        check(inputs, plan)


def test_tensors_may_lie_apart_where_one_ends() -> None:
    inputs, plan = two_slots()
    split(inputs, plan, 600)
    check(inputs, plan)
    assert tensors_fit((3, 5, 3), 6, frozenset({3}))
    assert not tensors_fit((3, 5, 3), 6, frozenset({4}))
    assert not tensors_fit((3, 5, 3), 7, frozenset())


@pytest.mark.parametrize("blocks", [8, 20, 57])
@pytest.mark.parametrize("compute_s", [0.05, 0.4, 0.9, 1.5])
def test_the_bound_is_that_of_the_closed_form(blocks: int, compute_s: float) -> None:
    inputs, _ = two_slots(compute_s, blocks)
    for room in (2.0, 3.3, 5.9):
        asked = problem(inputs | {"budget_bytes": int(room * SIZE)})
        missing, compute = blocks - room, blocks * compute_s
        closed = max(compute, (blocks * missing + compute) / (blocks - 1))
        assert optimum(asked) == pytest.approx(closed, rel=1e-6)


def test_whole_blocks_are_no_better_than_parts() -> None:
    inputs, _ = two_slots(0.5, 8)
    asked = problem(inputs | {"budget_bytes": int(4.5 * SIZE)})
    # Beside the one that is being copied three can stay at most, so five are copied.
    assert whole_block_bound(asked) == pytest.approx(5.0)
    assert fewest_bytes(asked) == 5 * SIZE
    assert fewest_bytes(problem(inputs | {"budget_bytes": 8 * SIZE})) == 0
    assert optimum(asked) == pytest.approx((8 * 3.5 + 4.0) / 7)
    assert whole_block_bound(problem(inputs | {"budget_bytes": 8 * SIZE})) == 4.0


def test_all_plans_of_a_few_whole_blocks_are_tried() -> None:
    inputs, plan = two_slots(0.5)
    # With two units all take turns in two; with four nothing is streamed.
    assert best_of_whole_blocks(problem(inputs), SIZE) == pytest.approx(check(inputs, plan))
    assert best_of_whole_blocks(problem(inputs | {"budget_bytes": 4 * SIZE}), SIZE) == 2.0
    # With one unit copies and compute take turns.
    assert best_of_whole_blocks(problem(inputs | {"budget_bytes": SIZE}), SIZE) == pytest.approx(
        6.0
    )
    sizes = [{"bytes": size, "compute_s": 0.5} for size in (3000, 1000, 2000, 1000)]
    for room in (3000, 4000, 5000, 6000):
        asked = problem(inputs | {"blocks": sizes, "budget_bytes": room})
        best = best_of_whole_blocks(asked, SIZE)
        assert whole_block_bound(asked) <= best * (1 + 1e-6) < 2 * whole_block_bound(asked)

"""What is looked at beside the time of a cell: where it went, and what must not happen in it."""

from __future__ import annotations

import statistics
import time
import traceback
from typing import TYPE_CHECKING, Any

import torch

from bench import measure, weights
from bench.account import profile
from bench.driver_calls import DriverCalls, split
from bench.hook_clock import HookClock
from bench.stacks import weight_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from bench.engines import Attached
    from bench.measure import Timing
    from bench.worker import Job

_ROUNDS = 5
_WATCHED_PASSES = 3
_UNHINDERED = 15
"""Blocks that the host enqueues before the device's queue can be full."""


def details(
    job: Job, attached: Attached, stack: Any, x: Tensor, c: Tensor, timing: Timing
) -> dict[str, Any]:
    """The details of a cell; one that cannot be had is named with its reason."""
    wanted = {"account": _account}
    if job.engine == "dgls":
        wanted = {"hooks": _hooks, "driver_calls": _driver_calls, "beside": _beside, **wanted}
    found: dict[str, Any] = {}
    for name, look in wanted.items():
        found[name] = _or_reason(lambda look=look: look(job, attached, stack, x, c, timing))
    account = found["account"]
    if account and "total" in account:
        account["off"] = account["total"] / timing.median_s - 1
    return found


def _or_reason(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:200]}


def _pass(attached: Attached, x: Tensor, c: Tensor) -> None:
    measure.chain(attached.step, x, c, 1, lambda: None)


def _account(
    job: Job, attached: Attached, stack: Any, x: Tensor, c: Tensor, timing: Timing
) -> dict[str, Any]:
    if job.device.type == "cuda":
        return profile(lambda: _pass(attached, x, c), 2 if timing.median_s > 0.3 else 3).to_json()
    clock = HookClock(stack.order)
    begun = time.perf_counter()
    measure.timed(attached.step, x, c, _WATCHED_PASSES)
    spent = time.perf_counter() - begun
    clock.close()
    return clock.account(_WATCHED_PASSES, spent).to_json()


def _hooks(
    job: Job, attached: Attached, stack: Any, x: Tensor, c: Tensor, _: Timing
) -> dict[str, Any]:
    """Microseconds of the engine's hooks at each call of a block."""
    clock = HookClock(stack.order)
    # One pass at a time: the host must not be held up by a full queue.
    for _pass_number in range(_WATCHED_PASSES):
        measure.timed(attached.step, x, c, 1)
    clock.close()
    empty = HookClock.empty_s()
    seen = clock.call_s(len(stack.order), _UNHINDERED)
    return {"call_s": max(0.0, seen - empty), "clock_s": empty}


def _driver_calls(
    job: Job, attached: Attached, stack: Any, x: Tensor, c: Tensor, _: Timing
) -> dict[str, Any] | None:
    """Calls that hold the host up or ask for memory, in passes that nothing waits for."""
    if job.device.type != "cuda":
        return None
    calls = DriverCalls()
    measure.wait(job.device)
    with calls.watching() as counts:
        measure.chain(attached.step, x, c, _WATCHED_PASSES, lambda: None)
        seen = counts.copy()
        measure.wait(job.device)
        control = sum(counts.values()) - sum(seen.values())
    synchronising, allocating = split(seen)
    return {
        "passes": _WATCHED_PASSES,
        "synchronising": synchronising,
        "allocating": allocating,
        "calls": dict(seen),
        "control": control,  # the wait at the end: 0 would mean that nothing is seen at all
    }


def _beside(
    job: Job, attached: Attached, stack: Any, x: Tensor, c: Tensor, _: Timing
) -> dict[str, Any] | None:
    """Where all fits: passes in turns with a resident stack, so that drift hits both alike."""
    budget = attached.facts().get("streamed_bytes")
    if budget != 0:
        return None
    if job.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, job.device)  # two models for a while
    path = weights.make(job.bed.workload, job.folder, job.device)
    other = weights.load(job.bed.workload, path).to(job.device)
    other.pace(max(block.pace_s for block in stack.order))
    ours, resident = [], []
    for _round in range(_ROUNDS):
        ours += measure.timed(attached.step, x, c, 3).passes
        resident += measure.timed(other, x, c, 3).passes
    return {
        "pass_s": statistics.median(ours),
        "resident_s": statistics.median(resident),
        "resident_bytes": weight_bytes(other),
    }

"""What is looked at beside the time of a cell: where it went, and what must not happen in it."""

from __future__ import annotations

import statistics
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bench import measure, weights
from bench.account import profile
from bench.driver_calls import DriverCalls, split, without_changes
from bench.hook_clock import HookClock
from bench.host_time import added_host_time
from bench.needed_calls import NeededCalls
from bench.stacks import weight_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from bench.engines import Attached
    from bench.measure import Timing
    from bench.worker import Job

_ROUNDS = 5
_WATCHED_PASSES = 3
_LONG_PASS_S = 0.3


@dataclass(frozen=True)
class Cell:
    """A measured cell whose engine is still attached."""

    job: Job
    attached: Attached
    stack: Any
    x: Tensor
    c: Tensor
    timing: Timing
    budget_bytes: int
    is_first: bool
    """Whether it is the first of its budget."""

    @property
    def is_on_cuda(self) -> bool:
        """Whether a GPU computes."""
        return self.job.device.type == "cuda"

    def passes(self, count: int) -> None:
        """Enqueues passes; nothing waits."""
        measure.chain(self.attached.step, self.x, self.c, count, lambda: None)

    def timed(self, count: int) -> Timing:
        """Times passes, after the device has come to rest."""
        return measure.timed(self.attached.step, self.x, self.c, count)


def details(cell: Cell) -> dict[str, Any]:
    """The details of a cell; one that cannot be had is named with its reason."""
    looks: dict[str, Callable[[Cell], dict[str, Any] | None]] = {}
    if cell.job.engine == "dgls":
        # The profiler comes last: it keeps CUPTI, which has one subscriber, for itself.
        looks = {
            "hooks": _hooks,
            "driver_calls": _driver_calls,
            "beside": _beside,
        }
    looks["account"] = _account
    return {name: _or_reason(look, cell) for name, look in looks.items()}


def _or_reason(look: Callable[[Cell], dict[str, Any] | None], cell: Cell) -> dict[str, Any] | None:
    try:
        return look(cell)
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:200]}


def _account(cell: Cell) -> dict[str, Any]:
    """Where a pass went, and how far the sum of the parts is off the time of the same passes."""
    if cell.is_on_cuda:
        count = 3 if cell.timing.median_s > _LONG_PASS_S else 4
        found, seconds = profile(lambda: cell.passes(1), count)
    else:
        clock = HookClock(cell.stack.order)
        begun = time.perf_counter()
        seconds = statistics.mean(cell.timed(_WATCHED_PASSES).passes)
        spent = time.perf_counter() - begun
        clock.close()
        found = clock.account(_WATCHED_PASSES, spent)
    against = {"off": found.total / seconds - 1, "pass_s": seconds}
    return found.to_json() | against


def _hooks(cell: Cell) -> dict[str, Any] | None:
    """What hooks add to the host's time at each call of a block; once in a run, on a GPU."""
    is_first = cell.is_first and cell.budget_bytes == cell.job.cells[0][0]
    if not (cell.is_on_cuda and is_first and cell.job.hooks):
        return None
    _lift_cap(cell)
    calls = NeededCalls.of(cell.job.device)
    try:
        return added_host_time(cell.job.folder, cell.job.device, calls=calls)
    finally:
        measure.wait(cell.job.device)
        calls.close()


def _lift_cap(cell: Cell) -> None:
    """Another model is on the device for a while."""
    torch.cuda.set_per_process_memory_fraction(1.0, cell.job.device)


def _driver_calls(cell: Cell) -> dict[str, Any] | None:
    """Calls that hold the host up or ask for memory, in passes that nothing waits for."""
    if not cell.is_on_cuda or not cell.is_first:
        return None
    calls = DriverCalls()

    def watch() -> dict[str, Any]:
        measure.wait(cell.job.device)
        with calls.watching() as counts:
            cell.passes(_WATCHED_PASSES)
            seen = counts.copy()
            measure.wait(cell.job.device)
            control = sum(counts.values()) - sum(seen.values())
        synchronising, allocating = split(seen)
        return {
            "passes": _WATCHED_PASSES,
            "synchronising": synchronising,
            "allocating": allocating,
            "calls": dict(seen),
            "control": control,  # the wait at the end: 0 would mean that nothing is seen at all
        }

    return without_changes(watch, lambda: cell.attached.facts()["adopted"])


def _beside(cell: Cell) -> dict[str, Any] | None:
    """Where all fits: passes in turns with a resident stack, so that drift hits both alike."""
    if cell.attached.facts().get("streamed_bytes") != 0:
        return None
    job = cell.job
    if cell.is_on_cuda:
        _lift_cap(cell)
    path = weights.make(job.bed.workload, job.folder, job.device)
    other = weights.load(job.bed.workload, path).to(job.device)
    other.pace(max(block.pace_s for block in cell.stack.order))
    ours: list[float] = []
    resident: list[float] = []
    measure.timed(other, cell.x, cell.c, 1)
    for _ in range(_ROUNDS):
        ours += cell.timed(3).passes
        resident += measure.timed(other, cell.x, cell.c, 3).passes
    return {
        "pass_s": statistics.median(ours),
        "resident_s": statistics.median(resident),
        "resident_bytes": weight_bytes(other),
    }

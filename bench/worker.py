"""One engine in one process: takes a job, measures its cells, writes a line of JSON for each.

The process starts early and waits for a line on its input, so that importing torch costs no time
on the device. Nothing that an engine prints gets between the results.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bench.engines import ENGINES, Attached, Engine, Setup

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from bench.beside import Turns
    from bench.cells import Bed, Point
    from bench.eaters import Load
    from bench.measure import Timing

_SLACK_LEAST = 256 << 20
_LATE_S = 45.0
"""A cell may end so long after the deadline. The process is killed a minute after it."""


@dataclass
class Job:
    """What one process measures."""

    engine: str
    bed: Bed
    folder: Path
    device: torch.device
    link_bytes_per_s: float | None
    measured_link: float | None
    """The rate that was measured of it, bytes per second; None before that."""
    effort: Any
    cells: list[tuple[int, Point]]
    """Budget in bytes and point, budgets together."""
    references: dict[str, dict[str, Any]]
    """By the point's key: hash and workspace of the resident run."""
    deadline: float
    """Seconds since the epoch; no cell begins after it."""
    ratios: list[float]
    """For the limits: copy over compute, at a quarter of the weights, to find points for."""
    points: list[Point]
    """For the limits: known points whose blocks have not been timed yet."""
    deep: bool
    """Whether to account for the time as well."""
    hooks: bool
    """Whether to measure the host's time at each call too."""
    beside: dict[str, Any] | None = None
    """Where the reference answers, as `bench.beside.Beside` takes it."""


def _job(value: dict[str, Any]) -> Job:
    import torch

    from bench.cells import Bed, Point
    from bench.measure import Effort

    return Job(
        engine=value["engine"],
        bed=Bed.from_json(value["bed"]),
        folder=Path(value["folder"]),
        device=torch.device("cuda", 0) if value["device"] == "cuda" else torch.device("cpu"),
        link_bytes_per_s=value["link_bytes_per_s"],
        measured_link=value["measured_link"],
        effort=Effort(**value["effort"]),
        cells=[(budget, Point(**point)) for budget, point in value["cells"]],
        references=value["references"],
        deadline=value["deadline"],
        ratios=value["ratios"],
        points=[Point(**point) for point in value["points"]],
        deep=value["deep"],
        hooks=value["hooks"],
        beside=value["beside"],
    )


def start_job(path: Path) -> Job:
    """Reads a job and sets torch's threads for it."""
    import torch

    job = _job(json.loads(path.read_text()))
    if job.device.type == "cpu":
        torch.set_num_threads(1)  # the link's thread needs a processor too
    return job


class Worker:
    """Runs a job."""

    def __init__(self, job: Job, engine: Engine, out: IO[str]) -> None:
        """Opens the device."""
        from bench import weights
        from bench.beside import Beside

        self.job, self.engine, self._out = job, engine, out
        self._beside = Beside(job.beside, job.device)
        self._path = weights.make(job.bed.workload, job.folder, job.device)
        self.base_bytes: int | None = None
        self._longest_s = 0.0

    def write(self, row: dict[str, Any]) -> None:
        """Writes a result at once."""
        self._out.write(json.dumps(row) + "\n")
        self._out.flush()

    def empty_cache(self) -> None:
        """Gives back what torch keeps of the device's memory."""
        import torch

        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def loaded(self) -> Iterator[Load]:
        """Under the bed's load, whose memory is none of an engine's."""
        from bench import measure
        from bench.eaters import eating

        with eating(self.job.device, self.job.bed.copiers) as load:
            measure.wait(self.job.device)
            gc.collect()
            self.empty_cache()
            self.base_bytes = measure.used_bytes(self.job.device)
            yield load

    def run(self) -> None:
        """Measures all cells; a budget that fails costs its own cells only."""
        budgets = list(dict.fromkeys(budget for budget, _ in self.job.cells))
        try:
            if budgets:
                with self.loaded() as self._load:
                    for budget in budgets:
                        self._budget(budget, [p for b, p in self.job.cells if b == budget])
                        gc.collect()
                        self.empty_cache()
        except (RuntimeError, ValueError) as error:  # of the load
            self.give_up(error)
        finally:
            self._beside.close()

    def give_up(self, error: Exception) -> None:
        """Writes why the rest of the job is not measured."""
        traceback.print_exc()
        self.write({"status": "failed", "reason": str(error)[:300]})

    def _failed(self, budget: int, points: list[Point], error: BaseException) -> None:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for point in points:
            self.write(self._row(budget, point) | {"status": "failed", "reason": reason[:300]})

    def _row(self, budget: int, point: Point) -> dict[str, Any]:
        return {"engine": self.job.engine, "budget_bytes": budget, "point": point.key}

    def attach(self, budget: int) -> tuple[Attached, Any, float]:
        """A fresh stack, handed to the engine; seconds that took."""
        from bench import weights

        stack = weights.load(self.job.bed.workload, self._path)
        begun = time.perf_counter()
        setup = Setup(stack, budget, self.job.device, self.job.link_bytes_per_s)
        attached = self.engine.attach(setup)
        return attached, stack, time.perf_counter() - begun

    def _budget(self, budget: int, points: list[Point]) -> None:
        """Measures the points of one budget; once more without the cap where memory runs out."""
        left = self._capped(budget, points, True)
        if left:
            left = self._capped(budget, left, False)
        for point in left:
            skipped = {"status": "skipped", "reason": "no time was left"}
            self.write(self._row(budget, point) | skipped)

    def _capped(self, budget: int, points: list[Point], is_on: bool) -> list[Point]:
        """Measures points until one fails; returns those that another try may still measure."""
        left, attached = list(points), None
        if not self._has_time():
            return left
        try:
            self._cap(budget, left[0], is_on)
            attached, stack, took = self.attach(budget)
            while left and self._has_time():
                begun = time.time()
                self._cap(budget, left[0], is_on)
                row = self._row(budget, left[0]) | {"setup_s": took, "capped": is_on}
                is_first = len(left) == len(points)
                row |= self._measure(attached, stack, budget, left[0], is_first)
                self.write(row | self._optimum(stack, budget, left[0], row))
                left.pop(0)
                self._longest_s = max(self._longest_s, time.time() - begun)
        except Exception as error:
            traceback.print_exc()
            if not is_on or "out of memory" not in str(error):
                self._failed(budget, left, error)
                left.clear()
        finally:
            self._cap(budget, points[0], False)
            if attached is not None:
                attached.close()
        return left

    def _has_time(self) -> bool:
        """Whether another cell may begin: one that is killed would be no result at all."""
        return time.time() + max(0.0, self._longest_s - _LATE_S) < self.job.deadline

    def _optimum(
        self, stack: Any, budget: int, point: Point, row: dict[str, Any]
    ) -> dict[str, Any]:
        """What no policy beats in a cell, with the blocks' measured times."""
        from bench.optimum import optimum_s

        reference, link = self.job.references.get(point.key, {}), self.job.measured_link
        if self.job.engine != "dgls" or link is None or "block_s" not in reference:
            return {}
        block_s, compute_s = reference["block_s"], reference["compute_s"]
        if "beside_limit" in row:
            beside = row["beside_limit"]
            link, compute_s = beside["link_bytes_per_s"], beside["compute_s"]
        return {"optimum_s": optimum_s(stack, budget, link, block_s, compute_s)}

    def _cap(self, budget: int, point: Point, is_on: bool) -> None:
        """Holds torch to the budget, what the resident run needs beside weights, and some slack."""
        import torch

        if self.job.device.type != "cuda":
            return
        total = torch.cuda.mem_get_info(self.job.device)[1]
        room = budget + self.job.references[point.key]["workspace_bytes"]
        room += max(_SLACK_LEAST, budget // 16)
        share = min(1.0, room / total) if is_on else 1.0
        torch.cuda.set_per_process_memory_fraction(share, self.job.device)

    def _measure(
        self, attached: Attached, stack: Any, budget: int, point: Point, is_first: bool
    ) -> dict[str, Any]:
        """Measures a point; ``is_first`` of its budget."""
        from bench.beside import Turns
        from bench.details import Cell, details

        stack.pace(point.pace_s)
        self.empty_cache()  # what other points left would count as memory in use
        compute_s = self.job.references.get(point.key, {}).get("compute_s", 0.0)
        turns = Turns(self._beside, point, self.job.effort, compute_s)
        row, timing, x, c = self._passes(attached, point, turns)
        row["facts"] = attached.facts()  # before a profiler slows passes down
        if self.job.deep:
            cell = Cell(self.job, attached, stack, x, c, timing, budget, is_first)
            row |= details(cell)
        self._load.check()
        return row

    def _passes(
        self, attached: Attached, point: Point, turns: Turns
    ) -> tuple[dict[str, Any], Timing, torch.Tensor, torch.Tensor]:
        from bench import measure

        job, step = self.job, attached.step
        x, c = job.bed.workload.inputs(point.tokens, job.device)
        begun = time.perf_counter()
        first_hash = measure.digest(step, x, c)
        first = (time.perf_counter() - begun) / measure.CHECKED_PASSES
        settling = self._settle(attached, x, c)
        launch_s = measure.launch_s(job.device)
        rest = turns.take if turns.are_on else None
        timing, allocations = measure.steady(step, x, c, job.effort, rest)
        watch = measure.Watch(job.device)
        with watch.open():
            last_hash = measure.digest(step, x, c)
        reference = job.references.get(point.key, {})
        hashes = [first_hash, last_hash]
        row = {
            "status": "ok",
            "pass_s": timing.median_s,
            "launch_s": launch_s,
            "passes_s": timing.passes,
            "first_pass_s": first,
            "enqueue_s": timing.enqueue_s,
            "host_cpu_s": timing.host_cpu_s,
            "hash": hashes[-1],
            "exact": all(found == reference.get("hash") for found in hashes),
            "base_bytes": self._beside.base_bytes(self.base_bytes),
            "peak_bytes": watch.peak_bytes,
            "gaps_bytes": watch.gaps_bytes,
            "allocations": allocations,
        }
        return row | settling | turns.row(), timing, x, c

    def _settle(self, attached: Attached, x: Any, c: Any) -> dict[str, Any]:
        """Passes in which an engine learns: how many, and the mean of all with what it changes."""
        from bench import measure

        effort = self.job.effort
        if not attached.learns or effort.settling_s == 0.0:
            return {}
        passes = effort.passes_to_settle(measure.timed(attached.step, x, c, 1).median_s)
        took = measure.timed(attached.step, x, c, passes).passes
        return {
            "settling": passes,
            "settling_pass_s": sum(took) / passes,
            "settling_passes_s": took,
        }


def main(argv: list[str]) -> int:
    """``worker ENGINE JOB OUT``: waits for a line, then reads the job and measures.

    A job without ratios and cells only makes the weights: what that leaves on the device must not
    count as the measured process's.
    """
    name, job_path, out_path = argv
    engine = ENGINES[name]
    failed = engine.missing()
    if failed is None:
        try:
            engine.prepare()
        except Exception as error:
            traceback.print_exc()
            failed = f"{type(error).__name__}: {error}"
    import torch  # early, while another process has the device

    sys.stdin.readline()
    with Path(out_path).open("w") as out:
        if failed is not None:
            out.write(json.dumps({"status": "failed", "reason": failed}) + "\n")
            return 0
        job = start_job(Path(job_path))
        if job.device.type == "cuda":
            row = {"kind": "device", "gpu": torch.cuda.get_device_name(job.device)}
            out.write(json.dumps(row) + "\n")
        if job.ratios or job.points:
            from bench.limits import Limits

            Limits(job, engine, out).run()
        else:
            Worker(job, engine, out).run()
    return 0

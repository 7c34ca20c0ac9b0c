"""Runs a plan: one process for each engine, the next one started early, results after each."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import processes, weights
from bench.cells import Point
from bench.engines import ENGINES
from bench.measure import Effort
from bench.references import References

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.cells import Bed
    from bench.plans import Stage
    from bench.results import Results

_PATIENCE_S = 60.0
"""How long after its deadline a process may take before it is killed."""
_LONGEST_S = 240.0
"""One engine at one bed gets no more: one that hangs must not take the others' time."""
_ROOM_BESIDE = 2 << 30
"""For what two processes hold on a GPU in any case, and the probe of the link."""


@dataclass(frozen=True)
class Options:
    """How a plan is run."""

    device: str
    folder: Path
    """Where the weights are: shared memory."""
    out: Path
    minutes: float
    link_bytes_per_s: float | None
    python: str
    deep: bool = True
    keep_weights: bool = False
    engines: tuple[str, ...] | None = None
    log: Path | None = None


class Process:
    """A worker that has been started and waits."""

    def __init__(self, engine: str, scratch: Path, number: int, options: Options) -> None:
        """Starts it; it imports torch and the engine and then waits for `go`."""
        self.engine = engine
        self._job, self._out = scratch / f"job{number}.json", scratch / f"out{number}.jsonl"
        self._log = (options.log or scratch / "log").open("a")
        words = ["worker", engine, str(self._job), str(self._out)]
        self._process = processes.start(options.python, words, self._log)

    def go(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """Hands it the job; returns its rows, and one that says why if it died."""
        self._job.write_text(json.dumps(job))
        assert self._process.stdin is not None
        reason = None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.close()
            code = self._process.wait(max(1.0, job["deadline"] - time.time()) + _PATIENCE_S)
            if code:
                reason = f"the process ended with status {code}"
        except (BrokenPipeError, subprocess.TimeoutExpired) as error:
            reason = f"{type(error).__name__}: it did not end in time"
        finally:
            self.end()
        rows = []
        if self._out.exists():
            rows = [json.loads(line) for line in self._out.read_text().splitlines()]
        if reason is not None:
            rows.append({"status": "failed", "reason": reason})
        return rows

    def end(self) -> None:
        """Kills it if it still runs."""
        processes.end(self._process)
        self._log.close()


@dataclass(frozen=True)
class _Task:
    stage: Stage
    engine: str
    kind: str
    """``weights``, ``limits`` or ``cells``; the first two are the resident engine's."""


class Run:
    """A plan on its way."""

    def __init__(self, stages: list[Stage], options: Options, results: Results) -> None:
        """Takes results that may hold cells of an earlier run."""
        self._options, self._results = options, results
        self._deadline = time.time() + 60 * options.minutes
        wanted = options.engines
        self._tasks = [
            task
            for stage in stages
            for task in (
                _Task(stage, "resident", "weights"),
                _Task(stage, "resident", "limits"),
                *(_Task(stage, name, "cells") for name in stage.engines),
            )
            if task.kind != "cells" or wanted is None or task.engine in wanted
        ]

    def run(self) -> None:
        """Runs the tasks in order; saves after each."""
        with tempfile.TemporaryDirectory() as scratch:
            tasks = list(self._open_tasks())
            log = self._options.log or Path(scratch) / "log"
            self._references = References(self._options.python, Path(scratch), log)
            ahead = self._start(tasks[0], Path(scratch), 0) if tasks else None
            try:
                for number, task in enumerate(tasks):
                    now, ahead = ahead, None
                    assert now is not None
                    if number + 1 < len(tasks):
                        ahead = self._start(tasks[number + 1], Path(scratch), number + 1)
                        self._prepare(task, tasks[number + 1])
                    self._one(task, now)
                    self._results.save(self._options.out)
                    self._remove_weights(task, tasks[number + 1 :])
            finally:
                self._references.end()
                if ahead is not None:
                    ahead.end()

    def _remove_weights(self, task: _Task, later: list[_Task]) -> None:
        workload = task.stage.bed.workload
        is_needed = any(other.stage.bed.workload == workload for other in later)
        if not is_needed and not self._options.keep_weights:
            weights.remove(workload, self._options.folder)

    def _open_tasks(self) -> Iterator[_Task]:
        """The tasks, without limits that are known and weights that an earlier task makes."""
        covered: dict[str, set[float]] = {}
        made: str | None = None
        for task in self._tasks:
            bed, ratios = task.stage.bed, set(task.stage.ratios)
            if task.kind == "weights":
                if made == bed.workload.key:
                    continue
                made = bed.workload.key
            elif task.kind == "limits":
                known = covered.setdefault(bed.key, self._results.ratios_of(bed))
                if ratios <= known and not self._untimed(task.stage):
                    continue
                covered[bed.key] = known | ratios
            yield task

    def _start(self, task: _Task, scratch: Path, number: int) -> Process:
        return Process(task.engine, scratch, number, self._options)

    def _prepare(self, task: _Task, following: _Task) -> None:
        """Starts the reference of the next task's bed, if it has one: importing takes a while."""
        bed = following.stage.bed
        is_new = task.kind == "limits" and task.stage.bed == bed
        if following.kind == "cells" and (is_new or self._cells(following.stage, following.engine)):
            self._references.prepare(bed.key)

    def _refer(self, task: _Task, job: dict[str, Any]) -> dict[str, Any] | None:
        """Where the bed's reference answers, settled; one of another bed has been ended."""
        if task.kind != "cells":
            self._references.rest()  # these have the device for themselves
            return None
        machine, bed = self._results.value["machine"], task.stage.bed
        need = bytes_beside(self._results, bed, job["cells"], job["deep"])
        if need > machine.get("gpu_bytes", need):
            self._references.rest()
            return {"failed": f"needs {need} bytes, the device has {machine['gpu_bytes']}"}
        points = self._results.points(bed).values()
        known = [{"tokens": point["tokens"], "pace_s": point["pace_s"]} for point in points]
        wanted = job | {"engine": "resident", "cells": [], "points": known}
        return self._references.of(bed.key, wanted, self._deadline)

    def _one(self, task: _Task, process: Process) -> None:
        begun, bed = time.time(), task.stage.bed
        deadline = min(self._deadline, begun + _LONGEST_S)
        job = self._job(task, deadline)
        if not self._has_work(task, job):
            process.end()
            return
        if ENGINES[task.engine].needs_cuda and self._options.device != "cuda":
            process.end()
            rows = [{"status": "failed", "reason": "needs a CUDA device, found the CPU"}]
        elif begun > self._deadline:
            process.end()
            rows = [{"status": "skipped", "reason": "no time was left"}]
        else:
            job["beside"] = self._refer(task, job)
            job["deadline"] = min(self._deadline, time.time() + _LONGEST_S)
            rows = process.go(job)
        self._results.check_device(rows)
        if task.kind == "limits":
            self._results.add_limits(bed, rows)
        elif task.kind == "cells":
            self._results.add_cells(bed, task.engine, job["cells"], rows)
        spent = time.time() - begun
        said = "; ".join(dict.fromkeys(row["reason"] for row in rows if row.get("reason")))
        name = task.engine if task.kind == "cells" else task.kind
        print(f"{bed.key:24} {name:20} {spent:6.1f} s  {said[:140]}", flush=True)

    def _has_work(self, task: _Task, job: dict[str, Any]) -> bool:
        """Whether a task has anything left to do; weights are made only for what has."""
        if task.kind == "cells":
            return bool(job["cells"])
        if task.kind == "limits":
            return bool(job["ratios"] or job["points"])
        workload = task.stage.bed.workload
        later = [t for t in self._tasks if t.stage.bed.workload == workload and t.kind != "weights"]
        return any(
            set(t.stage.ratios) - self._results.ratios_of(t.stage.bed)
            or (t.kind == "cells" and self._cells(t.stage, t.engine))
            for t in later
        )

    def _job(self, task: _Task, deadline: float) -> dict[str, Any]:
        options, stage = self._options, task.stage
        cells = self._cells(stage, task.engine) if task.kind == "cells" else []
        missing = sorted(set(stage.ratios) - self._results.ratios_of(stage.bed), reverse=True)
        return {
            "engine": task.engine,
            "bed": stage.bed.to_json(),
            "folder": str(options.folder),
            "device": options.device,
            "link_bytes_per_s": options.link_bytes_per_s,
            "measured_link": (self._results.bed(stage.bed) or {}).get("link_bytes_per_s"),
            "effort": dataclasses.asdict(Effort(**stage.effort)),
            "cells": cells,
            "references": self._results.points(stage.bed),
            "deadline": deadline,
            "ratios": missing if task.kind == "limits" else [],
            "points": self._untimed(stage) if task.kind == "limits" else [],
            "deep": options.deep,
            "hooks": not any(cell.get("hooks") for cell in self._results.value["cells"]),
            "beside": None,
        }

    def _untimed(self, stage: Stage) -> list[dict[str, Any]]:
        """The points whose blocks have not been timed."""
        return [
            {"tokens": point["tokens"], "pace_s": point["pace_s"]}
            for point in self._results.points(stage.bed).values()
            if "block_s" not in point
        ]

    def _cells(self, stage: Stage, engine: str) -> list[tuple[int, dict[str, Any]]]:
        """The cells of an engine that are not there yet, in order of the budgets."""
        found = self._results.bed(stage.bed)
        if found is None or not found["points"]:
            return []  # its limits were not measured
        keys = self._results.keys_of(stage.bed, stage.ratios)
        shares = stage.shares + (stage.only_ours if engine == "dgls" else ())
        cells = []
        for share in shares:
            budget = int(share * found["weight_bytes"])
            # Where all fits there is little to vary: the least work and a middling one.
            chosen = keys[:3:2] if share > 1 else keys
            for key in dict.fromkeys(chosen):
                if not self._results.is_done(stage.bed, engine, budget, key):
                    point = found["points"][key]
                    fields = {"tokens": point["tokens"], "pace_s": point["pace_s"]}
                    cells.append((budget, fields))
        return cells


def bytes_beside(
    results: Results, bed: Bed, cells: list[tuple[int, dict[str, Any]]], deep: bool
) -> int:
    """What the device needs for cells with the reference beside them.

    Two models where all fits: passes are then compared within the engine's process as well.
    """
    found, points = results.bed(bed) or {}, results.points(bed)
    total = found["weight_bytes"]
    copies = 2 if deep else 1
    largest = max(copies * total if budget >= total else budget for budget, _ in cells)
    workspace = max(points[Point(**fields).key].get("workspace_bytes", 0) for _, fields in cells)
    return int(total + largest + 2 * workspace + _ROOM_BESIDE)


def default_python() -> str:
    """The interpreter with the peers, if `make peers` made one, else this one."""
    peers = Path(__file__).resolve().parents[1] / ".venv" / "peers" / "bin" / "python"
    return str(peers) if peers.exists() else sys.executable

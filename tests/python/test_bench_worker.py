"""What one process does with engines that fail: nothing measured is lost, nothing is hidden.

Goal: out of memory is tried once more without the cap; every other failure names its reason and
costs its own budget only; time that is up leaves cells that say so.
Method: the worker in this process, with engines made for the purpose.
"""

from __future__ import annotations

import io
import json
import time
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bench_jobs import BED, CPU, POINTS, job

from bench import details, measure, weights, worker
from bench.engines import Attached, Engine, Setup
from bench.measure import Effort
from bench.worker import Worker

if TYPE_CHECKING:
    from pathlib import Path


class Odd(Engine):
    """Resident, but for what goes wrong."""

    errors: list[Exception | None]
    """Of each attachment in turn; None for none."""
    open_now: int
    learns: bool

    def attach(self, setup: Setup) -> Attached:
        error = self.errors.pop(0) if self.errors else None
        object.__setattr__(self, "open_now", self.open_now + 1)

        def step(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            if error is not None:
                raise error
            out: torch.Tensor = setup.stack(x, c)
            return out

        def close() -> None:
            object.__setattr__(self, "open_now", self.open_now - 1)

        return Attached(step, close, learns=self.learns)


EFFORT = Effort(warm=1, least=1, most=1, seconds=0.0)


def rows(
    folder: Path,
    errors: list[Exception | None],
    seconds: float = 60,
    effort: Effort = EFFORT,
    learns: bool = False,
) -> list[dict[str, Any]]:
    """The rows of a job of two budgets with two points each."""
    engine = Odd("odd", "none")
    object.__setattr__(engine, "errors", errors)
    object.__setattr__(engine, "learns", learns)
    object.__setattr__(engine, "open_now", 0)
    given = job(
        folder,
        engine="odd",
        link_bytes_per_s=None,
        effort=effort,
        cells=[(budget, point) for budget in (10, 20) for point in POINTS],
        deadline=time.time() + seconds,
    )
    stack = weights.load(BED.workload, weights.make(BED.workload, given.folder, CPU))
    for point in POINTS:
        x, c = BED.workload.inputs(point.tokens, CPU)
        given.references[point.key] = {"hash": measure.digest(stack, x, c), "workspace_bytes": 0}
    out = io.StringIO()
    Worker(given, engine, out).run()
    assert engine.open_now == 0  # whatever happened, the engine was closed
    return [json.loads(line) for line in out.getvalue().splitlines()]


def outcome(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["budget_bytes"], row["point"], row["status"], row.get("capped"), row.get("exact"))


def test_all_cells_are_measured(tmp_path: Path) -> None:
    assert [outcome(row) for row in rows(tmp_path, [])] == [
        (budget, point, "ok", True, True) for budget in (10, 20) for point in ("3", "4")
    ]


def test_an_engine_that_learns_has_passes_to_settle_before_it_is_timed(tmp_path: Path) -> None:
    effort = Effort(warm=1, least=1, most=1, seconds=0.0, settling_s=60.0, settling=7)
    for learns, settling in ((True, 7), (False, None)):
        found = rows(tmp_path, [], effort=effort, learns=learns)
        assert [row.get("settling") for row in found] == [settling] * 4
        assert all(row.get("settling_pass_s", 1.0) > 0.0 for row in found)
        assert all(len(row.get("settling_passes_s", [])) == (settling or 0) for row in found)
    assert all("settling" not in row for row in rows(tmp_path, [], learns=True))
    assert [Effort(settling_s=12.0).passes_to_settle(s) for s in (0.01, 0.5, 20.0)] == [60, 24, 1]


def test_an_engine_is_asked_before_a_profiler_slows_its_passes_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def said(what: str, *_: Any) -> dict[str, Any]:
        seen.append(what)
        return {what: True}

    class Asked(Engine):
        def attach(self, setup: Setup) -> Attached:
            return Attached(setup.stack, lambda: None, partial(said, "asked"))

    monkeypatch.setattr(details, "details", partial(said, "profiled"))
    out = io.StringIO()
    given = job(tmp_path, effort=EFFORT, deep=True, cells=[(10, POINTS[0])])
    Worker(given, Asked("asked", "none"), out).run()
    row = json.loads(out.getvalue())
    assert (row["facts"], row["profiled"]) == ({"asked": True}, True)
    assert seen == ["asked", "profiled"]


def test_out_of_memory_is_tried_again_without_the_cap(tmp_path: Path) -> None:
    found = rows(tmp_path, [torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB")])
    assert [outcome(row)[:4] for row in found] == [
        (10, "3", "ok", False),
        (10, "4", "ok", False),
        (20, "3", "ok", True),
        (20, "4", "ok", True),
    ]


def test_out_of_memory_without_the_cap_is_a_failure(tmp_path: Path) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB")
    found = rows(tmp_path, [error, error])
    assert [outcome(row)[2] for row in found] == ["failed", "failed", "ok", "ok"]
    assert "out of memory" in found[0]["reason"]


def test_a_failure_names_its_reason_and_costs_its_budget_only(tmp_path: Path) -> None:
    found = rows(tmp_path, [ValueError("no room\nfor anything")])
    assert [outcome(row)[2] for row in found] == ["failed", "failed", "ok", "ok"]
    assert found[0]["reason"] == "ValueError: no room"


def test_time_that_is_up_leaves_cells_that_say_so(tmp_path: Path) -> None:
    found = rows(tmp_path, [], seconds=-1)
    assert {(row["status"], row["reason"]) for row in found} == {("skipped", "no time was left")}
    assert len(found) == 4


def test_wrong_output_is_not_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure.digest
    seen: list[str] = []

    def digest(*arguments: Any) -> str:
        seen.append(real(*arguments))
        # the references, then the first and the last hash of each cell: the last of the first cell
        return "another" if len(seen) == len(POINTS) + 2 else seen[-1]

    monkeypatch.setattr(measure, "digest", digest)
    found = rows(tmp_path, [])
    assert [outcome(row)[4] for row in found] == [False, True, True, True]


def test_a_watch_tells_gaps_of_torchs_allocator_from_memory_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks = {"reserved": 100, "allocated": 100}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70, 100))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peaks.clear())
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: peaks["reserved"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peaks["allocated"])
    watch = measure.Watch(torch.device("cuda", 0))
    assert (watch.peak_bytes, watch.gaps_bytes) == (None, None)
    with watch.open():
        peaks.update(reserved=50, allocated=35)
    assert watch.gaps_bytes == 15, "the peaks of before do not count"


@pytest.mark.parametrize(("takes_s", "measured"), [(45.0, 3), (110.0, 1)])
def test_no_cell_begins_that_would_end_too_late(
    takes_s: float, measured: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is killed leaves nothing, and engines whose cells take long would lose the last."""
    now, true = [time.time()], Worker._measure

    def slow(self: Worker, *arguments: Any) -> dict[str, Any]:
        now[0] += takes_s
        return true(self, *arguments)

    monkeypatch.setattr(Worker, "_measure", slow)
    clock = SimpleNamespace(time=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(worker, "time", clock)
    found = [row["status"] for row in rows(tmp_path, [], seconds=120)]
    assert found == ["ok"] * measured + ["skipped"] * (4 - measured)

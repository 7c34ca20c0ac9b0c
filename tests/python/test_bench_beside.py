"""The limit beside a cell: turns of a reference between the rounds of an engine's passes.

Goal: turns come where they should, what is lost is named, nothing hangs and nothing is left over.
Method: a real reference on the CPU beside a worker in this process, killed or stopped on purpose;
the order of turns by engines and readers made for the purpose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import bench_path
import pytest
import torch

bench_path.put_on_path()

from bench import beside, eaters, measure, reference, weights  # noqa: E402
from bench.beside import Beside, Turns  # noqa: E402
from bench.cells import Bed, Point  # noqa: E402
from bench.engines import ENGINES  # noqa: E402
from bench.measure import Effort  # noqa: E402
from bench.references import Reference, References  # noqa: E402
from bench.stacks import Workload  # noqa: E402
from bench.worker import Job, Worker  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.once
CPU = torch.device("cpu")
BED = Bed(Workload("flux", scale=1 / 40, depth=0.1, text_tokens=2))
POINTS = (Point(3), Point(4))
EFFORT = Effort(warm=1, least=3, most=3, seconds=0.0, rounds=2, beside=2, lead_s=0.0)
RATE = 2e8


def job(folder: Path, **fields: Any) -> Job:
    values: dict[str, Any] = {
        "engine": "resident",
        "bed": BED,
        "folder": folder / "weights",
        "device": CPU,
        "link_bytes_per_s": RATE,
        "measured_link": None,
        "effort": EFFORT,
        "cells": [(10, point) for point in POINTS],
        "references": {},
        "deadline": time.time() + 60,
        "ratios": [],
        "points": [],
        "deep": False,
        "hooks": False,
    }
    return Job(**(values | fields))


def wanted(folder: Path, **fields: Any) -> dict[str, Any]:
    """The job of a reference as a run writes it."""
    made = job(folder, points=list(POINTS), cells=[], **fields)
    value = {field.name: getattr(made, field.name) for field in dataclasses.fields(Job)}
    return value | {
        "bed": BED.to_json(),
        "folder": str(made.folder),
        "device": "cpu",
        "effort": dataclasses.asdict(EFFORT),
        "points": [dataclasses.asdict(point) for point in POINTS],
    }


@contextlib.contextmanager
def settled(folder: Path) -> Iterator[Reference]:
    weights.make(BED.workload, folder / "weights", CPU)
    found = Reference(BED.key, sys.executable, folder, 0, folder / "log")
    try:
        reason = found.settle(wanted(folder), time.time() + 60)
        assert reason is None, (folder / "log").read_text()
        yield found
    finally:
        found.end()


@pytest.fixture(scope="module")
def alive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Reference]]:
    """A folder with weights and a reference that answers."""
    folder = tmp_path_factory.mktemp("beside")
    with settled(folder) as found:
        yield folder, found


def rows(folder: Path, given: dict[str, Any] | None, **fields: Any) -> list[dict[str, Any]]:
    """What a worker writes of two cells."""
    out = io.StringIO()
    Worker(job(folder, beside=given, **fields), ENGINES["resident"], out).run()
    return [json.loads(line) for line in out.getvalue().splitlines()]


def a_turn(**point: float) -> dict[str, Any]:
    """A question for a turn of one timed pass."""
    return {"point": {"tokens": 3} | point, "lead": 1, "passes": 1}


def test_each_cell_has_the_limit_of_its_own_turns(alive: tuple[Path, Reference]) -> None:
    folder, found = alive
    for _ in range(2):  # one worker after the other
        for row in rows(folder, found.given()):
            assert row["status"] == "ok"
            assert "beside_failed" not in row
            limit = row["beside_limit"]
            assert [len(turn["passes_s"]) for turn in limit["rounds"]] == [2, 2, 2]
            assert limit["link_bytes_per_s"] == RATE
            every = sorted(s for turn in limit["rounds"] for s in turn["passes_s"])
            assert limit["compute_s"] == pytest.approx((every[2] + every[3]) / 2)
            assert len(row["passes_s"]) == 4  # three, in two rounds of as many


def test_without_a_reference_nothing_is_said_of_one(tmp_path: Path) -> None:
    for row in rows(tmp_path, None):
        assert not {"beside_limit", "beside_failed"} & set(row)
        assert len(row["passes_s"]) == 3


def test_cells_say_why_there_is_no_reference(tmp_path: Path) -> None:
    for row in rows(tmp_path, {"failed": "needs 2 bytes, the device has 1"}):
        assert row["status"] == "ok"
        assert row["beside_failed"] == "needs 2 bytes, the device has 1"
        assert len(row["passes_s"]) == 3


def test_a_turn_that_fails_costs_its_cell_only(alive: tuple[Path, Reference]) -> None:
    _, found = alive
    one = Beside(found.given(), CPU)
    with pytest.raises(ValueError, match="KeyError: 'passes'"):
        one.ask({"point": {"tokens": 3}, "lead": 1}, 10.0)
    assert one.is_on
    assert len(one.ask(a_turn(), 10.0)["passes_s"]) == 1
    one.close()
    turns = [{"tokens": "no"}, {"tokens": 3}]
    one = Beside(found.given(), CPU)
    cells = [Turns(one, Point(**turn), EFFORT, 0.0, contextlib.nullcontext) for turn in turns]
    for cell in cells:
        cell.take()
        cell.take()
    assert "beside_failed" in cells[0].row()
    assert len(cells[1].row()["beside_limit"]["rounds"]) == 2
    one.close()


def after_turns(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], Any]) -> None:
    """Does something before the turn after ``count`` turns."""
    real, seen = Beside.ask, []

    def ask(self: Beside, *arguments: Any) -> dict[str, Any]:
        seen.append(1)
        if len(seen) == count + 1:
            act()
        return real(self, *arguments)

    monkeypatch.setattr(Beside, "ask", ask)


def test_a_reference_that_is_killed_costs_no_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with settled(tmp_path) as found:
        pid = found.given()["pid"]
        # in the middle of the second cell
        after_turns(monkeypatch, 4, lambda: (os.kill(pid, signal.SIGKILL), time.sleep(0.2)))
        first, second = rows(tmp_path, found.given())
        assert "beside_limit" in first
        assert second["status"] == "ok"
        assert "beside_limit" not in second
        assert second["beside_failed"].startswith("the reference was lost: ")
        assert len(second["passes_s"]) == 4
        assert found.death() == "the reference ended with status -9"
        # and one that is gone is no reason to wait
        (third, _) = rows(tmp_path, found.given())
        assert third["beside_failed"].startswith("the reference was lost: ")


def test_a_reference_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with settled(tmp_path) as found:
        monkeypatch.setattr(beside, "_PATIENCE_S", 0.3)
        pid = found.given()["pid"]
        after_turns(monkeypatch, 1, lambda: os.kill(pid, signal.SIGSTOP))
        first, second = rows(tmp_path, found.given())
        assert first["beside_failed"] == "the reference was lost: TimeoutError: timed out"
        assert second["beside_failed"] == first["beside_failed"]
        # it would compute beside the engine when it goes on
        assert ends(found) == "the reference ended with status -9"


def ends(found: Reference) -> str | None:
    until = time.time() + 30
    while found.death() is None and time.time() < until:
        time.sleep(0.01)
    return found.death()


def test_a_worker_begins_when_no_turn_is_under_way(
    alive: tuple[Path, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Beside(alive[1].given(), CPU)
    one._lines.write(json.dumps(a_turn(pace_s=0.1)) + "\n")
    one._lines.flush()
    one.close()  # as a worker that was killed; its turn goes on
    monkeypatch.setattr(beside, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(os, "kill", lambda *_: None)
    other = Beside(alive[1].given(), CPU)
    assert other.failed == "the reference was lost: TimeoutError: timed out"
    monkeypatch.setattr(beside, "_PATIENCE_S", 30.0)
    other = Beside(alive[1].given(), CPU)
    assert other.is_on
    other.close()


def test_a_reference_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    with settled(tmp_path) as found:
        assert found._process.stdin is not None
        found._process.stdin.close()  # as the kernel does for one that was killed
        assert ends(found) == "the reference ended with status 0"


def test_a_reference_that_does_not_get_ready_is_given_up_for_its_bed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\nread line\nexec sleep 60\n")
    path.chmod(0o755)
    kept = References(str(path), tmp_path, tmp_path / "log")
    started: list[Reference] = []
    real = kept._start

    def start(bed: str) -> Reference:
        started.append(real(bed))
        return started[-1]

    monkeypatch.setattr(kept, "_start", start)
    kept.prepare("bed")
    assert len(started) == 1
    for _ in range(2):
        found = kept.of("bed", wanted(tmp_path), time.time() + 0.2)
        assert found == {"failed": "the reference was not ready in time"}
        assert started[0].death() is not None
        kept.prepare("bed")
    assert len(started) == 1
    # one that was prepared is ended when another bed comes, and the rest at the end
    kept.prepare("other")
    assert "failed" in kept.of("third", wanted(tmp_path), 0.0)
    kept.prepare("fourth")
    kept.end()
    assert [one.bed for one in started] == ["bed", "other", "third", "fourth"]
    assert all(one.death() is not None for one in started)


def test_one_that_cannot_load_says_why(tmp_path: Path) -> None:
    found = Reference(BED.key, sys.executable, tmp_path, 0, tmp_path / "log")
    try:
        value = wanted(tmp_path) | {"link_bytes_per_s": None}
        reason = found.settle(value, time.time() + 60)
    finally:
        found.end()
    assert reason is not None
    assert "the reference failed: ValueError: the CPU's link needs a rate" in reason


def test_it_is_ready_after_a_turn_at_each_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Point] = []
    monkeypatch.setattr(reference.Reference, "turn", lambda _self, point, *_: seen.append(point))
    reference.Reference(job(tmp_path, points=list(POINTS)), ENGINES["resident"], io.StringIO())
    assert seen == list(POINTS)


def test_a_turn_gives_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = reference.Reference(job(tmp_path), ENGINES["resident"], io.StringIO())
    seen: list[int] = []
    monkeypatch.setattr(made, "empty_cache", lambda: seen.append(1))
    made.turn(Point(3), 1, 1)
    assert len(seen) == 1
    assert "failed" in made.answer('{"point": {}}')
    assert len(seen) == 2


def test_nothing_is_watched_during_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watching: list[bool] = []
    seen: list[bool] = []

    @contextlib.contextmanager
    def watch(_self: measure.Watch) -> Iterator[None]:
        watching.append(True)
        yield
        watching.pop()

    def take(_self: Turns) -> None:
        seen.append(bool(watching))

    monkeypatch.setattr(measure.Watch, "open", watch)
    monkeypatch.setattr(Turns, "take", take)
    monkeypatch.setattr(Turns, "are_on", True)
    rows(tmp_path, None)
    assert seen == [False] * 6


def test_rounds_lie_between_turns() -> None:
    seen: list[str] = []

    def step(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        seen.append("pass")
        return x + c

    x, c = torch.zeros(1), torch.ones(1)
    timing, _ = measure.steady(step, x, c, EFFORT, lambda: seen.append("turn"))
    a_round = ["pass"] * 3  # one to get going again, two that are timed
    assert seen == ["pass", "turn", *a_round, "turn", *a_round, "turn"]
    assert len(timing.passes) == 4
    seen.clear()
    assert len(measure.steady(step, x, c, EFFORT)[0].passes) == 3
    assert seen == ["pass"] * 4


def test_the_first_pass_of_a_round_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(_step: Any, _x: Any, _c: Any, passes: int) -> measure.Timing:
        return measure.Timing([float(number) for number in range(passes)], 0.25, 0.5)

    monkeypatch.setattr(measure, "timed", timed)
    x = torch.zeros(1)
    timing, _ = measure.steady(lambda x, c: x, x, x, EFFORT, lambda: None)
    assert timing == measure.Timing([1.0, 2.0, 1.0, 2.0], 0.25, 0.5)
    assert measure.steady(lambda x, c: x, x, x, EFFORT)[0].passes == [0.0, 1.0, 2.0]


def test_a_round_and_a_turn_begin_with_as_much_that_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def timed(_step: Any, _x: Any, _c: Any, passes: int) -> measure.Timing:
        seen.append(passes)
        return measure.Timing([0.25 + number for number in range(passes)], 0.25, 0.5)

    made = reference.Reference(job(tmp_path), ENGINES["resident"], io.StringIO())
    monkeypatch.setattr(measure, "timed", timed)
    effort, x = dataclasses.replace(EFFORT, warm=1, lead_s=0.6), torch.zeros(1)
    timing, _ = measure.steady(lambda x, c: x, x, x, effort, lambda: None)
    assert seen == [1, 5, 5]  # three of 0.25 s, and two that are timed
    assert timing.passes == [3.25, 4.25] * 2
    seen.clear()

    asked: Any = SimpleNamespace(
        is_on=True, failed=None, is_wanted=True, ask=lambda q, _: made.answer(json.dumps(q))
    )
    turns = Turns(asked, Point(3), effort, 0.25, contextlib.nullcontext)
    turns.take()
    assert seen == [1, 4]
    assert turns.row()["beside_limit"]["rounds"][0]["passes_s"] == [2.25, 3.25]


def test_short_passes_have_one_more_before_those_of_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = reference.Reference(job(tmp_path), ENGINES["resident"], io.StringIO())
    for pass_s, first in ((0.05, 1), (0.2, 0)):
        times = [pass_s, pass_s + 1, pass_s + 2]
        monkeypatch.setattr(
            measure, "timed", lambda *args, of=times: measure.Timing(of[: args[3]], 0.25, 0.5)
        )
        assert made.turn(Point(3), 1, 2)["passes_s"] == times[first : first + 2]


def test_allocations_are_those_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"count": 0}

    def step(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        made["count"] += 5
        return x + c

    def rest() -> None:
        made["count"] += 1000  # what happens between rounds is no pass's

    monkeypatch.setattr(measure, "allocator_counts", lambda _: dict(made))
    _, counts = measure.steady(step, torch.zeros(1), torch.ones(1), EFFORT, rest)
    assert counts == {"count": 5.0}


def test_readers_rest_during_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    reader = SimpleNamespace(stop=lambda: seen.append("stop"), start=lambda: seen.append("start"))
    monkeypatch.setattr(eaters, "_Reader", lambda *_: reader)
    device: Any = SimpleNamespace(type="cuda")

    def ask(*_: Any) -> dict[str, Any]:
        seen.append("turn")
        raise ValueError("no memory")

    asked: Any = SimpleNamespace(is_on=True, failed=None, is_wanted=True, ask=ask)
    with eaters.eating(device, 4) as load:
        turns = Turns(asked, Point(3), EFFORT, 0.0, load.paused)
        turns.take()
        turns.take()  # after one that failed there are no more
        assert seen == ["stop", "turn", "start"]
    assert seen[3:] == ["stop"]
    assert turns.row() == {"beside_failed": "no memory"}


def test_a_turn_may_take_longer_where_passes_do() -> None:
    seen: list[float] = []

    def ask(_question: Any, patience_s: float) -> dict[str, Any]:
        seen.append(patience_s)
        return {"link_bytes_per_s": 1.0, "passes_s": [1.0]}

    asked: Any = SimpleNamespace(is_on=True, failed=None, is_wanted=True, ask=ask)
    effort = Effort(beside=1, lead_s=3.0)
    for compute_s in (0.0, 2.0):
        Turns(asked, Point(3), effort, compute_s, contextlib.nullcontext).take()
    assert seen == [15.0, 95.0]


def test_what_turns_leave_on_the_device_is_not_the_engines(
    alive: tuple[Path, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    uses = [100, 107, 120, 121]  # before and after each turn; what came in between is the engine's
    one = Beside(alive[1].given(), CPU)
    monkeypatch.setattr(measure, "used_bytes", lambda _: uses.pop(0) if uses else 121)
    assert one.base_bytes(50) == 50
    for _ in range(2):
        one.ask(a_turn(), 10.0)
    assert one.base_bytes(50) == 58
    assert one.base_bytes(None) is None
    monkeypatch.setattr(os, "kill", lambda *_: None)
    one._lose(OSError("gone"))
    assert one.base_bytes(50) is None

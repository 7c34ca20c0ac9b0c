"""The limit beside a cell: turns of a reference between the rounds of an engine's passes.

Goal: turns come where they should, what is lost is named, nothing hangs and nothing is left over.
Method: a real reference on the CPU beside a worker in this process, killed or stopped on purpose.
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
from typing import TYPE_CHECKING, Any

import pytest
from bench_jobs import BED, CPU, EFFORT, POINTS, RATE, job

from bench import beside, measure, reference, weights
from bench.beside import Beside, Turns
from bench.cells import Point
from bench.engines import ENGINES
from bench.references import Reference, References
from bench.worker import Job, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.once


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
    cells = [Turns(one, Point(**turn), EFFORT, 0.0) for turn in turns]
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

"""Processes that copy beside an engine: they are there while they should be, and never longer."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_jobs
import pytest
from bench_jobs import CPU, job

from bench import eaters, measure
from bench.cells import Bed
from bench.engines import ENGINES
from bench.limits import Limits
from bench.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ADDRESS = "DGLS_TEST_EATERS"
LOADED = Bed(bench_jobs.BED.workload, 2)


def connect(ordinal: int, ready: Callable[[], None]) -> None:
    """Instead of copies: holds a connection for as long as the process lives."""
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(os.environ[ADDRESS])
        end.sendall(bytes([ordinal]))
        while True:
            ready()
            time.sleep(0.01)


def end_at_once(_ordinal: int, _ready: Callable[[], None]) -> None:
    sys.exit(3)


def never_ready(ordinal: int, _ready: Callable[[], None]) -> None:
    connect(ordinal, lambda: None)


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.setenv(ADDRESS, str(tmp_path / "s"))
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
        made.listen()
        made.settimeout(60)
        yield made


def test_they_run_while_the_load_is_open(listener: socket.socket) -> None:
    load = eaters.Load(5, 2, connect)
    with listener.accept()[0] as first, listener.accept()[0] as second:
        assert (first.recv(9), second.recv(9)) == (b"\5", b"\5")
        load.check()
        load.close()
        assert (first.recv(9), second.recv(9)) == (b"", b"")


def test_one_that_ends_is_told(listener: socket.socket) -> None:
    load = eaters.Load(0, 2, connect)
    os.kill(load._processes[1].pid or 0, signal.SIGKILL)
    load._processes[1].join()
    with pytest.raises(RuntimeError, match="a process that copies ended with status -9"):
        load.check()
    load.close()


def test_one_that_cannot_begin_is_told() -> None:
    with pytest.raises(RuntimeError, match="a process that copies ended with status 3"):
        eaters.Load(0, 1, end_at_once)


def test_one_that_is_not_ready_in_time_is_told_and_ended(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eaters, "_READY_S", 0.0)
    with pytest.raises(RuntimeError, match="was not ready in 0 s"):
        eaters.Load(0, 1, never_ready)
    listener.settimeout(0.2)
    with contextlib.suppress(TimeoutError), listener.accept()[0] as end:
        assert end.recv(9) in (b"", b"\0")  # it had come that far when it was killed
        assert end.recv(9) == b""


def test_they_end_with_a_parent_that_is_killed(listener: socket.socket) -> None:
    code = (
        "import time; from bench.eaters import Load; from test_bench_eaters import connect\n"
        "if __name__ == '__main__':\n"
        "    load = Load(0, 1, connect)\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    script = Path(os.environ[ADDRESS]).with_name("parent.py")
    script.write_text(code)
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        with listener.accept()[0] as end:
            end.settimeout(60)
            assert end.recv(9) == b"\0"
            parent.kill()
            parent.wait()
            assert end.recv(9) == b""


def test_without_any_there_is_nothing_to_open() -> None:
    with eaters.eating(CPU, 0) as load:
        load.check()


def rows(made: Worker, out: io.StringIO) -> list[dict[str, Any]]:
    made.run()
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("kind", [Worker, Limits])
def test_a_bed_that_cannot_have_its_load_fails(kind: type[Worker], tmp_path: Path) -> None:
    out = io.StringIO()
    made = kind(job(tmp_path, bed=LOADED), ENGINES["resident"], out)
    last = rows(made, out)[-1]
    assert last["status"] == "failed"
    assert last["reason"] == "other processes that copy need a CUDA device, found cpu"


class Fake:
    """A load whose processes have ended after some checks."""

    def __init__(self, checks: int) -> None:
        self.is_open, self.checks = False, checks

    @contextlib.contextmanager
    def eating(self, _device: Any, count: int) -> Iterator[Fake]:
        assert count == 2
        self.is_open = True
        yield self
        self.is_open = False

    def check(self) -> None:
        self.checks -= 1
        if self.checks < 0:
            raise RuntimeError("a process that copies ended with status 1")


def test_a_cell_whose_load_ended_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, out = Fake(1), io.StringIO()
    monkeypatch.setattr(eaters, "eating", fake.eating)
    made = Worker(job(tmp_path, bed=LOADED), ENGINES["resident"], out)
    first, second = rows(made, out)
    assert (first["status"], second["status"]) == ("ok", "failed")
    assert second["reason"] == "RuntimeError: a process that copies ended with status 1"


def test_the_loads_memory_is_none_of_an_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, out = Fake(9), io.StringIO()
    monkeypatch.setattr(eaters, "eating", fake.eating)
    monkeypatch.setattr(measure, "used_bytes", lambda _: 500 if fake.is_open else 100)
    made = Worker(job(tmp_path, bed=LOADED), ENGINES["resident"], out)
    assert [row["base_bytes"] for row in rows(made, out)] == [500, 500]


def test_limits_are_of_the_loaded_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, out = Fake(9), io.StringIO()
    monkeypatch.setattr(eaters, "eating", fake.eating)
    monkeypatch.setattr(measure, "link_rate", lambda *_: 1e8 if fake.is_open else 2e8)
    opened: list[bool] = []
    point = Limits._point
    monkeypatch.setattr(Limits, "_point", lambda *of: opened.append(fake.is_open) or point(*of))
    made = Limits(job(tmp_path, bed=LOADED, ratios=[1.0]), ENGINES["resident"], out)
    bed = next(row for row in rows(made, out) if row.get("kind") == "bed")
    assert bed["link_bytes_per_s"] == 1e8
    assert opened == [True]


def test_limits_whose_load_takes_nothing_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, out = Fake(9), io.StringIO()
    monkeypatch.setattr(eaters, "eating", fake.eating)
    made = Limits(job(tmp_path, bed=LOADED, ratios=[1.0]), ENGINES["resident"], out)
    last = rows(made, out)[-1]
    assert last["status"] == "failed"
    assert "2 processes that copy should leave less than 80% of the link" in last["reason"]


def test_limits_whose_load_ended_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, out = Fake(0), io.StringIO()
    monkeypatch.setattr(eaters, "eating", fake.eating)
    monkeypatch.setattr(measure, "link_rate", lambda *_: 1e8 if fake.is_open else 2e8)
    made = Limits(job(tmp_path, bed=LOADED, ratios=[1.0]), ENGINES["resident"], out)
    found = rows(made, out)
    assert found[-1]["reason"] == "a process that copies ended with status 1"
    assert not any(row.get("kind") == "point" for row in found)

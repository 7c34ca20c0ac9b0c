"""A whole run on the CPU: processes, results, resumption, and engines that cannot run.

Goal: one command measures every engine in a process of its own and never loses a result.
Method: the smallest plan, on the CPU with a slow link; no time is asserted.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import bench_path
import pytest

bench_path.put_on_path()

from bench import run  # noqa: E402
from bench.commands import main  # noqa: E402
from bench.plans import PLANS, Stage  # noqa: E402
from bench.results import Results  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path


def measure(folder: Path, *more: str, minutes: str = "4") -> int:
    return main(
        [
            *("run", "--plan", "ci", "--device", "cpu", "--minutes", minutes),
            *("--out", str(folder / "results.json"), "--folder", str(folder / "weights")),
            *("--log", str(folder / "log"), "--python", sys.executable, *more),
        ]
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the plan."""
    folder = tmp_path_factory.mktemp("bench")
    assert measure(folder) == 0
    return folder


def test_every_engine_is_measured_and_exact(done: Path) -> None:
    results = Results.load(done / "results.json")
    cells = results.value["cells"]
    assert [cell["engine"] for cell in cells] == ["dgls", "dgls", "ring", "original"]
    for cell in cells:
        assert cell["status"] == "ok", (cell, (done / "log").read_text()[-2000:])
        assert cell["exact"]
        assert cell["pass_s"] > 0
        assert "total" in cell["account"]
    assert cells[1]["beside"]["resident_s"] > 0  # the budget in which all fits
    assert cells[0]["facts"]["streamed_bytes"] > 0
    assert results.limit(cells[0]).seconds <= cells[0]["optimum_s"] * 1.0001
    bed = next(iter(results.value["beds"].values()))
    assert all(len(point["block_s"]) == bed["blocks"] for point in bed["points"].values())
    assert bed["link_bytes_per_s"] == 2e8
    assert not list((done / "weights").glob("*"))


def test_a_second_run_measures_nothing_again(done: Path) -> None:
    before = json.loads((done / "results.json").read_text())["cells"]
    assert measure(done) == 0
    assert json.loads((done / "results.json").read_text())["cells"] == before


def test_a_hash_that_differs_is_seen(done: Path) -> None:
    value = json.loads((done / "results.json").read_text())
    for point in next(iter(value["beds"].values()))["points"].values():
        point["hash"] = "another"
    value["cells"] = []
    other = done / "other"
    other.mkdir()
    (other / "results.json").write_text(json.dumps(value))
    assert measure(other, "--engines", "ring", "--no-deep") == 0
    cells = Results.load(other / "results.json").value["cells"]
    assert [(cell["status"], cell["exact"]) for cell in cells] == [("ok", False)]


def test_engines_that_cannot_run_are_named_with_their_reason(
    done: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage = PLANS["ci"][0]
    monkeypatch.setitem(PLANS, "ci", (Stage(stage.bed, (0.5,), (2.0,), ("mmgp", "ring")),))
    value = json.loads((done / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(value | {"cells": []}))
    # a process that is told to go ends with 7: here none must be
    assert measure(tmp_path, "--python", str(ends_with_7(tmp_path)), minutes="0") == 0
    cells = Results.load(tmp_path / "results.json").value["cells"]
    assert [(cell["engine"], cell["status"], cell["reason"]) for cell in cells] == [
        ("mmgp", "failed", "needs a CUDA device, found the CPU"),
        ("ring", "skipped", "no time was left"),
    ]


def test_a_process_that_dies_leaves_its_status(
    done: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "_PATIENCE_S", 5.0)
    value = json.loads((done / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(value | {"cells": []}))
    assert measure(tmp_path, "--python", str(ends_with_7(tmp_path))) == 0
    cells = Results.load(tmp_path / "results.json").value["cells"]
    assert {(cell["status"], cell["reason"]) for cell in cells} == {
        ("failed", "the process ended with status 7")
    }


def ends_with_7(folder: Path) -> Path:
    path = folder / "python"
    path.write_text("#!/bin/sh\nread line\nexit 7\n")
    path.chmod(0o755)
    return path


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert measure(tmp_path, "--engines", "ring,magic") == 2
    assert "found 'magic'" in capsys.readouterr().err


def test_every_plan_names_engines_that_exist() -> None:
    from bench.engines import ENGINES

    for stages in PLANS.values():
        for stage in stages:
            assert set(stage.engines) <= set(ENGINES)
            assert "resident" not in stage.engines
            stage.bed.workload.build()


def test_results_of_one_gpu_do_not_go_on_on_another(done: Path) -> None:
    results = Results.load(done / "results.json")
    row = {"kind": "device", "gpu": "NVIDIA H200"}
    results.check_device([row])  # nothing is known yet
    results.value["machine"]["gpu"] = "NVIDIA H200"
    results.check_device([row, {"status": "ok"}])
    results.value["machine"]["gpu"] = "NVIDIA H100"
    with pytest.raises(ValueError, match="of NVIDIA H100, found NVIDIA H200: write to another"):
        results.check_device([row])

"""A whole run on the CPU: processes, results, resumption, and engines that cannot run.

Goal: one command measures every engine in a process of its own and never loses a result.
Method: the smallest plan, on the CPU with a slow link; no time is asserted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_path
import pytest

bench_path.put_on_path()

from bench import run  # noqa: E402
from bench.cells import Bed  # noqa: E402
from bench.commands import main  # noqa: E402
from bench.measure import Effort  # noqa: E402
from bench.plans import PLANS, Stage  # noqa: E402
from bench.results import Results  # noqa: E402

pytestmark = pytest.mark.once


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


def test_the_limit_of_each_cell_is_measured_beside_it(done: Path) -> None:
    results = Results.load(done / "results.json")
    effort = Effort(**PLANS["ci"][0].effort)
    for cell in results.value["cells"]:
        assert "beside_failed" not in cell
        beside = cell["beside_limit"]
        counts = [len(turn["passes_s"]) for turn in beside["rounds"]]
        assert counts == [effort.beside] * (effort.rounds + 1)
        assert len(cell["passes_s"]) % effort.rounds == 0
        assert effort.least <= len(cell["passes_s"]) < effort.most + effort.rounds
        assert results.limit(cell).compute_s == beside["compute_s"] > 0
        assert results.limit(cell).link_bytes_per_s == beside["link_bytes_per_s"] == 2e8
    # where all fits no policy beats compute alone, as it was beside the cell
    fits = results.value["cells"][1]
    assert fits["optimum_s"] == fits["beside_limit"]["compute_s"]


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


def children() -> list[str]:
    """Processes that this one started, those included that ended and nobody waited for."""
    tasks = Path("/proc/self/task").iterdir()
    return sorted(pid for task in tasks for pid in (task / "children").read_text().split())


def without_cells(done: Path, folder: Path) -> dict[str, Any]:
    """The limits of a run, written for another."""
    value: dict[str, Any] = json.loads((done / "results.json").read_text()) | {"cells": []}
    (folder / "results.json").write_text(json.dumps(value))
    return value


def test_a_reference_that_cannot_start_costs_no_cell(done: Path, tmp_path: Path) -> None:
    before = children()
    without_cells(done, tmp_path)
    path = tmp_path / "python"
    text = '#!/bin/sh\n[ "$3" != reference ] || { echo reference >> "$0.log"; read line; exit 7; }'
    path.write_text(f'{text}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    more = ("--engines", "ring,original", "--no-deep")
    assert measure(tmp_path, "--python", str(path), *more) == 0
    results = Results.load(tmp_path / "results.json")
    assert [cell["engine"] for cell in results.value["cells"]] == ["ring", "original"]
    for cell in results.value["cells"]:
        assert cell["status"] == "ok"
        assert cell["beside_failed"] == "the reference ended with status 7"
        bed = results.value["beds"][cell["bed"]]
        assert results.limit(cell).compute_s == bed["points"][cell["point"]]["compute_s"]
    assert (tmp_path / "python.log").read_text() == "reference\n"  # tried once for the bed
    assert children() == before


def test_a_device_too_small_for_both_does_without(done: Path, tmp_path: Path) -> None:
    value = without_cells(done, tmp_path)
    value["machine"]["gpu_bytes"] = 1000
    (tmp_path / "results.json").write_text(json.dumps(value))
    assert measure(tmp_path, "--engines", "ring", "--no-deep") == 0
    results = Results.load(tmp_path / "results.json")
    (cell,) = results.value["cells"]
    bed = Bed.from_json(next(iter(value["beds"].values()))["bed"])
    fields = {"tokens": 3, "pace_s": results.points(bed)[cell["point"]]["pace_s"]}
    need = run.bytes_beside(results, bed, [(cell["budget_bytes"], fields)], False)
    assert cell["status"] == "ok"
    assert cell["beside_failed"] == f"needs {need} bytes, the device has 1000"


def test_what_a_device_needs_for_both(done: Path) -> None:
    results = Results.load(done / "results.json")
    found = next(iter(results.value["beds"].values()))
    bed = Bed.from_json(found["bed"])
    (point,) = found["points"].values()
    point["workspace_bytes"] = 7
    found["weight_bytes"] = 1000
    fields = {"tokens": point["tokens"], "pace_s": point["pace_s"]}

    def need(deep: bool, *budgets: int) -> int:
        cells = [(budget, fields) for budget in budgets]
        return run.bytes_beside(results, bed, cells, deep) - run._ROOM_BESIDE

    assert need(True, 250, 750) == 1000 + 750 + 14
    assert need(False, 1050) == 1000 + 1000 + 14
    assert need(True, 250, 1050) == 1000 + 2000 + 14  # compared with one more in its process


def test_limits_and_weights_have_the_device_for_themselves(done: Path, tmp_path: Path) -> None:
    options = run.Options("cpu", tmp_path, tmp_path / "out", 1.0, 2e8, sys.executable)
    one = run.Run(list(PLANS["ci"]), options, Results.load(done / "results.json"))
    seen: list[str] = []
    one._references = SimpleNamespace(rest=lambda: seen.append("rest"))
    for kind in ("weights", "limits"):
        assert one._refer(run._Task(PLANS["ci"][0], "resident", kind), {}) is None
    assert seen == ["rest", "rest"]


def test_nothing_is_left_over(done: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = children()
    without_cells(done, tmp_path)
    assert measure(tmp_path, "--engines", "ring", "--no-deep") == 0
    assert "beside_limit" in Results.load(tmp_path / "results.json").value["cells"][0]
    assert children() == before
    # nor where the run itself fails while the reference waits
    without_cells(done, tmp_path)
    found: list[list[str]] = []

    def save(self: Results, _path: Path) -> None:
        if self.value["cells"]:
            found.append(children())
            raise RuntimeError("the disk is full")

    monkeypatch.setattr(Results, "save", save)
    with pytest.raises(RuntimeError, match="the disk is full"):
        measure(tmp_path, "--engines", "ring", "--no-deep")
    assert len(found[0]) == len(before) + 1
    assert children() == before


def ends_with_7(folder: Path) -> Path:
    path = folder / "python"
    path.write_text("#!/bin/sh\nread line\nexit 7\n")
    path.chmod(0o755)
    return path


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert measure(tmp_path, "--engines", "ring,magic") == 2
    assert "found 'magic'" in capsys.readouterr().err


def stages_of_runs(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """What runs are asked for from now on; none runs."""
    found: list[Stage] = []

    def run_of(stages: list[Stage], *_: Any) -> SimpleNamespace:
        found.extend(stages)
        return SimpleNamespace(run=lambda: None)

    monkeypatch.setattr("bench.commands.Run", run_of)
    return found


def test_only_the_chosen_beds_are_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert measure(tmp_path, "--beds", "wan-bf16") == 2
    assert "beds need some of flux-bf16-" in capsys.readouterr().err
    found = stages_of_runs(monkeypatch)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert measure(tmp_path, "--plan", "full", "--beds", "wan-bf16,hunyuan-bf16") == 0
    assert [stage.bed.key for stage in found] == ["wan-bf16", "hunyuan-bf16"]
    (ran,) = Results.load(tmp_path / "results.json").value["commands"]
    assert ran["command"].startswith("python -m bench run --plan full ")
    assert ran["command"].endswith("--beds wan-bf16,hunyuan-bf16")


def test_the_command_tells_how_torch_allocates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages_of_runs(monkeypatch)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert measure(tmp_path, "--plan", "full", "--beds", "wan-bf16") == 0
    (ran,) = Results.load(tmp_path / "results.json").value["commands"]
    assert ran["command"].startswith("PYTORCH_ALLOC_CONF=expandable_segments:True python -m bench")


def test_only_the_chosen_budgets_and_ratios_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = stages_of_runs(monkeypatch)
    words = ("--shares", "0.25,0.15", "--ratios", "4")
    assert measure(tmp_path, "--plan", "core", *words) == 0
    assert {stage.ratios for stage in found} == {(4.0,)}
    assert [(stage.shares, stage.only_ours) for stage in found] == [((0.25,), ()), ((), (0.15,))]
    assert found[0].engines == PLANS["core"][0].engines
    (ran,) = Results.load(tmp_path / "results.json").value["commands"]
    assert ran["command"].endswith("--shares 0.25,0.15 --ratios 4")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--shares", "0.3"), "shares need some of 0.15, 0.25, 0.5, 0.75, 1.05, found '0.3'"),
        (("--ratios", "half"), "ratios need some of 0.25, 1, 4, found 'half'"),
        (("--shares", "1.05", "--ratios", "0.25"), "no stage of the plan has both"),
    ],
)
def test_budgets_and_ratios_that_a_plan_lacks_are_refused(
    words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert measure(tmp_path, "--plan", "core", *words) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


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

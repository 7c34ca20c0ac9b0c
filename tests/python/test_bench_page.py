"""docs/benchmarks.md: what is measured stands on it, as the published one is made of docs/runs.

Goal: the page shows each cell, what was lost and what was not measured, and all runs at a glance.
Method: good results, made by hand, with one change each; and the published files.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import bench_path
import pytest
from bench_results import MIB, beside, cell, found_in, good, ours, over_with_gaps

from bench import glance, page
from bench.results import Results

if TYPE_CHECKING:
    from pathlib import Path


def page_of(results: Results, folder: Path) -> str:
    target = folder / "benchmarks.md"
    page.write([results], target)
    return target.read_text()


def test_gaps_of_torchs_allocator_are_told_and_count_for_nothing(tmp_path: Path) -> None:
    results = good()
    over_with_gaps(results, 512 * MIB, 300 * MIB)
    assert found_in(results) == []
    (row,) = re.findall(r"\| dgls \| dgls_torch .*", page_of(results, tmp_path))
    assert "| 512 MiB | 300 MiB |" in row


def test_the_page_shows_everything(tmp_path: Path) -> None:
    results = good()
    results.value["cells"][4]["pass_s"] = 1.5
    text = page_of(results, tmp_path)
    for wanted in (
        "a GPU; a CPU, 16 cores",
        "`python -m bench run` (2026-01-01)",
        "| 25 % | 512 | 3.00 | 1500.0 | 1550.0 lost | 97.7 | 96.8 | 100.0 | 65.2 | 60.0 | failed |",
        "| 25 % | 16384 | 0.38 | 4000.0 | 4020.0 | 100.0 | 99.5 |",
        "- flux-bf16, budget 25 %, point 512: 1.033 of the time of ring, may be 1.01",
        "| accelerate cpu_offload | 1 | needs accelerate==1.15.0, found none |",
        "![efficiency over copy/compute](benchmarks.svg)",
    ):
        assert wanted in text, wanted
    # the line of the account of the engine that was faster needs its account
    assert "ring" in text
    assert "<svg" in (tmp_path / "benchmarks.svg").read_text()


def test_the_page_names_those_of_earlier_runs(tmp_path: Path) -> None:
    assert "Earlier runs" not in page_of(good(), tmp_path)
    (tmp_path / "benchmarks-2026-01-02.md").touch()
    assert "[benchmarks-2026-01-02.md](benchmarks-2026-01-02.md)" in page_of(good(), tmp_path)


def test_the_published_page_is_made_of_the_published_results(tmp_path: Path) -> None:
    docs = bench_path.ROOT / "docs"
    for earlier in docs.glob("benchmarks-*.md"):
        (tmp_path / earlier.name).touch()
    target = tmp_path / "benchmarks.md"
    page.write([Results.load(path) for path in sorted((docs / "runs").glob("*.json"))], target)
    published = (docs / "benchmarks.md").read_text(encoding="utf-8")
    assert target.read_text(encoding="utf-8") == published, (
        "run python -m bench page docs/runs/*.json"
    )


def test_the_page_shows_what_learning_took(tmp_path: Path) -> None:
    results = good()
    assert "### The first passes" not in page_of(results, tmp_path)
    results.value["cells"][0] |= {"settling": 40, "settling_pass_s": 1.6}
    text = page_of(results, tmp_path)
    assert "| flux-bf16 | 25 % | 512 | 40 | 1600.0 | 93.8 | 96.8 |" in text


def test_the_page_shows_the_limits_beside_cells(tmp_path: Path) -> None:
    results = good()
    cells = results.value["cells"]
    beside(cells[0], 0.5, 8.0)
    beside(cells[4], 0.5, 9.5)
    cells[5]["beside_failed"] = "the reference ended with status 7"
    text = page_of(results, tmp_path)
    for wanted in (
        "link 10.7 GB/s, beside the cells 8.6 to 10.2 GB/s",
        "| 25 % | 512 | 3.75 | 1875.0 | 1550.0 |",
        "No limit was measured beside 1 cells: the reference ended with status 7.",
        "takes turns with the engine's",
    ):
        assert wanted in text, wanted


def test_the_curve_is_the_median_of_neighbours() -> None:
    assert page.curve(good(), "dgls") == [
        (0.375, pytest.approx(4.0 / 4.02)),
        (1.0, pytest.approx(1.5 / 1.58)),
        (3.0, pytest.approx(1.5 / 1.55)),
    ]


def row_of(results: Results) -> dict[str, str]:
    """The only row of the table of all runs, by column."""
    head, row = glance.rows([results])
    return dict(zip(head, row, strict=True))


def test_all_runs_are_in_one_table(tmp_path: Path) -> None:
    results = good()
    found = row_of(results)
    assert found["run"] == "[1](#run-1)"
    assert (found["model"], found["GPU"]) == ("FLUX.1 bf16", "a GPU")
    assert (found["link GB/s"], found["mean"]) == ("", "")
    assert found["cells"] == "4 of 4"
    assert found["efficiency"] == "94.9 to 99.5"  # 1.5 of 1.58 s, 4 of 4.02; not where all fits
    assert (found["peers"], found["missed"]) == ("3", "0")
    assert found["times faster"] == "1.10 to 1.14"  # the ring at 512 and 4096
    both = glance.rows([results, results])
    assert both[2] == ("[2](#run-2)", *both[1][1:])
    assert "| [1](#run-1) | FLUX.1 bf16 | a GPU |" in page_of(results, tmp_path)


def test_a_glance_tells_what_was_lost_and_by_how_much() -> None:
    results = good()
    cells = results.value["cells"]
    cells[0] |= {"pass_s": 1.6, "optimum_s": 1.55}
    assert row_of(results)["under best"] == "3.0"  # 1.5 s of 1.55 and of 1.6
    assert row_of(results)["missed"] == "1"
    cells[4]["pass_s"] = 1.5  # the ring
    assert row_of(results)["times faster"].startswith("0.94 to ")
    for change in ({"exact": False}, {"capped": False}, {"status": "failed"}):
        good_cell = dict(cells[4])
        cells[4] |= change
        assert row_of(results)["times faster"] == "1.14 to 1.44"  # comfy-aimdo is next at 512
        cells[4] = good_cell
    cells.append(ours("512", 1.0, share=0.5) | {"status": "skipped"})
    assert row_of(results)["cells"] == "4 of 5"


def test_an_unsteady_link_shows_at_a_glance() -> None:
    results = good()
    for number, rates in enumerate(([10e9, 9.8e9], [10e9, 4.2e9])):
        one = results.value["cells"][number]
        beside(one, 0.5)
        rounds = [{"link_bytes_per_s": rate, "passes_s": [0.5]} for rate in rates]
        one["beside_limit"]["rounds"] = rounds
    found = row_of(results)
    assert (found["link GB/s"], found["mean"]) == ("4.2 to 10.0", "7.4")  # as long for each byte


def test_a_run_without_peers_says_nothing_of_them() -> None:
    results = good()
    results.value["cells"] = [c for c in results.value["cells"] if c["engine"] == "dgls"]
    found = row_of(results)
    assert (found["peers"], found["times faster"]) == ("", "")
    results.value["cells"] = [cell("ring", "512", 1.7)]
    found = row_of(results)
    assert (found["cells"], found["efficiency"], found["under best"]) == ("0 of 0", "", "")
    assert found["peers"] == "1"

"""All runs in one table: how steady the link was, how near the limit, how far from the peers."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from bench.compare import load_floors, misses, rivals
from bench.engines import PEERS
from bench.results import turns_beside

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bench.compare import Cells
    from bench.results import Results

HEAD = (
    "run",
    "model",
    "GPU",
    "link GB/s",
    "mean",
    "cells",
    "efficiency",
    "under best",
    "peers",
    "times faster",
    "missed",
)

TEXT = """`link`: the least and the greatest rate of single turns, each a copy of 1 GiB; one far
below the other is of an unsteady link. `mean`: all bytes of the turns over all of their seconds;
limits are of the median turn, which knows little of a link's stalls. `cells`: of dgls_torch, and
how many were to be run. `efficiency`: of those that stream, as `under best`: the most that one is
below what no policy beats, in points. `peers`: other engines that ran; `times faster`: than the
fastest of them that kept to the budget and gave the right output, from the worst place to the best.
`missed`: floors (bench/floors.json) that its cells miss, each named below.
"""


def _range(values: Iterable[float], form: str) -> str:
    found = sorted(values)
    if not found:
        return ""
    low, high = (format(value, form) for value in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"


def _rates(places: list[Cells]) -> list[float]:
    """GB/s of each turn beside the cells."""
    turns = (turn for cells in places for cell in cells.values() for turn in turns_beside(cell))
    return [turn["link_bytes_per_s"] / 1e9 for turn in turns]


def _faster(results: Results, cells: Cells) -> float | None:
    """How many times faster dgls_torch is than the fastest peer at a place."""
    peers = (1 / results.times(cells["dgls"], cell) for _, cell in rivals(cells))
    return min(peers, default=None)


def _row(results: Results, bed: str, places: list[Cells]) -> tuple[str, ...]:
    ours = [cells for cells in places if "dgls" in cells]
    ran = [cells for cells in ours if cells["dgls"]["status"] == "ok"]
    rates = _rates(places)
    found: list[float] = []
    under: list[float] = []
    for cells in ran:
        limit, efficiency = results.limit(cells["dgls"]), results.efficiency(cells["dgls"])
        if limit.copy_s > 0 and efficiency is not None:
            found.append(100 * efficiency)
            under.append(100 * (limit.seconds / results.optimum_s(cells) - efficiency))
    engines = {name for cells in places for name, cell in cells.items() if cell["status"] == "ok"}
    faster = [times for cells in ran if (times := _faster(results, cells)) is not None]
    return (
        results.value["beds"][bed]["title"],
        results.value["machine"].get("gpu", "none").removeprefix("NVIDIA "),
        _range(rates, ".1f"),
        f"{statistics.harmonic_mean(rates):.1f}" if rates else "",
        f"{len(ran)} of {len(ours)}",
        _range(found, ".1f"),
        f"{max(under):.1f}" if under else "",
        str(len(engines & {*PEERS}) or ""),
        _range(faster, ".2f"),
    )


def rows(loaded: list[Results]) -> list[tuple[str, ...]]:
    """The table's head, and a row for each model of each run."""
    found: list[tuple[str, ...]] = [HEAD]
    floors = load_floors()
    for number, results in enumerate(loaded, 1):
        beds: dict[str, list[Cells]] = {}
        for (bed, _, _), cells in results.by_place():
            beds.setdefault(bed, []).append(cells)
        missed = misses(results, floors)
        for bed, places in sorted(beds.items()):
            count = sum(miss.startswith(f"{bed}, ") for miss in missed)
            link = f"[{number}](#run-{number})"
            found.append((link, *_row(results, bed, places), str(count)))
    return found

"""Results of bench/, made by hand: good ones, and what may be changed about them."""

from __future__ import annotations

import json
from typing import Any

import bench_path

bench_path.put_on_path()

from bench.compare import misses  # noqa: E402
from bench.results import Results  # noqa: E402

FLOORS_PATH = bench_path.ROOT / "bench" / "floors.json"
FLOORS = json.loads(FLOORS_PATH.read_text())
MIB, GIB = 1 << 20, 1 << 30
BED = "flux-bf16"


def cell(engine: str, point: str, pass_s: float, share: float = 0.25) -> dict[str, Any]:
    return {
        "bed": BED,
        "engine": engine,
        "point": point,
        "budget_bytes": int(share * 20 * GIB),
        "status": "ok",
        "exact": True,
        "capped": True,
        "pass_s": pass_s,
        "passes_s": [pass_s - 0.01, pass_s, pass_s + 0.02],
        "host_cpu_s": 0.01,
        "base_bytes": GIB,
        "peak_bytes": int(min(share, 1) * 20 * GIB) + 3 * GIB,
        "allocations": {"allocation.all.allocated": 100.0},
    }


def ours(point: str, pass_s: float, share: float = 0.25) -> dict[str, Any]:
    value = cell("dgls", point, pass_s, share)
    parts = {"compute": pass_s, "exposed_copy": 0.0, "copy_inline": 0.0, "launch": 0.0}
    value["account"] = parts | {"device": 0.0, "total": pass_s, "off": 0.001}
    value["hooks"] = {"call_s": 8e-6}
    value["driver_calls"] = {"passes": 3, "synchronising": 0, "allocating": 0, "control": 1}
    value["beside"] = None
    if share > 1:
        value["beside"] = {"pass_s": pass_s, "resident_s": pass_s / 1.002}
    return value


def good() -> Results:
    """20 GiB over a link of 10 GiB/s: 1.5 s at a quarter; compute of 0.5, 1.5 and 4 s."""
    point = {"base_bytes": GIB, "peak_bytes": 23 * GIB}
    point["allocations"] = {"allocation.all.allocated": 100.0}
    points = {
        key: point | {"point": key, "compute_s": seconds}
        for key, seconds in (("512", 0.5), ("4096", 1.5), ("16384", 4.0))
    }
    bed = {
        "title": "FLUX.1 bf16",
        "weight_bytes": 20 * GIB,
        "blocks": 57,
        "link_bytes_per_s": 10.0 * GIB,
        "points": points,
        "ratios": {"3": "512", "1": "4096", "0.375": "16384"},
    }
    cells = [
        ours("512", 1.55),
        ours("4096", 1.58),
        ours("16384", 4.02),
        ours("512", 0.501, share=1.05),
        *(cell("ring", key, seconds) for key, seconds in (("512", 1.7), ("4096", 1.8))),
        cell("aimdo-linear", "512", 2.3),
        cell("diffusers-block", "512", 2.5),
        cell("accelerate", "512", 9.0)
        | {"status": "failed", "reason": "needs accelerate==1.15.0, found none"},
    ]
    machine = {"gpu": "a GPU", "cpu": "a CPU", "cores": 16, "system": "Linux", "packages": {}}
    value = {"format": 1, "machine": machine, "beds": {BED: bed}, "cells": cells}
    value["commands"] = [{"command": "python -m bench run", "date": "2026-01-01"}]
    return Results(value)


def found_in(results: Results, **floors: Any) -> list[str]:
    return misses(results, FLOORS | floors)


def first(results: Results) -> dict[str, Any]:
    found: dict[str, Any] = results.value["cells"][0]
    return found


def over_with_gaps(results: Results, over_bytes: int, gaps_bytes: int) -> None:
    """The first cell so much over its budget, and with so much more of gaps than the resident."""
    one = first(results)
    one.update(peak_bytes=one["peak_bytes"] + over_bytes, gaps_bytes=GIB + gaps_bytes)
    results.value["beds"][BED]["points"]["512"]["gaps_bytes"] = GIB


def beside(cell: dict[str, Any], compute_s: float, gib_per_s: float = 10.0) -> None:
    cell["beside_limit"] = {"compute_s": compute_s, "link_bytes_per_s": gib_per_s * GIB}

"""A worker's job on the CPU: the resident model at two small points, with short rounds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import bench_path
import torch

bench_path.put_on_path()

from bench.cells import Bed, Point  # noqa: E402
from bench.measure import Effort  # noqa: E402
from bench.stacks import Workload  # noqa: E402
from bench.worker import Job  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

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

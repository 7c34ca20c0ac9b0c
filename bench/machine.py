"""What a measurement ran on: device, driver, host and versions."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.engines import ENGINES


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe(device_type: str) -> dict[str, Any]:
    """The facts as a JSON object."""
    import torch

    import dgls_torch

    names = {pin.partition("==")[0] for engine in ENGINES.values() for pin in engine.packages}
    facts: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "dgls_torch": dgls_torch.__version__,
        "packages": {name: _version(name) for name in sorted(names)},
    }
    if device_type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory
        facts["driver"] = torch.ops.dgls.driver_version()
    return facts

"""Decides what a bug report tells of a stream and its machine, and what it must not tell.

Whoever attaches it to a public issue shows it to everyone: no paths, since they hold names of
people and projects; of a file its last part; of the environment only what is ours.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
from typing import TYPE_CHECKING, Any

import torch

from dgls_torch._extension import __version__
from dgls_torch.memory import host_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from dgls_torch.report import Report, Use

FORMAT = 1
# What stands for a folder: everything up to the last separator of something that looks like a path.
# Rather too much than too little: a folder's name may hold blanks and quotes.
_FOLDERS = re.compile(r"(?:[A-Za-z]:|~|\.{1,2})?[\\/](?:[^\\/\n\"<>|:*?]+[\\/])*|\S+[\\/]")


def bundle(report: Report) -> dict[str, Any]:
    """Everything as plain values; docs/bundle.md names the fields."""
    counted = [f for f in dataclasses.fields(report) if f.type == "int"]
    measured = ("pass_s", "stall_s", "bound_s", "efficiency", "limit", "h2d_bytes_per_s")
    found = {
        "format": FORMAT,
        "versions": {
            "dgls_torch": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "driver": _asked(torch.ops.dgls.driver_version),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "machine": {
            "processors": os.cpu_count(),
            "gpu": _asked(_gpu),
            "memory": _asked(lambda: dataclasses.asdict(host_memory())),
        },
        "config": {f.name: _told(f.name, report) for f in dataclasses.fields(report.config)},
        "plan": dataclasses.asdict(report.plan),
        "counters": {field.name: getattr(report, field.name) for field in counted},
        "measured": {name: getattr(report, name) for name in measured},
        "trace": _trace(report.timeline),
        "errors": list(report.last_errors),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("DGLS_")},
    }
    return _clean(found)  # type: ignore[no-any-return]


def write(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes the bundle as JSON.

    Raises:
        OSError: The file cannot be written.
    """
    text = json.dumps(bundle(report), indent=1)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def base_name(text: str) -> str:
    """The text with the last part of every path alone."""
    return _FOLDERS.sub("", text)


def _clean(value: Any) -> Any:
    """The same without paths, whatever they came in with."""
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return base_name(str(value))


def _told(name: str, report: Report) -> Any:
    value = getattr(report.config, name)
    if name == "source" and value != "tensors":
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    if name == "blocks" and value is not None:
        return [block if isinstance(block, str) else type(block).__name__ for block in value]
    return value


def _trace(timeline: tuple[Use, ...]) -> list[dict[str, Any]]:
    """Means of each block over the timed passes but the first, which fills the residents."""
    by_block: dict[str, list[Use]] = {}
    for use in timeline:
        if use.pass_number > 0:
            by_block.setdefault(use.block, []).append(use)
    means = []
    for block, uses in by_block.items():
        copied = [use.copy_end_s - use.copy_start_s for use in uses if use.stretch_bytes]
        means.append(
            {
                "block": block,
                "uses": len(uses),
                "bytes": sum(use.bytes for use in uses) / len(uses),
                "compute_s": sum(use.end_s - use.start_s for use in uses) / len(uses),
                "stall_s": sum(use.stall_s for use in uses) / len(uses),
                "copy_s": sum(copied) / len(copied) if copied else None,
            }
        )
    return means


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return {"name": torch.cuda.get_device_name(), "free_bytes": free, "total_bytes": total}


def _asked(ask: Callable[[], Any]) -> Any:
    """What is found out, or why it is not: a bundle is written where things are broken."""
    try:
        return ask()
    except Exception as error:
        return f"unknown: {error}"

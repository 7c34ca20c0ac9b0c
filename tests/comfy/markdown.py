"""Writes the results of a check as the page docs/comfyui-check.md."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

HEAD = """# The nodes in a real ComfyUI

`make comfy-check COMFYUI_DIR=... COMFYUI_PYTHON=...` wrote this page. It fetched no model: tiny
files with seeded weights stand for the architectures. Each latent of a streamed model was compared,
bit for bit, with that of a server that never had the pack: plain for the budgets (shares of all
weights, or the least that works), with LoRA maths at the same place for the LoRAs.

"""
STORIES = """
## Scenarios

One server, one after the other, on the same model:

"""


def as_markdown(results: dict[str, Any], comfyui: Path, python: str) -> str:
    """The page: versions, one table for each way of storing weights, the scenarios."""
    version = re.search(r'"([^"]+)"', (comfyui / "comfyui_version.py").read_text())
    code = "import torch, sys; print(torch.__version__, sys.version.split()[0])"
    torch, number = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    lines = [
        f"ComfyUI {version[1] if version else '?'}, torch {torch}, Python {number}, "
        f"{platform.system()}, CPU, {datetime.date.today()}.",
    ]
    tables: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for where, found in results.items():
        if where != "scenarios":
            way, _, name = where.rpartition(": ")
            tables[way][name] = found
    for way, rows in tables.items():
        columns = list(dict.fromkeys(column for found in rows.values() for column in found))
        lines += ["", f"## Weights {way}", "", "| model | " + " | ".join(columns) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for name, found in rows.items():
            cells = [found.get(column, "").splitlines()[0:1] for column in columns]
            lines.append(f"| {name} | " + " | ".join("".join(cell) for cell in cells) + " |")
    text = HEAD + "\n".join(lines) + "\n"
    if "scenarios" in results:
        rows = [f"| {story} | {found.strip()} |" for story, found in results["scenarios"].items()]
        text += (
            STORIES + "\n".join(["| scenario | as without the pack |", "|---|---|", *rows]) + "\n"
        )
    return text

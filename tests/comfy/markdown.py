"""Writes the results of a check as the page docs/comfyui-check.md, or docs/comfyui-gpu.md."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from collections import defaultdict
from pathlib import Path

from steps import TOLD

Tables = dict[str, dict[str, dict[str, str]]]
ROOT = Path(__file__).resolve().parents[2]
HEAD = """# The nodes in a real ComfyUI

`make comfy-check COMFYUI_DIR=... COMFYUI_PYTHON=...` wrote this page, as it is, in one go. It
fetched no model: tiny files with seeded weights stand for the architectures. Each latent of a
streamed model was compared, bit for bit, with that of a server that never had the pack: plain for
the budgets (shares of all weights, or the least that works), with LoRA maths at the same place for
the LoRAs. All of it ran on a CPU; [the same on a GPU](comfyui-gpu.md).

"""
GPU_HEAD = """# The nodes in a real ComfyUI, on a GPU

`tests/comfy/gpu.py COMFYUI_DIR --work DIR --report FILE.md` wrote this page. It fetched no model:
tiny files with seeded weights stand for the architectures. Each latent of a streamed model was
compared, bit for bit, with that of a server that never had the pack, with ComfyUI's dynamic VRAM
(what it does by itself on NVIDIA cards) and without; guidance is off, as ComfyUI decides by free
memory whether it batches both halves. "left out": ComfyUI itself cannot sample that file so.

"""
ABOUT = {
    "contract": "What the nodes use of ComfyUI is there, and the tests of the fake hold with it.",
    "networks": (
        "Every other network class of comfy/ldm by itself: two forwards each at 25, 50 and 75 % of "
        "the weights, by layers at 25, and plain afterwards; each of its containers ran streamed "
        "blocks. MiniMaxMusic3DiT is left out, as its dimensions are fixed at 7 GB; "
        "WanAnimate2Model is not streamed, as its blocks are run through other methods than "
        "forward."
    ),
    "scenarios": "One server, one after the other, on the same model.",
    "scenarios, dynamic VRAM": "One server, one after the other; on FLUX, as there the tiny WAN "
    "in bf16 is left out.",
    "scenarios, no dynamic VRAM": "One server, one after the other, on WAN.",
    "flags": "Where ComfyUI keeps models on the GPU they are left to it, and the report says so.",
    "browser": "Headless Chromium in front of a running ComfyUI.",
}


def as_markdown(
    results: dict[str, dict[str, str]],
    comfyui: Path,
    python: str,
    commit: str,
    took: float,
    gpu: str | None = None,
) -> str:
    """The page: versions, one table for each way of storing weights, then the other parts.

    Args:
        results: What was checked, by part or by way, server and model.
        comfyui: The checkout.
        python: The Python that ComfyUI ran with.
        commit: What was checked; see `state_of_the_code`.
        took: Minutes.
        gpu: The card, or nothing for a CPU.
    """
    lines = [_facts(results, comfyui, python, commit, took, gpu or "CPU")]
    tables: Tables = defaultdict(dict)
    for where, found in results.items():
        if where not in ABOUT:
            way, _, name = where.rpartition(": ")
            tables[way][name] = found
    for way, rows in tables.items():
        lines += ["", f"## {way}", "", *_table(rows)]
    for part, about in ABOUT.items():
        if part in results:
            rows = [f"| {what} | {found.strip()} |" for what, found in results[part].items()]
            lines += [
                "",
                f"## {part[0].upper()}{part[1:]}",
                "",
                about,
                "",
                "| what | held |",
                "|---|---|",
            ]
            lines += rows
    return (GPU_HEAD if gpu else HEAD) + "\n".join(lines) + "\n"


def _table(rows: dict[str, dict[str, str]]) -> list[str]:
    columns = list(dict.fromkeys(column for found in rows.values() for column in found))
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, found in rows.items():
        cells = ["".join(found.get(column, "").splitlines()[0:1]) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _facts(
    results: dict[str, dict[str, str]],
    comfyui: Path,
    python: str,
    commit: str,
    took: float,
    device: str,
) -> str:
    version = re.search(r'"([^"]+)"', (comfyui / "comfyui_version.py").read_text())
    code = "import torch, sys; print(torch.__version__, sys.version.split()[0])"
    torch, number = said(python, "-c", code).split()
    checks = [v for found in results.values() for k, v in found.items() if k not in TOLD]
    held = sum(value == "yes" for value in checks)
    return (
        f"ComfyUI {version[1] if version else '?'}, torch {torch}, Python {number}, "
        f"{platform.system()}, {device}, {datetime.date.today()}, commit {commit}. {held} of "
        f"{len(checks)} checks held, in {took:.0f} minutes."
    )


def state_of_the_code() -> str:
    """The commit, and whether files differ from it; unknown in a copy without history."""
    if not (ROOT / ".git").exists():
        return "unknown"
    commit = said("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD").strip()
    changed = said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no").strip()
    return commit + (" with changes" if changed else "")


def said(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

"""Runs the whole check against a real ComfyUI: ``make comfy-check COMFYUI_DIR=...``.

Every tiny model, each way of storing weights, and the scenarios, over HTTP in fresh servers.
Writes what came out as Markdown, for docs/comfyui-check.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from exactness import Exactness, golden
from scenarios import run_scenarios
from server import EXACT, Server

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# name: arguments of the server, how UNETLoader stores weights, bytes of a number, all checks or few
WAYS: dict[str, tuple[tuple[str, ...], str, float, bool]] = {
    "as in the file": ((), "default", 4, True),
    "bf16, cast at use": (("--bf16-unet",), "default", 2, True),
    "fp8, cast at use": ((), "fp8_e4m3fn", 1.2, False),
}


def start_server(
    comfyui: Path, python: str, work: Path, *arguments: str, with_pack: bool = True
) -> Server:
    """A server with the test nodes, and with this pack unless told otherwise."""
    packs = {"dgls_test_pack": HERE / "pack"} | ({"dgls": ROOT} if with_pack else {})
    return Server(work, packs, comfyui=comfyui, python=python, arguments=(*EXACT, *arguments))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the Python ComfyUI runs with")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--models", help="names with commas between; all if not given")
    parser.add_argument("--ways", help="of storing weights, with commas between; all if not given")
    parser.add_argument("--rounds", type=int, default=2, help="fresh servers for each way")
    parser.add_argument("--add", action="store_true", help="to the results in --work")
    parser.add_argument("--skip-scenarios", action="store_true")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    comfyui = options.comfyui.resolve()
    models = options.work / "models"
    if not (models / "manifest.json").exists():
        writer = [options.python, str(HERE / "models.py"), str(comfyui), str(models)]
        subprocess.run(writer, check=True)
    entries = json.loads((models / "manifest.json").read_text())
    names = options.models.split(",") if options.models else list(entries)

    def start(*arguments: str, with_pack: bool = True) -> Server:
        return start_server(comfyui, options.python, options.work, *arguments, with_pack=with_pack)

    results_file = options.work / "results.json"
    results: dict[str, Any] = {}
    if options.add and results_file.exists():
        results = json.loads(results_file.read_text())
    for way in options.ways.split("|") if options.ways else WAYS:
        arguments, kind, size, full = WAYS[way]
        with start(*arguments, with_pack=False) as server:
            expected = {name: golden(server, entries[name], kind) for name in names}
        for number in range(options.rounds):
            with start(*arguments) as server:
                for name in names:
                    began = time.monotonic()
                    numbers_bytes = size
                    if name.endswith("_fp8"):
                        numbers_bytes = entries[name]["bytes"] / entries[name]["numbers"]
                    exactness = Exactness(
                        server, entries[name], expected[name], kind, numbers_bytes
                    )
                    found = exactness.run(full=full and number == 0)
                    results[f"{way}, server {number + 1}: {name}"] = found
                    wrong = {k: v for k, v in found.items() if v != "yes"}
                    took = time.monotonic() - began
                    print(f"{way}: {name}: {wrong or 'all exact'} ({took:.0f} s)", flush=True)
    if not options.skip_scenarios:
        with start() as server:
            results["scenarios"] = run_scenarios(server, entries)
    wrong = {
        f"{where}: {what}": value
        for where, found in results.items()
        for what, value in found.items()
        if value != "yes"
    }
    checks = sum(len(found) for found in results.values())
    print(f"{checks} checks, {len(wrong)} wrong", *wrong.items(), sep="\n")
    results_file.write_text(json.dumps(results, indent=1))
    if options.report:
        from markdown import as_markdown

        options.report.write_text(as_markdown(results, comfyui, options.python))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

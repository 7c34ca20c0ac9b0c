"""Runs the whole check against a real ComfyUI: ``make comfy-check COMFYUI_DIR=...``.

The contract, every tiny model in each way of storing weights, every network class by itself, the
scenarios, and a look in a browser; over HTTP in fresh servers. Writes what came out as Markdown,
for docs/comfyui-check.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import steps
from exactness import Exactness, Latents, golden
from markdown import as_markdown, state_of_the_code
from server import EXACT, Server
from ways import WAYS, Way

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Found = dict[str, str]


class Check:
    """One run of the check: where things are, and what was found so far."""

    always: tuple[str, ...]

    def __init__(self, options: argparse.Namespace, more: tuple[str, ...] = ()) -> None:
        self.comfyui, self.python = options.comfyui.resolve(), options.python
        self.work, self.jobs = options.work.resolve(), options.jobs
        self.rounds = options.rounds
        self.device, self.always = "cpu", ()
        self.entries = steps.tiny_models(self.comfyui, self.python, self.work, more)
        self.names = options.models.split(",") if options.models else list(self.entries)
        self.results: dict[str, Found] = {}

    def start(self, *arguments: str, with_pack: bool = True) -> Server:
        """A server with the test nodes, and with this pack unless told otherwise."""
        packs = {"dgls_test_pack": HERE / "pack"} | ({"dgls": ROOT} if with_pack else {})
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
        return Server(
            self.work,
            packs,
            comfyui=self.comfyui,
            python=self.python,
            arguments=(*EXACT[self.device], *self.always, *arguments),
            environment=threads,
        )

    def contract(self) -> Found:
        return steps.contract(self.comfyui, self.python)

    def networks(self) -> Found:
        return steps.networks(self.comfyui, self.python, self.work)

    def models(self, ways: list[Way]) -> None:
        """Every model in every way: first what ComfyUI makes by itself, then with the pack."""
        with ThreadPoolExecutor(self.jobs) as pool:
            expected = dict(zip(ways, pool.map(self.expected, ways), strict=True))
            runs = [(way, n, expected[way]) for way in ways for n in range(way.rounds(self.rounds))]
            for (way, number, _), found in zip(
                runs, pool.map(lambda run: self.round(*run), runs), strict=True
            ):
                for name, checks in found.items():
                    self.results[f"{way.title}, server {number + 1}: {name}"] = checks

    def expected(self, way: Way) -> dict[str, Latents | str]:
        """The latents of each model without the pack; a word where ComfyUI itself has none."""
        with self.start(*way.arguments, with_pack=False) as server:
            made: dict[str, Latents | str] = {}
            for name in way.names(self.names):
                made[name] = golden(server, self.entries[name], way)
            return made

    def round(self, way: Way, number: int, expected: dict[str, Latents | str]) -> dict[str, Found]:
        found: dict[str, Found] = {}
        with self.start(*way.arguments) as server:
            for name in way.names(self.names):
                began, latents, entry = time.monotonic(), expected[name], self.entries[name]
                if isinstance(latents, str):
                    found[name] = {"left out": latents}
                    continue
                check = Exactness(server, entry, latents, way)
                found[name] = check.run(full=way.is_full and number == 0)
                wrong = {k: v for k, v in found[name].items() if v != "yes"}
                took = time.monotonic() - began
                print(f"{way.title}: {name}: {wrong or 'all exact'} ({took:.0f} s)", flush=True)
        return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the Python ComfyUI runs with")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--models", help="names with commas between; all if not given")
    parser.add_argument("--ways", help="numbers of ways of storing weights; all if not given")
    parser.add_argument("--rounds", type=int, default=2, help="fresh servers for each way")
    parser.add_argument("--jobs", type=int, default=2, help="servers side by side")
    parser.add_argument("--only", help=f"of {', '.join(steps.PARTS)}, with commas between")
    parser.add_argument("--stories", help="names of scenarios; all if not given")
    parser.add_argument("--report", type=Path)
    return parser.parse_args()


def main() -> int:
    options, began, commit = parsed(), time.monotonic(), state_of_the_code()
    check = Check(options)
    parts = options.only.split(",") if options.only else list(steps.PARTS)
    with ThreadPoolExecutor(1) as aside:  # what needs no server, beside the servers
        without = [part for part in ("contract", "networks") if part in parts]
        pending = [aside.submit(getattr(check, part)) for part in without]
        if "models" in parts:
            ways = [WAYS[int(n)] for n in options.ways.split(",")] if options.ways else WAYS
            check.models(ways)
        check.results |= {p: f.result() for p, f in zip(without, pending, strict=True)}
    if "scenarios" in parts:
        check.results["scenarios"] = steps.scenarios(check, options.stories)
    if "browser" in parts:
        check.results["browser"] = steps.browser(check.comfyui, check.python, check.work)
    wrong = {
        f"{where}: {what}": value
        for where, found in check.results.items()
        for what, value in found.items()
        if value != "yes" and what not in steps.TOLD
    }
    checks = sum(len(found) for found in check.results.values())
    print(f"{checks} checks, {len(wrong)} wrong", *wrong.items(), sep="\n")
    (check.work / "results.json").write_text(json.dumps(check.results, indent=1))
    if options.report:
        minutes = (time.monotonic() - began) / 60
        page = as_markdown(check.results, check.comfyui, check.python, commit, minutes)
        options.report.write_text(page)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

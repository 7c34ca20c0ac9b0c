"""The command line of the measurement."""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare import FLOORS
from bench.engines import ENGINES
from bench.plans import PLANS
from bench.results import Results
from bench.run import Options, Run, default_python

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bench.plans import Stage

_HOST_LINK = 2e8
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""How torch's allocator is told to work, by its name and the older one."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a plan, save after each engine")
    run.add_argument("--plan", default="core", choices=PLANS, help="default: core")
    run.add_argument("--out", type=Path, default=Path(".build/bench.json"))
    run.add_argument("--minutes", type=float, default=7.0, help="no cell begins later; default 7")
    run.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    run.add_argument("--link", type=float, default=_HOST_LINK, help="bytes/s on the CPU")
    run.add_argument("--folder", type=Path, default=Path("/dev/shm/dgls-bench"))
    run.add_argument("--engines", default=None, help="only these, separated by commas")
    run.add_argument("--beds", default=None, help="only these models, as wan-bf16, by commas")
    run.add_argument("--shares", default=None, help="only these budgets, as 0.25, by commas")
    run.add_argument("--ratios", default=None, help="only these of copy over compute, as 4,0.5")
    run.add_argument("--python", default=default_python(), help="with the peers in it")
    run.add_argument("--log", type=Path, default=None, help="what the engines print")
    run.add_argument("--deep", action=argparse.BooleanOptionalAction, default=True)
    run.add_argument("--keep-weights", action="store_true", help="for a run that follows")
    compare = commands.add_parser("compare", help="fail where results miss the stated floors")
    compare.add_argument("results", type=Path, nargs="+")
    compare.add_argument("--floors", type=Path, default=FLOORS)
    page = commands.add_parser("page", help="write the table and the chart of real runs")
    page.add_argument("results", type=Path, nargs="+")
    page.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    show = commands.add_parser("show", help="print the table")
    show.add_argument("results", type=Path, nargs="+")
    return parser


def _command(options: argparse.Namespace) -> str:
    """The command for the page: what changes results, and no paths."""
    allocator = {name: os.environ[name] for name in _ALLOCATOR if name in os.environ}
    words = [f"{name}={value}" for name, value in allocator.items()]
    words += ["python", "-m", "bench", "run", "--plan", options.plan]
    words += ["--minutes", f"{options.minutes:g}", "--device", options.device]
    words += ["--link", f"{options.link:g}"] if options.device == "cpu" else []
    for name in ("engines", "beds", "shares", "ratios"):
        given = getattr(options, name)
        words += [f"--{name}", given] if given else []
    return shlex.join(words)


def _chosen(option: str, text: str | None, known: Iterable[str]) -> tuple[str, ...] | None:
    """The names in an option; ``None`` where it was not given.

    Raises:
        ValueError: One of them is not known.
    """
    if text is None:
        return None
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise ValueError(f"{option} need some of {', '.join(known)}, found {name!r}")
    return names


def _numbers(option: str, text: str | None, known: Iterable[float]) -> list[float] | None:
    """As `_chosen`, of numbers."""
    named = {f"{number:g}": number for number in sorted(known)}
    chosen = _chosen(option, text, named)
    return None if chosen is None else [named[name] for name in chosen]


def _stages(options: argparse.Namespace) -> list[Stage]:
    """What is to be run of the plan.

    Raises:
        ValueError: The plan has nothing of the kind.
    """
    stages = PLANS[options.plan]
    beds = _chosen("beds", options.beds, dict.fromkeys(stage.bed.key for stage in stages))
    stages = [stage for stage in stages if beds is None or stage.bed.key in beds]
    known = {share for stage in stages for share in stage.shares + stage.only_ours}
    shares = _numbers("shares", options.shares, known)
    ratios = _numbers("ratios", options.ratios, {r for stage in stages for r in stage.ratios})
    narrowed = (stage.narrowed(shares, ratios) for stage in stages)
    left = [stage for stage in narrowed if stage is not None]
    if not left:
        raise ValueError("no stage of the plan has both one of the shares and one of the ratios")
    return left


def _run(options: argparse.Namespace) -> int:
    try:
        wanted, stages = _chosen("engines", options.engines, ENGINES), _stages(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    results = Results.load(options.out) if options.out.exists() else Results()
    command = _command(options)
    when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    results.value["commands"].append({"command": command, "date": when})
    settings = Options(
        device=options.device,
        folder=options.folder,
        out=options.out,
        minutes=options.minutes,
        link_bytes_per_s=options.link if options.device == "cpu" else None,
        python=options.python,
        deep=options.deep,
        keep_weights=options.keep_weights,
        engines=wanted,
        log=options.log,
    )
    try:
        Run(stages, settings, results).run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results.save(options.out)
    from bench.table import print_table

    print_table(results)
    return 0


def main(argv: list[str]) -> int:
    """Runs a command; 0 if all is well, 1 where floors are missed, 2 for a wrong option."""
    options = _parser().parse_args(argv)
    if options.command == "run":
        return _run(options)
    loaded = [Results.load(path) for path in options.results]
    if options.command == "compare":
        from bench.compare import compare

        return compare(loaded, options.floors)
    if options.command == "page":
        from bench.page import write

        write(loaded, options.out)
        return 0
    from bench.table import print_table

    for results in loaded:
        print_table(results)
    return 0

"""``python -m dgls_torch bench``: what streaming costs, as ratios measured side by side."""

from __future__ import annotations

import argparse

from dgls_torch.bench import calls, models, planning
from dgls_torch.demo.sample import SIZES
from dgls_torch.units import parse_bytes


def main(argv: list[str]) -> int:
    """Prints tables of block calls, of the planner and of whole models; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m dgls_torch bench", description=__doc__)
    parser.add_argument("--device", default=None, help="cpu, cuda; default: CUDA when there is any")
    parser.add_argument("--rounds", type=int, default=60, help="calls of each kind; default 60")
    parser.add_argument("--busy-us", type=float, default=200.0, help="work of a block; default 200")
    parser.add_argument("--model", default="flux,wan", help="which; 'none' leaves them out")
    parser.add_argument("--size", default=None, choices=SIZES, help="default: tiny, on CUDA medium")
    parser.add_argument("--passes", type=int, default=6, help="timed passes of each; default 6")
    parser.add_argument(
        "--planner", action=argparse.BooleanOptionalAction, default=True, help="default: yes"
    )
    parser.add_argument(
        "--host", action=argparse.BooleanOptionalAction, default=True, help="default: yes"
    )
    parser.add_argument("--file", default="1GiB", help="size of the file that is streamed")
    options = parser.parse_args(argv)
    calls.run(options.device, options.rounds, options.busy_us)
    if options.planner:
        print()
        planning.run()
    if options.host:
        # Not above: it is a program of its own as well.
        from dgls_torch.bench import host

        print()
        host.run(options.device, parse_bytes(options.file, "file", least=1))
    names = [name for name in options.model.split(",") if name != "none"]
    for name in names:
        print()
        models.run(name, options.size, options.device, options.passes)
    return 0

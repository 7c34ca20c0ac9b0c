"""Decides what ``python -m dgls_torch plan`` is asked for and how it answers."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from dgls_torch.blocks import NoBlocksError
from dgls_torch.config import COMPRESS, UNITS, StreamConfig
from dgls_torch.files import SafetensorsSource
from dgls_torch.header import json_object
from dgls_torch.planner.chart import plot
from dgls_torch.planner.encoded import Encoded, inputs_of
from dgls_torch.planner.forecast import Forecast, check_room, forecast
from dgls_torch.planner.form import DoesNotFit, Inputs
from dgls_torch.planner.modules import LATENCY_S
from dgls_torch.planner.sizes import ModelSizes, sizes_of
from dgls_torch.planner.skeleton import checkpoint
from dgls_torch.planner.sweep import Point, curve, stall_free_budget
from dgls_torch.tables import table
from dgls_torch.units import format_bytes, format_seconds, parse_bytes, parse_rate, parse_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

_FILE_MOST = 100_000_000
_BLOCKS_MOST = 100_000
_RANGE = re.compile(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?")
_OF_MODEL = ("tflops", "tokens", "blocks", "unit", "compress")


def main(argv: Sequence[str] | None = None) -> int:
    """Plans a weight file, or bare numbers.

    Returns:
        The exit status: 0, 1 when there is no plan within the budget, 2 for bad input.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except DoesNotFit as error:
        # The planner's own answer is an answer too.
        if arguments.json and error.text:
            print(error.text)
        print(f"dgls_torch plan: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # By its last part: messages go into public reports.
        name = os.path.basename(os.fspath(error.filename or "")) or "a file"
        print(f"dgls_torch plan: {name}: {error.strerror or error}", file=sys.stderr)
    except (ValueError, TypeError, ImportError) as error:
        print(f"dgls_torch plan: {error}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one sentence, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"dgls_torch plan: {message}; see --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dgls_torch plan",
        description="Says what a budget of device memory would give, before anything runs. Reads "
        "only the headers of weight files.",
        epilog="exit status: 0, or 1 when no plan fits the budget, or 2 for bad input",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", nargs="?", help="a .safetensors file, its index, or a folder that holds one")
    add("--vram", help="device memory for all weights, such as 8GiB")
    add("--h2d", help="rate of host-to-device copies, such as 25GB/s (see doctor)")
    add("--tflops", help="what the device computes, in 10^12 operations per second")
    add("--tokens", help="tokens of a pass (default 4096, an image of 1024 x 1024)")
    add("--latency", help="what each copy takes beside its bytes (default 10us)")
    add("--blocks", help="prefixes of the blocks' names, if they are not found: a,b")
    add("--unit", help="what is streamed at a time: block (default) or layer")
    add("--compress", help="off (default), auto or on: bf16 and fp8 weights go encoded")
    add("--resident", help="blocks that stay whole, all others are streamed whole: 0,1,5-9")
    add("--prefetch", help="the most streamed blocks that are copied ahead of the running one")
    add("--verify", action="store_true", help="also solve for the optimum over all policies")
    add("--inputs", metavar="FILE", help="plan these numbers (docs/plan-format.md), no model")
    add("--print-inputs", action="store_true", help="print those numbers of a model, and stop")
    add("--json", action="store_true", help="print the plan with every copy (docs/plan-format.md)")
    yes_or_no = argparse.BooleanOptionalAction
    add("--curve", action=yes_or_no, default=True, help="show the pass against the budget")
    add("--plot", metavar="FILE", help="draw that curve: FILE.svg, .png or .pdf")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    drawing = None if arguments.plot is None else _drawing(arguments.plot)
    outside_bytes = 0
    encoded: Encoded | None = None
    names: list[str] | None = None
    notes: list[str] = []
    if arguments.inputs is not None:
        inputs = _inputs_of_file(arguments)
    else:
        sizes, notes = _sizes_of_file(arguments)
        inputs, outside_bytes, encoded = _inputs_of_model(arguments, sizes)
        names = [block.name for block in sizes.blocks]
    if arguments.print_inputs:
        check_room(inputs, outside_bytes, names)
        print(json.dumps(inputs, indent=1))
        return 0
    found = forecast(inputs, outside_bytes, names, encoded)
    if drawing is not None or not arguments.json:
        free, points = _swept(arguments, found)
    if drawing is not None:
        plot(found, points, free, drawing)
    print(found.solution.text if arguments.json else _shown(arguments, found, notes, free, points))
    return 0


def _inputs_of_file(arguments: argparse.Namespace) -> Inputs:
    """Reads the planner's own form; options for its fields go before what the file says."""
    wrong = [f"--{name}" for name in _OF_MODEL if getattr(arguments, name) is not None]
    if arguments.model is not None or wrong:
        raise ValueError(f"--inputs stands for the model: leave out {', '.join(wrong) or 'MODEL'}")
    with open(arguments.inputs, "rb") as file:
        text = file.read(_FILE_MOST + 1)
    name = os.path.basename(arguments.inputs)
    if len(text) > _FILE_MOST:
        raise ValueError(f"{name} needs at most {_FILE_MOST} bytes, found more")
    inputs = json_object(text, name)
    if arguments.vram is not None:
        inputs["budget_bytes"] = parse_bytes(arguments.vram, "--vram")
    if arguments.h2d is not None:
        inputs["h2d_bytes_per_s"] = parse_rate(arguments.h2d, "--h2d")
    if arguments.latency is not None:
        inputs["copy_latency_s"] = parse_seconds(arguments.latency, "--latency")
    return inputs | _options(arguments)


def _sizes_of_file(arguments: argparse.Namespace) -> tuple[ModelSizes, list[str]]:
    if arguments.model is None:
        raise ValueError("a MODEL.safetensors is needed, or --inputs FILE.json; see --help")
    source = SafetensorsSource(arguments.model)
    unit = _word(arguments.unit, "--unit", UNITS)
    model, others = checkpoint(source, layers=unit == "layer")
    notes = []
    if others:
        notes.append(
            f"{source.path.name} also holds {format_bytes(others)} of other models, such as text "
            "encoders, which are not planned for"
        )
    blocks = None if arguments.blocks is None else arguments.blocks.split(",")
    config = StreamConfig(blocks=blocks, unit=unit, device="cpu")
    name = source.path.name
    try:
        return sizes_of(model, config), notes
    except NoBlocksError as error:
        raise ValueError(
            f"{name} holds no repeated blocks: no names such as blocks.0.* and blocks.1.* in it; "
            "give the prefixes of its blocks with --blocks"
        ) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _inputs_of_model(
    arguments: argparse.Namespace, sizes: ModelSizes
) -> tuple[Inputs, int, Encoded | None]:
    """The numbers to plan, the bytes outside of blocks, and what goes encoded."""
    for name, example in (("vram", "8GiB"), ("h2d", "25GB/s")):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is needed, such as --{name} {example}")
    vram_bytes = parse_bytes(arguments.vram, "--vram")
    rate = parse_rate(arguments.h2d, "--h2d")
    latency = arguments.latency
    latency_s = LATENCY_S if latency is None else parse_seconds(latency, "--latency")
    seconds = [0.0] * len(sizes.blocks)
    if arguments.tflops is not None:
        tokens = 4096 if arguments.tokens is None else _count(arguments.tokens, "--tokens", 1)
        seconds = sizes.compute_s(tokens, _tflops(arguments.tflops))
    elif arguments.tokens is not None:
        raise ValueError("--tokens needs --tflops: without it no compute time is known")
    options = _options(arguments)
    compress = _word(arguments.compress, "--compress", COMPRESS)
    return inputs_of(sizes, vram_bytes, seconds, rate, latency_s, compress, **options)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if arguments.resident is not None:
        options["resident"] = _indices(arguments.resident, "--resident")
    if arguments.prefetch is not None:
        options["prefetch"] = _count(arguments.prefetch, "--prefetch", 0)
    if arguments.verify:
        options["verify"] = True
    return options


def _swept(arguments: argparse.Namespace, found: Forecast) -> tuple[int | None, list[Point]]:
    least = found.least_vram_bytes - found.least_outside_bytes
    wanted = arguments.curve or arguments.plot is not None
    points = curve(found.inputs, least) if wanted else []
    asked = Point(found.inputs["budget_bytes"], found.solution)
    free = stall_free_budget(found.inputs, least, [asked, *points])
    return None if free is None else free + found.outside_bytes, points


def _shown(
    arguments: argparse.Namespace,
    found: Forecast,
    notes: list[str],
    free: int | None,
    points: list[Point],
) -> str:
    lines = [*notes, str(found)]
    if free is not None:
        lines.append(f"  no stall from {format_bytes(free)} on")
    if arguments.curve:
        rows = [("vram", "streamed", "pass", "bound")]
        for point in points:
            plan = point.solution
            budget = format_bytes(found.outside_bytes + point.budget_bytes)
            times = (format_seconds(plan.period_s), format_seconds(plan.lower_bound_s))
            rows.append((budget, format_bytes(sum(plan.streamed_bytes)), *times))
        lines += ["the pass against the budget", *table(rows)]
    return "\n".join(lines)


def _word(text: str | None, what: str, words: tuple[str, ...]) -> str:
    """One of the words; the first if there is none."""
    if text is not None and text not in words:
        raise ValueError(f"{what} needs {' or '.join(words)}, found {text!r}")
    return text or words[0]


def _tflops(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"--tflops needs a finite number above 0, found {text!r}")
    return number


def _count(text: str, what: str, least: int) -> int:
    match = re.fullmatch(r"\s*([0-9]{1,12})\s*", text)
    if match is None or int(match[1]) < least:
        raise ValueError(f"{what} needs a whole number of at least {least}, found {text!r}")
    return int(match[1])


def _indices(text: str, what: str) -> list[int]:
    """Reads ``0,1,5-9``; no text is no block."""
    found: list[int] = []
    for part in text.split(",") if text.strip() else []:
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _BLOCKS_MOST:
            raise ValueError(f"{what} needs numbers of blocks such as 0,1,5-9, found {text!r}")
        found += range(first, last + 1)
    return sorted(set(found))


def _drawing(path: str) -> str:
    if not path.lower().endswith((".svg", ".png", ".pdf")):
        raise ValueError(f"--plot needs a name that ends in .svg, .png or .pdf, found {path!r}")
    return path

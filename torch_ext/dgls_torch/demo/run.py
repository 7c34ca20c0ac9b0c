"""Runs the demo: each model once fully resident and once streamed, and compares the outputs."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import dgls_torch

from ..memory import free_vram
from ..units import format_bytes, format_seconds
from .options import PROGRAM, BadOption, Options, parse_options
from .sample import Case, find_case
from .watch import Bar, Watch, make_bar, settle
from .weights import file_bytes, write_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_PEAK_HEADS = ("resident peak", "streamed peak")
_SAME = "outputs identical to the fully resident model:"


class DemoError(Exception):
    """The demo cannot go on; the message is the sentence to show."""

    def __init__(self, message: str, status: int = 1) -> None:
        """Takes the sentence and the exit status that goes with it."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Run:
    """One sampling loop, measured."""

    latent: Tensor
    step_s: float
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one model showed."""

    case: Case
    weight_bytes: int
    budget: int | str
    resident: Run | None
    streamed: Run
    same: bool | None
    """None where the resident model did not fit, so that nothing could be compared."""


def main(argv: list[str]) -> int:
    """Runs the demo with the given command line.

    Returns:
        The exit status: 0 if all outputs compared are identical, 1 if one differs or a run
        fails, 2 if an option cannot be followed.
    """
    try:
        options = parse_options(argv)
        if importlib.util.find_spec("safetensors") is None:
            raise DemoError("the demo needs safetensors; install dgls_torch[demo]")
        outcomes = [_demonstrate(find_case(name, options.size), options) for name in options.models]
    except BadOption as error:
        return _fail(str(error), 2)
    except DemoError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    _summarise(outcomes, options)
    return 1 if any(outcome.same is False for outcome in outcomes) else 0


def _demonstrate(case: Case, options: Options) -> Outcome:
    model = case.meta_model()
    block_bytes = _weight_bytes(_blocks(model))
    budget = options.vram if options.vram is not None else block_bytes // 4
    _announce(case, model, options)
    path = _weights_file(case, model, options.weights_dir)

    resident = _run_resident(case, path, options)
    _say(f"\nstreamed within a budget of {_budget_text(budget)}")
    streamed = _run_streamed(case, model, path, budget, options)
    same = None if resident is None else _compare(resident.latent, streamed.latent)
    return Outcome(
        case=case,
        weight_bytes=path.stat().st_size,
        budget=budget,
        resident=resident,
        streamed=streamed,
        same=same,
    )


def _announce(case: Case, model: nn.Module, options: Options) -> None:
    blocks = _blocks(model)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    _say(f"\n{case.name} {case.size}")
    _row("model", f"width {case.hidden}, {len(blocks)} blocks, {millions:,.1f} M parameters")
    _row("blocks", f"{format_bytes(_weight_bytes(blocks))} of weights in bfloat16")
    _row("input", case.describe())
    steps = "step" if options.steps == 1 else "steps"
    _row("run", f"{options.steps} Euler {steps}, seed {options.seed}, {_device_text(options)}")


def _weights_file(case: Case, model: nn.Module, folder: Path) -> Path:
    path = folder / f"{case.name}-{case.hidden}.safetensors"
    total_bytes = file_bytes(model)
    bar: Bar | None = None

    def show(written_bytes: int) -> None:
        nonlocal bar
        if bar is None:
            bar = make_bar("writing  ", _mebibytes(total_bytes), "MiB")
        bar.show(_mebibytes(written_bytes))

    start = time.perf_counter()
    try:
        written = write_weights(model, path, on_bytes=show)
    except OSError as error:
        raise DemoError(str(error)) from error
    finally:
        if bar is not None:
            bar.close()
    seconds = time.perf_counter() - start
    how = f"written in {format_seconds(seconds)}" if written else "reused"
    _row("file", f"{path}, {format_bytes(total_bytes)}, {how}")
    return path


def _mebibytes(count: int) -> int:
    return math.ceil(count / 2**20)


def _run_resident(case: Case, path: Path, options: Options) -> Run | None:
    need_bytes = path.stat().st_size + case.workspace_bytes
    room_bytes = free_vram(options.device)
    if need_bytes > room_bytes:
        need, room = format_bytes(need_bytes), format_bytes(room_bytes)
        _say(f"\nnot compared: the resident model needs {need}, this device has {room}")
        return None
    _say("\nfully resident")
    settle(options.device)
    try:
        return _sample_resident(case, path, options)
    except torch.OutOfMemoryError:
        room = format_bytes(room_bytes)
        _say(f"\nnot compared: the resident model needs more than the {room} this device has")
        return None
    finally:
        settle(options.device)


def _sample_resident(case: Case, path: Path, options: Options) -> Run:
    from safetensors import safe_open

    model = case.meta_model()
    start = time.perf_counter()
    with safe_open(path, framework="pt") as file:
        # A real copy: what safetensors returns for the CPU still lies in the mapped file.
        state = {
            name: torch.empty_like(tensor, device=options.device).copy_(tensor)
            for name in file.keys()  # noqa: SIM118 - no mapping, it only has keys()
            for tensor in (file.get_tensor(name),)
        }
    model.load_state_dict(state, assign=True)
    del state
    _row("loading", format_seconds(time.perf_counter() - start))
    run = _sample(case, model, options)
    _row("result", _checksum(run.latent))
    return run


def _run_streamed(
    case: Case, model: nn.Module, path: Path, budget: int | str, options: Options
) -> Run:
    settle(options.device)
    start = time.perf_counter()
    try:
        stream = dgls_torch.stream(model, vram=budget, source=path, device=str(options.device))
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        asked = options.vram is not None and isinstance(error, ValueError)
        raise DemoError(f"{case.name} cannot be streamed: {error}", 2 if asked else 1) from error
    with stream:
        _row("set-up", format_seconds(time.perf_counter() - start))
        _say(stream.plan)
        run = _sample(case, model, options)
        _row("result", _checksum(run.latent))
        report = stream.report()
        _say(report)
        _draw(report, options.out_dir / f"{case.name}-timeline.svg")
    return run


def _draw(report: dgls_torch.Report, path: Path) -> None:
    try:
        report.plot(str(path))
    except ImportError as error:
        _row("timeline", f"not drawn: {error}")
    except OSError as error:
        raise DemoError(f"{path} cannot be written: {error.strerror}") from error
    else:
        _row("timeline", str(path))


def _sample(case: Case, model: nn.Module, options: Options) -> Run:
    watch = Watch(_blocks(model), options.device, options.steps)
    # cuDNN may otherwise choose another algorithm when less memory is free.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        try:
            latent = case.euler(model, options.steps, options.device, options.seed, watch.step)
        finally:
            watch.close()
    if not torch.isfinite(latent).all():
        raise DemoError(f"{case.name} gave values that are not finite")
    _row("speed", f"{format_seconds(watch.step_s)}/step{_after_first(options)}")
    return Run(latent=latent, step_s=watch.step_s, peak_bytes=watch.peak_bytes)


def _compare(expected: Tensor, found: Tensor) -> bool:
    if torch.equal(expected, found):
        _say(f"{_SAME} yes")
        return True
    difference = (expected - found).abs().max().item()
    _say(f"{_SAME} no (max abs diff {difference:.3g})")
    return False


def _summarise(outcomes: Sequence[Outcome], options: Options) -> None:
    where = "device" if options.device.type == "cuda" else "process, without mapped files"
    heads = ("", "file", "budget", "resident", "streamed", *_PEAK_HEADS, "identical")
    rows = [heads] + [_summary(outcome) for outcome in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    _say(f"\nsummary: s/step{_after_first(options)}, then peak memory ({where})")
    for name, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        _say(f"  {name:<{widths[0]}}  {'  '.join(aligned)}")
    kept = sum(outcome.weight_bytes for outcome in outcomes)
    _say(f"The weights stay in {options.weights_dir} ({format_bytes(kept)}) for the next run.")


def _summary(outcome: Outcome) -> tuple[str, ...]:
    runs = (outcome.resident, outcome.streamed)
    verdict = {True: "yes", False: "no", None: "not compared"}[outcome.same]
    return (
        f"{outcome.case.name} {outcome.case.size}",
        format_bytes(outcome.weight_bytes),
        _budget_text(outcome.budget),
        *(f"{run.step_s:.3f} s/step" if run else "-" for run in runs),
        *(format_bytes(run.peak_bytes) if run and run.peak_bytes else "-" for run in runs),
        verdict,
    )


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Lists the blocks of either model in the order they run."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def _weight_bytes(modules: Iterable[nn.Module]) -> int:
    return sum(weight.nbytes for module in modules for weight in module.parameters())


def _checksum(latent: Tensor) -> str:
    buffer = bytearray(latent.nbytes)
    torch.frombuffer(buffer, dtype=latent.dtype).copy_(latent.flatten())
    digest = hashlib.sha256(buffer)
    low, high = latent.min().item(), latent.max().item()
    return f"sha256 {digest.hexdigest()[:16]}, values {low:.3f} to {high:.3f}"


def _budget_text(budget: int | str) -> str:
    return budget if isinstance(budget, str) else format_bytes(budget)


def _device_text(options: Options) -> str:
    if options.device.type == "cuda":
        return torch.cuda.get_device_name(options.device)
    return f"CPU with {torch.get_num_threads()} threads"


def _after_first(options: Options) -> str:
    return " after the first step" if options.steps > 1 else ""


def _row(label: str, value: str) -> None:
    _say(f"  {label:<9}  {value}")


def _say(text: object) -> None:
    # Flushed, so that the bars on standard error stand between the right lines of a log.
    print(text, flush=True)


def _fail(message: str, status: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status

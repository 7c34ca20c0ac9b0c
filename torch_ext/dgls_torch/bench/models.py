"""Whole models: seconds of a pass under several budgets, against the resident model in one run.

The weights are random and lie in RAM, page-locked in place where there is a GPU. Every way is
warmed up and then timed over the same passes; ways take turns, so that drift hits them all alike.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

import dgls_torch
from dgls_torch.blocks import compute_device
from dgls_torch.demo.sample import Case, find_case
from dgls_torch.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SHARES = (0.75, 0.5, 0.25, 0.1)
# Enough for a plan for the measured times to be found and taken up.
_WARM_UP = 6


def _random(case: Case) -> nn.Module:
    """The model on the CPU, with weights that keep activations finite."""
    model = case.meta_model().to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            fan_in = param.shape[-1] if param.dim() > 1 else 1
            # Uniform integers are the fastest random numbers; their spread is all that matters.
            values = torch.randint(-128, 128, param.shape, dtype=torch.int8)
            param.copy_(values.to(param.dtype) * (fan_in**-0.5 / 74 if param.dim() > 1 else 1e-4))
    return model


class _Clock:
    """Times passes on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, sample: Callable[[int], object], passes: int) -> float:
        """Seconds of one of ``passes`` passes that are enqueued without a break."""
        self._wait()
        begun = time.perf_counter()
        sample(passes)
        self._wait()
        return (time.perf_counter() - begun) / passes

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextlib.contextmanager
def _resident(model: nn.Module, device: torch.device) -> Iterator[None]:
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")


def run(name: str, size: str | None, device_name: str | None, passes: int) -> None:
    """Prints the table of one model."""
    device = compute_device(device_name)
    case = find_case(name, size or ("medium" if device.type == "cuda" else "tiny"))
    model = _random(case)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{case.name} {case.size}, {case.describe()}, {format_bytes(total)} on {device}")
    print(
        f"  {'vram':>12}{'streamed':>12}{'pass':>10}{'/ resident':>12}{'stalled':>10}"
        f"{'copies':>12}{'efficiency':>12}"
    )
    clock = _Clock(device)

    def sample(steps: int) -> None:
        case.euler(model, steps, device, 0, lambda _: contextlib.nullcontext())

    with _resident(model, device):
        sample(_WARM_UP)
        base = statistics.median(clock.seconds(sample, passes) for _ in range(3))
    print(f"  {'resident':>12}{'':>12}{format_seconds(base):>10}{1:>12.3f}")
    for share in _SHARES:
        _streamed(model, int(share * total), device, clock, sample, base, passes)


def _streamed(
    model: nn.Module,
    vram: int,
    device: torch.device,
    clock: _Clock,
    sample: Callable[[int], None],
    base: float,
    passes: int,
) -> None:
    try:
        stream = dgls_torch.stream(model, vram=vram, device=str(device))
    except ValueError as error:
        print(f"  {format_bytes(vram):>12}  {error}")
        return
    with stream:
        sample(_WARM_UP)
        seconds = statistics.median(clock.seconds(sample, passes) for _ in range(3))
        report = stream.report()
    stall, rate, efficiency = report.stall_s, report.h2d_bytes_per_s, report.efficiency
    print(
        f"  {format_bytes(vram):>12}{format_bytes(report.h2d_bytes):>12}"
        f"{format_seconds(seconds):>10}{seconds / base:>12.3f}"
        f"{'' if stall is None else format_seconds(stall):>10}"
        f"{'' if rate is None else format_rate(rate):>12}"
        f"{'' if efficiency is None else f'{100 * efficiency:.1f} %':>12}"
    )

"""Block calls: what streaming adds to each, beside torch's own hooks.

Everything is measured in one process, in turns, so that the ratios hold on a noisy machine. The
copies are of a few bytes, so that no block waits for one: what is left is the cost of the host.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

import dgls_torch
from dgls_torch.blocks import compute_device
from dgls_torch.config import StreamConfig

if TYPE_CHECKING:
    from collections.abc import Callable

# Microseconds that peers add to each block on a machine like this one, measured on the CPU with
# their device calls stubbed out (2026-11): what they do in Python for each parameter.
_PEERS = {
    "a plain ring written in Python": (140, 180),
    "diffusers 0.38 group offload, block level": (300, 430),
    "RamTorch 1.11": (400, 400),
    "cache-dit 1.5 at 40 blocks": (730, 730),
    "mmgp 3.8": (930, 1200),
}


class _Block(nn.Module):
    """Keeps the host busy for a while, as launching kernels does, with many parameters around."""

    def __init__(self, parameters: int, busy_s: float) -> None:
        super().__init__()
        self._busy_s = busy_s
        for i in range(parameters):
            self.register_parameter(f"p{i}", nn.Parameter(torch.zeros(64), requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        until = time.perf_counter() + self._busy_s
        while time.perf_counter() < until:
            pass
        return x


def _model(blocks: int, parameters: int, busy_s: float) -> nn.Sequential:
    return nn.Sequential(*[_Block(parameters, busy_s) for _ in range(blocks)])


def _nothing(*_: object) -> None:
    """A hook that costs what hooks cost."""


def _hooked(model: nn.Sequential) -> nn.Sequential:
    for block in model:
        block.register_forward_pre_hook(_nothing)
        block.register_forward_hook(_nothing, always_call=True)
    return model


def _microseconds(model: nn.Module, x: torch.Tensor, blocks: int) -> float:
    """The host's time: what it enqueues waits for no earlier pass, and fits the device's queue."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    begun = time.perf_counter()
    model(x)
    return 1e6 * (time.perf_counter() - begun) / blocks


def measure(
    blocks: int, parameters: int, rounds: int, device: str | None, busy_s: float
) -> dict[str, float]:
    """Microseconds for each block call: median over rounds of each way, taken in turns."""
    target = compute_device(device)
    x = torch.zeros(1, device=target)
    bare, hooked, resident, streamed = (_model(blocks, parameters, busy_s) for _ in range(4))
    _hooked(hooked)
    size = parameters * 256
    config = StreamConfig(min_stream_bytes=0, trace_passes=0, device=str(target))
    all_fits = dgls_torch.stream(resident, vram=size * blocks, config=config)
    half = dgls_torch.stream(streamed, vram=size * (blocks // 2), config=config)
    timed: dict[str, Callable[[], float]] = {
        "bare": lambda: _microseconds(bare, x, blocks),
        "hooks": lambda: _microseconds(hooked, x, blocks),
        "resident": lambda: _microseconds(resident, x, blocks),
        "streamed": lambda: _microseconds(streamed, x, blocks),
    }
    found: dict[str, list[float]] = {name: [] for name in timed}
    with torch.inference_mode():
        for turn in range(rounds + 3):
            for name, run in timed.items():
                took = run()
                if turn >= 3:
                    found[name].append(took)
    share = half.report().h2d_bytes / max(1, half.plan.block_bytes)
    all_fits.detach()
    half.detach()
    return {name: statistics.median(values) for name, values in found.items()} | {"share": share}


def run(device: str | None, rounds: int, busy_us: float) -> None:
    """Prints the table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = ("bare", "hooks", "resident", "streamed")
    print("microseconds for each call of a block that computes nothing, median")
    heads = "".join(f"{name:>10}" for name in ("copies", *names, "added"))
    print(f"  {'parameters':>10}{heads}{'added, cold':>13}")
    for parameters in (1, 5, 20, 40):
        row = measure(60, parameters, rounds, device, 0.0)
        cold = measure(60, parameters, rounds, device, busy_us * 1e-6)
        cells = [parameters * row["share"], *(row[name] for name in names)]
        added = [found["streamed"] - found["hooks"] for found in (row, cold)]
        print(
            f"  {parameters:>10}"
            + "".join(f"{cell:>10.2f}" for cell in (*cells, added[0]))
            + f"{added[1]:>13.2f}"
        )
    print("added: streamed beyond torch's own hook machinery: binding and unbinding every")
    print("parameter, the schedule, and enqueueing the copies (of each block call: copies);")
    print(f"cold: the same after {busy_us:.0f} us of other work in each block, caches lost.")
    print("peers, for each block of about 20 parameters, measured earlier on another CPU:")
    for name, (low, high) in _PEERS.items():
        span = f"{low}" if low == high else f"{low}-{high}"
        print(f"  {name:<44}{span:>10} us")
    torch.set_num_threads(threads)

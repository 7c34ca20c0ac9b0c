"""The checks' register, their model, and its reference run."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import torch
from torch import nn

import dgls_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
DEVICE = torch.device("cuda", 0)
CHECKS: list[tuple[str, Callable[[], str]]] = []


def check(title: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Registers a check under its title; it returns what it saw and raises when that is wrong."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        CHECKS.append((title, function))
        return function

    return register


class Block(nn.Module):
    """Attention-free, but of several tensors and of some work."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(1, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def make(width: int, blocks: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model on the CPU with blocks, and weights outside of them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(width, width), nn.Sequential(*[Block(width) for _ in range(blocks)])
    )
    return model.to(dtype).eval().requires_grad_(False)


def reference(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of the fully resident model."""
    model.to(DEVICE)
    with torch.inference_mode():
        out = model(x)
    model.to("cpu")
    return out


def case(width: int, blocks: int, tokens: int = 64) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model, an input, and the output of the fully resident model."""
    model = make(width, blocks)
    x = torch.randn(1, tokens, width, dtype=torch.bfloat16, device=DEVICE)
    return model, x, reference(model, x)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Has these variables set while open."""
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def budgets(model: nn.Module) -> Iterator[int]:
    """From the smallest that works to all that fits."""
    with dgls_torch.stream(model, vram="64GiB") as s:
        least, total = s.plan.least_vram_bytes, s.plan.outside_bytes + s.plan.arena_bytes
    for share in (0.0, 0.15, 0.4, 0.75, 1.0):
        yield int(least + share * (total - least)) + 4096


def compare(**fields: object) -> str:
    """Runs a model under several budgets, several passes each; every output must be identical."""
    model, x, expected = case(1024, 12)
    pointers = [p.data_ptr() for p in model.parameters()]
    passes = 0
    for vram in budgets(model):
        with dgls_torch.stream(model, vram=vram, **fields) as s, torch.inference_mode():
            for _ in range(4):
                out = model(x)
                passes += 1
                if not torch.equal(out, expected):
                    raise AssertionError(f"differs at vram={vram}: {(out - expected).abs().max()}")
            if s.report().errors:
                raise AssertionError("device errors")
        if [p.data_ptr() for p in model.parameters()] != pointers:
            raise AssertionError("masters were not restored")
    return f"{passes} passes identical"

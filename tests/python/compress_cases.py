"""Models whose weights may go over the link encoded, and passes until they do.

Goal: a test about ``compress`` says which model and which use; that every pass on the way to
encoded weights is right is checked here, the same way for all.
Method: no test of its own. Encoding goes on in a thread beside the passes: so many passes are run,
with a short wait between two, until it is done, or until there were too many.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from helpers import SMALL, Net, inputs, net, same
from torch import nn

from dgls_torch.memory import host_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    import dgls_torch

MIB = 1 << 20
WIDTH = 512
"""Each block then has two weights of 1 MiB: none may be smaller to be encoded."""

LINK: dict[str, Any] = {"copy_bytes_per_s": 1e9}
ON: dict[str, Any] = SMALL | LINK | {"compress": "on"}

_MOST_PASSES, _WAIT_S = 100, 0.003


def wide(count: int = 4, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Net:
    """A model with weights as trained ones are: normally distributed."""
    model = net(count, WIDTH, seed)
    for block in model.blocks:
        for weight in (block.up.weight, block.down.weight):
            nn.init.normal_(weight, std=0.03)
    return model.to(dtype).requires_grad_(False)


def x(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return inputs(WIDTH).to(dtype)


def run(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(x(next(model.parameters()).dtype))


class Words(nn.Module):
    """A block that uses each bit of its weight, whatever numbers they mean."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * width, width, dtype=torch.bfloat16), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 3) ^ self.weight.view(torch.int16)

    def set(self, patterns: torch.Tensor) -> None:
        """Gives the weight these 16-bit patterns."""
        self.weight.copy_(patterns.to(torch.int16).view_as(self.weight).view(torch.bfloat16))


def words(patterns: Callable[[], torch.Tensor], count: int = 4) -> nn.Sequential:
    """Blocks with weights of these 16-bit patterns."""
    torch.manual_seed(3)
    model = nn.Sequential(*(Words() for _ in range(count)))
    for block in model:
        block.set(patterns())
    return model


class Both(Words):
    """A block with a bf16 and an fp8 weight, each bit of which it uses."""

    def __init__(self, dtype: torch.dtype = torch.float8_e4m3fn) -> None:
        super().__init__()
        self.bytes = nn.Parameter(torch.zeros(4 * WIDTH, WIDTH).to(dtype), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 5 ^ self.bytes.view(torch.int16).view(2 * WIDTH, WIDTH)


def both(
    patterns: Callable[[], torch.Tensor],
    of_bytes: Callable[[], torch.Tensor],
    dtype: torch.dtype = torch.float8_e4m3fn,
    count: int = 4,
) -> nn.Sequential:
    """Blocks with bf16 weights of these 16-bit patterns, and as many bytes of fp8 weights."""
    torch.manual_seed(3)
    model = nn.Sequential(*(Both(dtype) for _ in range(count)))
    for block in model:
        block.set(patterns())
        block.bytes.view(torch.uint8).copy_(of_bytes().view(4 * WIDTH, WIDTH))
    return model


def normal_words() -> torch.Tensor:
    return torch.randn(2 * WIDTH * WIDTH).to(torch.bfloat16).view(torch.int16)


def random_words() -> torch.Tensor:
    return torch.randint(-(1 << 15), 1 << 15, (2 * WIDTH * WIDTH,))


def normal_bytes(scale: float = 0.02) -> torch.Tensor:
    """Of fp8 weights as they are, or, at 90, scaled so that the largest is near fp8's largest."""
    weights = scale * torch.randn(4 * WIDTH * WIDTH)
    return weights.to(torch.float8_e4m3fn).view(torch.uint8)


def random_bytes() -> torch.Tensor:
    return torch.randint(0, 256, (4 * WIDTH * WIDTH,), dtype=torch.uint8)


def run_words(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(2 * WIDTH * WIDTH, dtype=torch.int16).view(2 * WIDTH, WIDTH))


def all_held(report: dgls_torch.Report) -> bool:
    """Whether all that is streamed is encoded: with eight weights, one less would be below."""
    return report.encoded_held_bytes > 0.6 * report.plan.streamed_bytes


def passes(
    s: dgls_torch.Stream,
    call: Callable[[], Any],
    expected: Any,
    enough: Callable[[dgls_torch.Report], bool] = all_held,
) -> dgls_torch.Report:
    """Runs passes, each of them right, until there were enough, and two more."""
    for number in range(_MOST_PASSES):
        assert same(call(), expected), f"pass {number}\n{s.report()}"
        if enough(s.report()):
            break
        time.sleep(_WAIT_S)
    else:
        raise AssertionError(f"not in {_MOST_PASSES} passes\n{s.report()}")
    for _ in range(2):
        assert same(call(), expected), s.report()
    return s.report()


def some_passes(
    s: dgls_torch.Stream, call: Callable[[], Any], expected: Any, count: int = 10
) -> None:
    """Runs so many passes, each of them right, with time to encode between two."""
    for number in range(count):
        assert same(call(), expected), f"pass {number}\n{s.report()}"
        time.sleep(_WAIT_S)


def may_lock(size: int = 64 * MIB) -> bool:
    """Whether this process may page-lock so much itself, without a driver."""
    host = host_memory()
    return host.locks_freely or (host.memlock_limit_bytes or size) >= size

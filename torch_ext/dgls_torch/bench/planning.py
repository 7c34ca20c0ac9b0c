"""The planner: how long it takes, how near to the optimum its plans are, and if runs keep them.

The last is shown on the CPU, whose copies are held to a rate: the same model runs with plans for
several budgets, and each pass is set against what its plan predicted.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from torch import nn

import dgls_torch

_GB = 1_000_000_000
_HIDDEN = 3072
_LINK_BYTES_PER_S = 200e6
_PASSES = 12


def _linear(rows: int, columns: int) -> list[int]:
    return [2 * rows * columns, 2 * rows]


def _double() -> list[int]:
    half = [*_linear(6 * _HIDDEN, _HIDDEN), *_linear(3 * _HIDDEN, _HIDDEN), 256, 256]
    half += [*_linear(_HIDDEN, _HIDDEN), *_linear(4 * _HIDDEN, _HIDDEN)]
    half += _linear(_HIDDEN, 4 * _HIDDEN)
    return half * 2


def _single() -> list[int]:
    parts = [*_linear(3 * _HIDDEN, _HIDDEN), *_linear(7 * _HIDDEN, _HIDDEN), 256, 256]
    return parts + _linear(_HIDDEN, 5 * _HIDDEN)


def _inputs(doubles: int, singles: int, share: float, verify: bool) -> str:
    """FLUX-shaped blocks; double blocks take longer, so that no shortcut for equal ones holds."""
    kinds = [(doubles, _double(), 0.0104), (singles, _single(), 0.0087)]
    blocks = [
        {"bytes": sum(parts), "tensor_bytes": parts, "compute_s": seconds, "count": count}
        for count, parts, seconds in kinds
    ]
    total = sum(count * sum(parts) for count, parts, _ in kinds)
    link = {"h2d_bytes_per_s": 25e9, "copy_latency_s": 5e-6, "verify": verify}
    return json.dumps({"blocks": blocks, "budget_bytes": int(share * total), **link})


def _plan_times(doubles: int, singles: int) -> None:
    for share in (0.2, 0.35, 0.6):
        took = []
        for _ in range(3):
            begun = time.perf_counter()
            text = torch.ops.dgls.plan.json(_inputs(doubles, singles, share, verify=False))
            took.append(time.perf_counter() - begun)
        plan = json.loads(text)
        row = (
            f"  {doubles + singles:>6}{100 * share:>9.0f} %{1e3 * statistics.median(took):>9.1f} ms"
        )
        if doubles + singles <= 100:
            verified = json.loads(torch.ops.dgls.plan.json(_inputs(doubles, singles, share, True)))
            row += f"{plan['period_s'] / verified['optimum_s']:>14.4f}"
        print(row)


class _Block(nn.Module):
    """Eight tensors of 128 KiB, and a fixed time of compute, which leaves the processor free."""

    def __init__(self, busy_s: float) -> None:
        super().__init__()
        self._busy_s = busy_s
        for i in range(8):
            self.register_parameter(
                f"p{i}", nn.Parameter(torch.zeros(1 << 15), requires_grad=False)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self._busy_s)
        return x


def _kept(busy_s: float, share: float) -> tuple[float, float]:
    """Predicted seconds of a pass, and the median of those that ran."""
    model = nn.Sequential(*[_Block(busy_s) for _ in range(24)])
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    x = torch.zeros(1)
    with (
        torch.inference_mode(),
        dgls_torch.stream(
            model, int(share * total), device="cpu", copy_bytes_per_s=_LINK_BYTES_PER_S
        ) as s,
    ):
        spans = []
        for _ in range(2 * _PASSES):
            begun = time.perf_counter()
            model(x)
            spans.append(time.perf_counter() - begun)
        predicted = s.plan.predicted_s
    return predicted or float("nan"), statistics.median(spans[_PASSES:])


def run() -> None:
    """Prints both tables."""
    print("planner, FLUX-shaped blocks, median of 3, and period over the optimum of any policy")
    print(f"  {'blocks':>6}{'budget':>11}{'took':>12}{'over optimum':>14}")
    for doubles, singles in ((20, 40), (133, 267)):
        _plan_times(doubles, singles)
    print("the CPU with a link of 200 MB/s, 24 blocks of 1 MiB: measured pass over predicted")
    print(f"  {'budget':>8}{'compute':>12}{'predicted':>12}{'measured':>12}{'ratio':>8}")
    for busy_ms in (1.5, 5.0, 9.0):
        for share in (0.25, 0.5):
            predicted, measured = _kept(busy_ms * 1e-3, share)
            print(
                f"  {100 * share:>6.0f} %{24 * busy_ms:>9.1f} ms{1e3 * predicted:>9.1f} ms"
                f"{1e3 * measured:>9.1f} ms{measured / predicted:>8.3f}"
            )

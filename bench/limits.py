"""The first process of a test bed: the link's rate, points to measure, and the resident run.

Everything that the other engines are compared with comes from here: seconds of compute alone,
the hash of the output, and what a pass needs of the device's memory beside the weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from bench import measure
from bench.account import profile
from bench.cells import Point
from bench.machine import describe
from bench.stacks import weight_bytes
from bench.worker import Worker

if TYPE_CHECKING:
    from bench.eaters import Load
    from bench.measure import Step

SHARE = 0.25
"""The budget, as a share of the weights, at which points have the ratios that were asked for."""
_STEP = 128
_MOST_TOKENS = 65536
_PROBES = (1024, 4096, 12288)
_LEFT = 0.8
"""The most that other processes may leave of the link."""


def tokens_for(seconds: float, probes: list[tuple[int, float]], least: int) -> int:
    """Tokens whose pass takes ``seconds``, by the parabola through three probes.

    Below the least probe the host's launches decide, so it is never left by more than ``least``.
    """
    a, b, c = _parabola(probes)
    low, high = float(least), float(_MOST_TOKENS)
    for _ in range(60):
        middle = (low + high) / 2
        is_less = a + b * middle + c * middle * middle < seconds
        low, high = (middle, high) if is_less else (low, middle)
    return max(least, _STEP * round(low / _STEP))


def _parabola(points: list[tuple[int, float]]) -> tuple[float, float, float]:
    """The coefficients of 1, t and t squared; the last is never negative."""
    (t, u), (s, v), (r, w) = points
    first, second = (v - u) / (s - t), (w - v) / (r - s)
    c = max(0.0, (second - first) / (r - t))
    b = first - c * (s + t)
    return u - b * t - c * t * t, b, c


def check_copiers(copiers: int, alone: float, loaded: float) -> None:
    """Refuses other copies that take nothing of the link: they would represent no slower one.

    Raises:
        ValueError: With both rates.
    """
    if copiers and loaded > _LEFT * alone:
        raise ValueError(
            f"{copiers} processes that copy should leave less than {_LEFT:.0%} of the link, found "
            f"{loaded / 1e9:.1f} of {alone / 1e9:.1f} GB/s"
        )


class Limits(Worker):
    """Measures what limits a bed."""

    def run(self) -> None:
        """Writes the link's rate, then a line for each point."""
        job = self.job
        self.write({"kind": "machine", "machine": describe(job.device.type)})
        alone = measure.link_rate(job.device, job.link_bytes_per_s)
        try:
            with self.loaded() as load:
                loaded = measure.link_rate(job.device, job.link_bytes_per_s)
                check_copiers(job.bed.copiers, alone, loaded)
                self._limits(loaded, load)
        except (RuntimeError, ValueError) as error:
            self.give_up(error)

    def _limits(self, link: float, load: Load) -> None:
        job = self.job
        attached, stack, _ = self.attach(0)
        total = weight_bytes(stack)
        row = {
            "kind": "bed",
            "link_bytes_per_s": link,
            "weight_bytes": total,
            "largest_block_bytes": max(map(weight_bytes, stack.order)),
            "blocks": len(stack.order),
        }
        self.write(row)
        found = self._find(attached.step, stack, link) if job.ratios else {}
        for point, ratios in found.items():
            row = {"kind": "point", "point": point.key, "ratios": ratios}
            row |= {"block_s": self._blocks(stack, point)} | self._point(stack, point)
            load.check()
            self.write(row)
        for point in job.points:
            row = {"kind": "blocks", "point": point.key}
            self.write(row | {"block_s": self._blocks(stack, point)})
        attached.close()

    def _find(self, step: Step, stack: Any, link: float) -> dict[Point, list[float]]:
        """Points with the ratios of copy to compute that they stand for; some may coincide."""
        job, copy_s = self.job, (1 - SHARE) * weight_bytes(stack) / link
        least = job.bed.workload.least_tokens()
        if job.device.type != "cuda":
            blocks = len(stack.order)
            return {Point(least, round(copy_s / r / blocks, 6)): [r] for r in job.ratios}
        probes = []
        for tokens in _PROBES:
            x, c = job.bed.workload.inputs(tokens, job.device)
            measure.timed(step, x, c, 1)
            probes.append((tokens, min(measure.timed(step, x, c, 2).passes)))
        found: dict[Point, list[float]] = {}
        for ratio in job.ratios:
            found.setdefault(Point(tokens_for(copy_s / ratio, probes, least)), []).append(ratio)
        return found

    def _blocks(self, stack: Any, point: Point) -> list[float]:
        """Seconds of each block."""
        stack.pace(point.pace_s)
        x, c = self.job.bed.workload.inputs(point.tokens, self.job.device)
        measure.timed(stack, x, c, 1)
        times = measure.BlockTimes(stack.order, self.job.device)
        measure.timed(stack, x, c, 3)
        return times.close()

    def _point(self, stack: Any, point: Point) -> dict[str, Any]:
        job = self.job
        self.empty_cache()
        on_cuda = job.device.type == "cuda"
        held = torch.cuda.memory_reserved(job.device) if on_cuda else 0
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(job.device)
        stack.pace(point.pace_s)
        x, c = job.bed.workload.inputs(point.tokens, job.device)
        found = measure.digest(stack, x, c)
        launch_s = measure.launch_s(job.device)
        timing, allocations = measure.steady(stack, x, c, job.effort)
        watch = measure.Watch(job.device)
        with watch.open():
            measure.timed(stack, x, c, 2)
        reserved = torch.cuda.max_memory_reserved(job.device) if on_cuda else 0
        row = {
            "tokens": point.tokens,
            "pace_s": point.pace_s,
            "compute_s": timing.median_s,
            "passes_s": timing.passes,
            "hash": found,
            "launch_s": launch_s,
            "workspace_bytes": reserved - held,
            "base_bytes": self.base_bytes,
            "peak_bytes": watch.peak_bytes,
            "gaps_bytes": watch.gaps_bytes,
            "host_cpu_s": timing.host_cpu_s,
            "allocations": allocations,
        }
        if on_cuda and job.deep:
            account, _ = profile(lambda: measure.chain(stack, x, c, 1, _nothing))
            row["account"] = account.to_json()
        if not all(math.isfinite(value) for value in timing.passes):
            raise ArithmeticError(f"times need to be finite, found {timing.passes}")
        return row


def _nothing() -> None:
    """Between two passes."""

"""What is measured, as plain values: test beds, points, cells, and the physical limit of a cell.

Knows no device and no clock. All times are seconds, all sizes bytes, all rates bytes per second.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bench.stacks import Workload

COMPUTE_BOUND_BELOW = 0.8
COPY_BOUND_ABOVE = 1.25


@dataclass(frozen=True)
class Bed:
    """A model on a link; its points and budgets share one set of weights."""

    workload: Workload
    copiers: int = 0
    """Other processes that copy, so that a slower link is represented."""

    @property
    def key(self) -> str:
        """Names it in results."""
        return self.workload.key + (f"+{self.copiers}" if self.copiers else "")

    def title(self) -> str:
        """Names it for people."""
        if not self.copiers:
            return self.workload.title()
        others = "a process that copies"
        if self.copiers > 1:
            others = f"{self.copiers} processes that copy"
        return f"{self.workload.title()}, beside {others}"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Bed:
        """From a JSON object."""
        return Bed(Workload(**value["workload"]), value["copiers"])


@dataclass(frozen=True)
class Point:
    """How much a pass computes: tokens, and a least time of each block where no GPU computes."""

    tokens: int
    pace_s: float = 0.0

    @property
    def key(self) -> str:
        """Names it in results."""
        return f"{self.tokens}" if not self.pace_s else f"{self.tokens}/{1e6 * self.pace_s:.0f}us"


@dataclass(frozen=True)
class Limit:
    """What no policy beats: compute alone, or the bytes that do not fit over the link's rate."""

    weight_bytes: int
    budget_bytes: int
    compute_s: float
    link_bytes_per_s: float
    blocks: int

    @property
    def copy_s(self) -> float:
        """Seconds that the bytes beyond the budget take on the link."""
        return max(0, self.weight_bytes - self.budget_bytes) / self.link_bytes_per_s

    @property
    def seconds(self) -> float:
        """The physical limit of a pass."""
        return max(self.compute_s, self.copy_s)

    @property
    def ratio(self) -> float:
        """Copy over compute: above 1 the link is the limit."""
        return self.copy_s / self.compute_s

    @property
    def regime(self) -> str:
        """``compute``, ``balance`` or ``copy``: what decides."""
        if self.ratio <= COMPUTE_BOUND_BELOW:
            return "compute"
        return "copy" if self.ratio >= COPY_BOUND_ABOVE else "balance"

    @property
    def optimum_s(self) -> float:
        """What the best of all policies reaches when blocks are equal: a buffer takes room too."""
        if self.copy_s == 0.0:
            return self.compute_s
        n = self.blocks
        return max(self.compute_s, (n * self.copy_s + self.compute_s) / (n - 1))


def even(sizes: list[int], count: int) -> set[int]:
    """Picks ``count`` blocks, evenly spaced."""
    n = len(sizes)
    return {((2 * j + 1) * n) // (2 * count) for j in range(count)} if count else set()


def even_residents(sizes: list[int], room: int, slots: int) -> set[int]:
    """The most evenly spaced residents that leave room for ``slots`` of the largest other block.

    Raises:
        ValueError: Not even the slots fit.
    """
    for count in range(len(sizes), -1, -1):
        chosen = even(sizes, count)
        others = [size for i, size in enumerate(sizes) if i not in chosen]
        need = sum(sizes[i] for i in chosen) + min(slots, len(others)) * max(others, default=0)
        if need <= room:
            return chosen
    need = slots * max(sizes)
    raise ValueError(f"{slots} slots need {need} bytes, found a budget of {room} bytes")

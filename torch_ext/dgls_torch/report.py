"""What was planned and what was measured, as numbers and as tables for people."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import groupby, takewhile
from statistics import median_low
from typing import TYPE_CHECKING, Any

from dgls_torch.tables import block_table, table
from dgls_torch.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from dgls_torch.config import StreamConfig

_ALIKE = 1.15
"""How many times as long passes of the same work take at most; the engine too sees news beyond."""


@dataclass(frozen=True)
class BlockPlan:
    """One block: its name and how many of its bytes stay on the device or are streamed."""

    name: str
    resident_bytes: int
    streamed_bytes: int


@dataclass(frozen=True)
class Plan:
    """What lives where. Sizes are bytes; those in the arena are rounded up to 256 for each tensor.

    Attributes:
        device: Where the model computes.
        vram_bytes: The budget.
        outside_bytes: What of it the weights and buffers outside of the streamed tensors take.
        arena_bytes: What the resident tensors and the ring take.
        ring_bytes: Size of the ring that the streamed tensors go through.
        predicted_s: Seconds of a pass, by exact simulation with the times measured so far; ``None``
            before any were.
        predicted_bound_s: What no plan could be faster than with those times.
        streamed_bytes: Bytes copied in each pass.
        least_vram_bytes: The smallest budget with which this model runs.
        blocks: One entry for each block, in order of first use.
        decode_bytes: What of ``outside_bytes`` encoded weights are decoded from.
    """

    device: str
    vram_bytes: int
    outside_bytes: int
    arena_bytes: int
    ring_bytes: int
    predicted_s: float | None
    predicted_bound_s: float | None
    streamed_bytes: int
    least_vram_bytes: int
    blocks: tuple[BlockPlan, ...]
    decode_bytes: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(b.resident_bytes + b.streamed_bytes for b in self.blocks)

    def __str__(self) -> str:
        """The plan as a table; neighbours of one size share a row."""
        used = self.outside_bytes + self.arena_bytes
        buffer = ""
        if self.decode_bytes:
            buffer = f" ({format_bytes(self.decode_bytes)} of them to decode from)"
        lines = [
            f"plan for {format_bytes(self.vram_bytes)} on {self.device}: "
            f"{format_bytes(used)} used, {format_bytes(self.least_vram_bytes)} would do",
            f"  outside of blocks {format_bytes(self.outside_bytes)}{buffer}, "
            f"blocks {format_bytes(self.block_bytes)}, of which streamed in each pass "
            f"{format_bytes(self.streamed_bytes)}",
        ]
        if self.ring_bytes:
            most = max(block.streamed_bytes for block in self.blocks)
            lines.append(
                f"  through a ring of {format_bytes(self.ring_bytes)}: "
                f"{self.ring_bytes / most:.1f} times the most of any block"
            )
        else:
            lines.append("  everything fits: nothing is streamed")
        if self.ring_bytes and self.predicted_s and self.predicted_bound_s:
            lines.append(
                f"  a pass should take {format_seconds(self.predicted_s)}, "
                f"{self.predicted_s / self.predicted_bound_s:.3f} of the bound"
            )
        return "\n".join([*lines, *block_table(self.blocks)])


@dataclass(frozen=True)
class Use:
    """One timed use of a block; seconds since the engine was made.

    The compute stream reached the block at ``wait_s``, began at ``start_s`` when its weights had
    arrived, and ended at ``end_s``; the last ``stretch_bytes`` of its ``bytes``, those that were
    enqueued at once, were copied from ``copy_start_s`` to ``copy_end_s``.
    """

    pass_number: int
    block: str
    bytes: int
    stretch_bytes: int
    copy_start_s: float
    copy_end_s: float
    wait_s: float
    start_s: float
    end_s: float

    @property
    def stall_s(self) -> float:
        """Time the compute stream waited for the weights."""
        return max(0.0, self.start_s - self.wait_s)


@dataclass(frozen=True)
class HostUse:
    """Where on the host the weights come from. Sizes are bytes, rates bytes per second.

    Attributes:
        cached_bytes: Held as copies of what the files hold, in whole pages, page-locked or not.
        locked_bytes: Copied in each pass from page-locked memory, or, on the CPU, from any.
        memory_bytes: Copied in each pass from memory, through the staging chunks.
        file_bytes: Read in each pass from files, through the staging chunks.
        read_memory_bytes: Read into chunks so far from memory; ``read_cached_bytes``: from files
            through the page cache; ``read_direct_bytes``: past it.
        reads_directly: Whether reading past the page cache turned out to be faster.
        threads: Threads that read at a time; as many as turned out to be faster.
        memory_bytes_per_s: What they read from memory together; 0 while unknown.
        file_bytes_per_s: What they read from files together; 0 while unknown.
        given_back: Times that memory was given back because the system ran short.
        given_back_bytes: How much that was.
    """

    cached_bytes: int = 0
    locked_bytes: int = 0
    memory_bytes: int = 0
    file_bytes: int = 0
    read_memory_bytes: int = 0
    read_cached_bytes: int = 0
    read_direct_bytes: int = 0
    reads_directly: bool = False
    threads: int = 0
    memory_bytes_per_s: int = 0
    file_bytes_per_s: int = 0
    given_back: int = 0
    given_back_bytes: int = 0

    @staticmethod
    def of(numbers: Sequence[int]) -> HostUse:
        """Made of the engine's numbers, in the order of the fields."""
        names = [field.name for field in fields(HostUse)]
        use: dict[str, Any] = dict(zip(names, numbers, strict=True))
        use["reads_directly"] = bool(use["reads_directly"])
        return HostUse(**use)

    def rows(self) -> list[tuple[str, str]]:
        """What a table says of it: nothing where everything comes from page-locked memory."""
        rows = []
        if self.memory_bytes or self.file_bytes:
            tiers = (
                f"{format_bytes(self.locked_bytes)} as it is, {format_bytes(self.memory_bytes)} "
                f"staged from memory, {format_bytes(self.file_bytes)} from files"
            )
            rows.append(("of which comes", tiers))
        if self.file_bytes_per_s:
            way = "past" if self.reads_directly else "through"
            rate = format_rate(self.file_bytes_per_s)
            rows.append(
                ("files are read", f"{way} the page cache, {self.threads} at a time, {rate}")
            )
        if self.cached_bytes:
            rows.append(("copies in RAM", format_bytes(self.cached_bytes)))
        if self.given_back:
            given = f"{format_bytes(self.given_back_bytes)}, {self.given_back} times"
            rows.append(("given back to the system", given))
        return rows


@dataclass(frozen=True)
class Report:
    """What was measured.

    Times are of the last timed passes that took about as long, after the first one of a plan, which
    fills the residents. Few are timed: the first four of a plan, then two of eight, later two of
    32, and the next three after one that took unusually long or short; where nothing is streamed
    three of 32.

    Attributes:
        plan: The plan in force.
        passes: Passes of the model so far.
        uses: Blocks entered so far.
        on_demand: Uses whose copies had not been asked for before the block began.
        mispredicted: Uses that came out of turn.
        rebuilds: Times the plan was made anew for a newly learned order or for measured times;
            ``adopted``: those for measured times.
        errors: Device errors so far.
        h2d_bytes_total: Bytes copied to the device so far, as they went over the link;
            ``copies``: in how many copies.
        encoded_bytes_total: Of those bytes the encoded ones; ``decoded_bytes_total``: what they
            were decoded to. 0 without ``compress``.
        encoded_held_bytes: Page-locked bytes of host memory that hold encoded weights now.
        pinned_bytes: Host bytes page-locked in place; ``pin_failures``: page-locks refused.
        staging_bytes: Page-locked bytes of the staging chunks.
        host: Where on the host the weights come from.
        verified_bytes: Bytes compared with their host source after they had arrived;
            ``mismatches``: uses of blocks in which they were other ones. 0 without ``verify``.
        timeline: The timed uses, oldest first, from the beginning of a pass on.
        last_errors: What the last errors said, oldest first; no paths.
        config: What the stream was told.
    """

    plan: Plan
    passes: int
    uses: int
    on_demand: int
    mispredicted: int
    rebuilds: int
    adopted: int
    errors: int
    h2d_bytes_total: int
    copies: int
    pinned_bytes: int
    pin_failures: int
    staging_bytes: int
    host: HostUse
    verified_bytes: int
    mismatches: int
    encoded_bytes_total: int
    decoded_bytes_total: int
    encoded_held_bytes: int
    timeline: tuple[Use, ...]
    last_errors: tuple[str, ...]
    config: StreamConfig

    def _steady(self) -> list[tuple[list[Use], float]]:
        """The timed passes that have a timed successor, without the first; when that began.

        Only the last ones that took about as long: before another resolution passes were others.
        """
        by_pass = {n: list(g) for n, g in groupby(self.timeline, key=lambda u: u.pass_number)}
        passes = [
            (uses, by_pass[n + 1][0].wait_s)
            for n, uses in by_pass.items()
            if n > 0 and n + 1 in by_pass
        ]
        # Of the last two: one alone may have met a moment in which the machine was slow.
        spans = [_inside_s(uses) for uses, _ in passes[-2:]]
        alike = takewhile(
            lambda each: min(spans) / _ALIKE <= _inside_s(each[0]) <= max(spans) * _ALIKE,
            reversed(passes),
        )
        return list(alike)[::-1]

    @property
    def pass_s(self) -> float | None:
        """Mean seconds of a pass, from the first block to the first block of the next.

        What lies between two passes is the caller's, who may rest there: of that the median.
        """
        passes = self._steady()
        if not passes:
            return None
        inside = sum(_inside_s(uses) for uses, _ in passes) / len(passes)
        return inside + median_low(next_s - uses[-1].end_s for uses, next_s in passes)

    @property
    def stall_s(self) -> float | None:
        """Mean seconds of a pass in which the compute stream waited for weights."""
        passes = self._steady()
        return sum(u.stall_s for p, _ in passes for u in p) / len(passes) if passes else None

    @property
    def h2d_bytes(self) -> int:
        """Bytes copied in each pass."""
        return self.plan.streamed_bytes

    @property
    def h2d_bytes_per_s(self) -> float | None:
        """Rate of the copies while they were under way; ``None`` when nothing is streamed."""
        uses = [u for p, _ in self._steady() for u in p]
        timed = [u for u in uses if u.stretch_bytes and u.copy_end_s > u.copy_start_s]
        # A stretch begins when what was enqueued before it has ended, and nothing waits within.
        busy = sum(use.copy_end_s - use.copy_start_s for use in timed)
        return sum(use.stretch_bytes for use in timed) / busy if busy > 0 else None

    @property
    def bound_s(self) -> float | None:
        """No policy is faster: compute, or the bytes that do not fit over the measured rate."""
        pass_s, stall_s, rate = self.pass_s, self.stall_s, self.h2d_bytes_per_s
        if pass_s is None or stall_s is None:
            return None
        room = self.plan.vram_bytes - self.plan.outside_bytes
        missing = max(0, self.plan.block_bytes - room)
        return max(pass_s - stall_s, missing / rate if rate else 0.0)

    @property
    def efficiency(self) -> float | None:
        """``bound_s / pass_s``: 1 is the physical limit of this machine, model and budget."""
        bound_s, pass_s = self.bound_s, self.pass_s
        return None if bound_s is None or not pass_s else min(1.0, bound_s / pass_s)

    @property
    def limit(self) -> str | None:
        """``"copy"`` or ``"compute"``: what the bound consists of."""
        pass_s, stall_s, bound_s = self.pass_s, self.stall_s, self.bound_s
        if pass_s is None or stall_s is None or bound_s is None:
            return None
        return "copy" if bound_s > pass_s - stall_s else "compute"

    def last_passes(self) -> list[Use]:
        """The uses of the last two timed passes that nobody rested between; else of the last."""
        shown = {use.pass_number for use in self.timeline[-1:]}
        for uses, next_s in reversed(self._steady()):
            if next_s - uses[-1].end_s < _inside_s(uses):
                number = uses[0].pass_number
                shown = {number, number + 1}
                break
        return [use for use in self.timeline if use.pass_number in shown]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the last timed passes: copies and compute of each block (SVG, PNG or PDF).

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: No pass has been timed yet.
        """
        from dgls_torch.timeline import plot

        plot(self, path)

    def bundle(self, path: str | os.PathLike[str]) -> None:
        """Writes all that a bug report needs as JSON; docs/bundle.md says what is in it.

        There are no paths in it, no names of files but their last part, and no variables of the
        environment but those that begin with DGLS.

        Raises:
            OSError: The file cannot be written.
        """
        from dgls_torch.bundle import write

        write(self, path)

    def __str__(self) -> str:
        """The report as a table."""
        rows = [("passes", f"{self.passes}")]
        if self.pass_s is not None and self.stall_s is not None:
            share = 100 * self.stall_s / self.pass_s if self.pass_s else 0.0
            rows.append(("time of a pass", format_seconds(self.pass_s)))
            rows.append(("of which stalled", f"{format_seconds(self.stall_s)} ({share:.1f} %)"))
        rows.append(("copied in a pass", format_bytes(self.h2d_bytes)))
        if self.h2d_bytes_per_s is not None:
            rows.append(("rate of the copies", format_rate(self.h2d_bytes_per_s)))
        if self.efficiency is not None and self.bound_s is not None:
            rows.append(("bound", f"{format_seconds(self.bound_s)} ({self.limit} bound)"))
            rows.append(("efficiency", f"{100 * self.efficiency:.1f} % of the bound"))
        if self.plan.predicted_s is not None and self.plan.ring_bytes:
            rows.append(("predicted by the plan", format_seconds(self.plan.predicted_s)))
            rows.append(("plans adopted", f"{self.adopted}"))
        out_of_turn = f"{self.mispredicted} of {self.uses} uses, {self.on_demand} on demand"
        rows.append(("out of turn", out_of_turn))
        pinned = f"{format_bytes(self.pinned_bytes)} in place, {self.pin_failures} refused"
        rows.append(("page-locked", f"{pinned}, {format_bytes(self.staging_bytes)} staging"))
        rows += self.host.rows()
        if self.encoded_bytes_total:
            share = self.encoded_bytes_total / self.decoded_bytes_total
            held = format_bytes(self.encoded_held_bytes)
            rows.append(("encoded", f"{held} held, {100 * share:.1f} % of their size on the link"))
        if self.verified_bytes:
            verified = f"{format_bytes(self.verified_bytes)}, {self.mismatches} mismatches"
            rows.append(("verified", verified))
        if self.errors:
            rows.append(("device errors", f"{self.errors}"))
        return "\n".join(["measured", *table(rows)])


def _inside_s(uses: list[Use]) -> float:
    """Seconds from the arrival at the first use of a pass to the end of its last."""
    return uses[-1].end_s - uses[0].wait_s

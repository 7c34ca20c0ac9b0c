"""How passes are timed, checked and watched, on a GPU by events and on the CPU by the clock."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

Step = Callable[[Tensor, Tensor], Tensor]

CHECKED_PASSES = 2
_SAMPLE_S = 0.002
_LAUNCH_ROUNDS = 5
_LAUNCHES = 200


@dataclass(frozen=True)
class Effort:
    """How many passes are run: at least some, then until a time is up, at most some."""

    warm: int = 5
    """Passes after the two checked ones and before the timed ones."""
    settling_s: float = 0.0
    """Seconds of more passes before those, for an engine that learns."""
    settling: int = 60
    """How many of those there are at most."""
    least: int = 3
    most: int = 8
    seconds: float = 1.2
    rounds: int = 3
    """Parts that the timed passes are in, where a reference takes turns with them."""
    beside: int = 2
    """Timed passes of the reference in each of its turns."""
    lead_s: float = 0.3
    """Seconds of passes that are not timed at the beginning of a round, and of a turn: after a rest
    a GPU's clock swings for a while, and a host's first passes are slow."""

    def passes(self, pass_s: float) -> int:
        """The number for passes of ``pass_s`` seconds."""
        return max(self.least, min(self.most, int(self.seconds / max(pass_s, 1e-6)) + 1))

    def passes_to_settle(self, pass_s: float) -> int:
        """The number for an engine that learns."""
        return max(1, min(self.settling, int(self.settling_s / max(pass_s, 1e-6))))

    def passes_of_lead(self, pass_s: float) -> int:
        """The number before those of a round, at least one; ``pass_s`` is 0 where not known."""
        return max(1, math.ceil(self.lead_s / pass_s)) if pass_s > 0.0 else 1

    def passes_of_round(self, pass_s: float) -> int:
        """The number in each round."""
        return max(1, math.ceil(self.passes(pass_s) / self.rounds))


def wait(device: torch.device) -> None:
    """Blocks until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def chain(step: Step, x: Tensor, c: Tensor, passes: int, between: Callable[[], None]) -> Tensor:
    """Runs passes as a sampler does, one's output in the next; nothing waits in between."""
    for _ in range(passes):
        x = x - 0.1 * step(x, c)
        between()
    return x


def digest(step: Step, x: Tensor, c: Tensor) -> str:
    """A hash of the output of the first passes from ``x``.

    Raises:
        ArithmeticError: The output has values that are not finite, whose hash would prove nothing.
    """
    y = chain(step, x, c, CHECKED_PASSES, lambda: None).cpu()
    if not bool(torch.isfinite(y).all()) or float(y.float().std()) == 0.0:
        raise ArithmeticError("the output needs finite values that differ, found others")
    return hashlib.sha256(y.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Timing:
    """Seconds of each pass, and of the host to enqueue one."""

    passes: list[float]
    enqueue_s: float
    """Wall time of the enqueueing thread for a pass; on a GPU it may run ahead."""
    host_cpu_s: float
    """Processor time of that thread for a pass."""

    @property
    def median_s(self) -> float:
        """The median pass."""
        ordered, middle = sorted(self.passes), len(self.passes) // 2
        if len(ordered) % 2:
            return ordered[middle]
        return (ordered[middle - 1] + ordered[middle]) / 2


def timed(step: Step, x: Tensor, c: Tensor, passes: int) -> Timing:
    """Times passes that are enqueued without a break."""
    device = x.device
    marks: list[Any] = []

    def mark() -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())

    wait(device)
    begun, cpu = time.perf_counter(), time.thread_time()
    mark()
    chain(step, x, c, passes, mark)
    enqueue, host = time.perf_counter() - begun, time.thread_time() - cpu
    wait(device)
    pairs = list(itertools.pairwise(marks))
    if device.type == "cuda":
        spans = [1e-3 * before.elapsed_time(after) for before, after in pairs]
    else:
        spans = [after - before for before, after in pairs]
    return Timing(spans, enqueue / passes, host / passes)


def launch_s(device: torch.device) -> float | None:
    """What the host takes to launch a kernel now, seconds; ``None`` on the CPU.

    The fastest of some rounds of fewer launches than a queue holds: the host of a virtual machine
    is twice as slow from one second to the next.
    """
    if device.type != "cuda":
        return None
    number = torch.zeros(1, device=device)
    rounds = []
    for _ in range(_LAUNCH_ROUNDS):
        wait(device)
        begun = time.perf_counter()
        for _ in range(_LAUNCHES):
            number.add_(1)
        rounds.append((time.perf_counter() - begun) / _LAUNCHES)
    wait(device)
    return min(rounds)


class BlockTimes:
    """Seconds between the ends of neighbouring blocks, seen by hooks that wait for nothing."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Registers the hooks."""
        self._device = device
        self._marks: list[list[Any]] = [[] for _ in range(len(blocks) + 1)]
        self._handles = [blocks[0].register_forward_pre_hook(self._marker(0), prepend=True)]
        for index, block in enumerate(blocks):
            self._handles.append(block.register_forward_hook(self._marker(index + 1)))

    def _marker(self, index: int) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            if self._device.type == "cuda":
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                self._marks[index].append(event)
            else:
                self._marks[index].append(time.perf_counter())

        return mark

    def close(self) -> list[float]:
        """Takes the hooks off; the median of the passes for each block."""
        for handle in self._handles:
            handle.remove()
        wait(self._device)
        on_cuda = self._device.type == "cuda"
        return [
            statistics.median(
                1e-3 * begin.elapsed_time(end) if on_cuda else end - begin
                for begin, end in zip(before, after, strict=True)
            )
            for before, after in itertools.pairwise(self._marks)
        ]


class Watch:
    """The most device memory in use while open, as the driver and torch's allocator see it."""

    def __init__(self, device: torch.device) -> None:
        """Takes ``device``; on the CPU nothing is watched."""
        self._device = device
        self._stop = threading.Event()
        self._least_free: int | None = None
        self._gaps_bytes: int | None = None

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            free = torch.cuda.mem_get_info(self._device)[0]
            known = self._least_free
            self._least_free = free if known is None else min(known, free)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Samples every two milliseconds; torch's own peaks begin anew."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        thread = threading.Thread(target=self._sample, name="bench-watch")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
        reserved = torch.cuda.max_memory_reserved(self._device)
        self._gaps_bytes = reserved - torch.cuda.max_memory_allocated(self._device)

    @property
    def gaps_bytes(self) -> int | None:
        """Bytes that torch's allocator had from the driver at the peak, and nobody from it."""
        return self._gaps_bytes

    @property
    def peak_bytes(self) -> int | None:
        """Bytes in use at the peak, of the whole device."""
        if self._least_free is None:
            return None
        return torch.cuda.mem_get_info(self._device)[1] - self._least_free


def used_bytes(device: torch.device) -> int | None:
    """Bytes of device memory in use now, of the whole device."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def link_rate(device: torch.device, paced: float | None, size: int = 1 << 28) -> float:
    """The measured rate of large page-locked copies to the device, bytes per second."""
    if device.type != "cuda":
        if paced is None:
            raise ValueError("the CPU's link needs a rate in bytes per second, found None")
        return paced
    probe = LinkProbe(device, size)
    rates = [probe.rate(8) for _ in range(6)]
    return float(statistics.median(rates[1:]))


class LinkProbe:
    """Page-locked memory and a place for it on the GPU; both stay allocated."""

    def __init__(self, device: torch.device, size: int = 1 << 28) -> None:
        """Allocates ``size`` bytes on either side."""
        self._source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._target = torch.empty(size, dtype=torch.uint8, device=device)

    def rate(self, copies: int) -> float:
        """Bytes per second of copies in a row; blocks until they have ended."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(copies):
            self._target.copy_(self._source, non_blocking=True)
        end.record()
        end.synchronize()
        return float(copies * self._source.numel() / (1e-3 * begin.elapsed_time(end)))


def allocator_counts(device: torch.device) -> dict[str, int]:
    """Allocations so far, and segments that torch asked the driver for."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    names = ("allocation.all.allocated", "segment.all.allocated", "num_alloc_retries")
    return {name: int(stats.get(name, 0)) for name in names}


def steady(
    step: Step, x: Tensor, c: Tensor, effort: Effort, rest: Callable[[], None] | None = None
) -> tuple[Timing, dict[str, float]]:
    """Times passes after warming up; besides, what torch's allocator did in each of them.

    Args:
        step: What is timed.
        x: Latents.
        c: Conditioning.
        effort: How many passes.
        rest: Has the device for itself before the first round, between two and after the last;
            a round begins with passes that are not timed. Without it there is one round.
    """
    warm = timed(step, x, c, effort.warm).median_s
    if rest is None:
        return _round(step, x, c, 0, effort.passes(warm))
    found = []
    for _ in range(effort.rounds):
        rest()
        found.append(_round(step, x, c, effort.passes_of_lead(warm), effort.passes_of_round(warm)))
    rest()
    timings = [timing for timing, _ in found]
    timing = Timing(
        [seconds for timing in timings for seconds in timing.passes],
        statistics.fmean(timing.enqueue_s for timing in timings),
        statistics.fmean(timing.host_cpu_s for timing in timings),
    )
    names = found[0][1]
    return timing, {name: statistics.fmean(counts[name] for _, counts in found) for name in names}


def _round(
    step: Step, x: Tensor, c: Tensor, first: int, passes: int
) -> tuple[Timing, dict[str, float]]:
    """Passes without a break of which the ``first`` are not timed; allocations of one of all.

    The first ones count as allocations go: they are as steady as the others, and to read the
    counts in between would hold the host up.
    """
    before = allocator_counts(x.device)
    timing = timed(step, x, c, first + passes)
    after = allocator_counts(x.device)
    counts = {name: (after[name] - before[name]) / (first + passes) for name in after}
    return Timing(timing.passes[first:], timing.enqueue_s, timing.host_cpu_s), counts

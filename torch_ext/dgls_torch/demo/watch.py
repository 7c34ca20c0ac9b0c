"""Watches a sampling loop: one progress bar a step, seconds a step, and the peak of memory."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_BAR_CELLS = 30
_REFRESH_S = 0.05


class Bar(Protocol):
    """Shows progress until it is closed."""

    def show(self, done: int) -> None:
        """Shows ``done`` of the total."""

    def close(self) -> None:
        """Leaves the final state on the screen."""


class PlainBar:
    """A bar on standard error; where that is no terminal, one line at the end."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        """Starts at 0 of ``total``; shows nothing yet."""
        self._label, self._total, self._unit = label, total, unit
        self._done, self._start, self._shown = 0, time.perf_counter(), 0.0
        self._live = sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Shows ``done`` of the total."""
        self._done = done
        now = time.perf_counter()
        if self._live and now - self._shown >= _REFRESH_S:
            self._shown = now
            self._write("\r")

    def close(self) -> None:
        """Leaves the final state on the screen."""
        self._write("\r" if self._live else "")
        print(file=sys.stderr, flush=True)

    def _write(self, lead: str) -> None:
        full = _BAR_CELLS * self._done // max(1, self._total)
        cells = "#" * full + "-" * (_BAR_CELLS - full)
        width = len(str(self._total))
        count = f"{self._done:>{width}}/{self._total} {self._unit}"
        seconds = time.perf_counter() - self._start
        line = f"{lead}  {self._label}  [{cells}]  {count}  {seconds:6.2f} s"
        print(line, end="", file=sys.stderr, flush=True)


class TqdmBar:
    """The same with tqdm, for those who have it."""

    def __init__(self, tqdm: Any, label: str, total: int, unit: str) -> None:
        """Starts at 0 of ``total`` and shows it; ``tqdm`` is the class."""
        self._bar = tqdm(
            total=total,
            bar_format="  {desc}  |{bar:30}|  {n_fmt}/{total_fmt} " + unit + "  {elapsed_s:6.2f} s",
            desc=label,
            leave=True,
        )

    def show(self, done: int) -> None:
        """Shows ``done`` of the total."""
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leaves the final state on the screen."""
        self._bar.close()


def make_bar(label: str, total: int, unit: str) -> Bar:
    """Makes a bar of ``total`` ``unit``: tqdm's on a terminal if it is installed, else our own."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return TqdmBar(tqdm, label, total, unit)
    return PlainBar(label, total, unit)


class MemoryGauge:
    """Measures a peak of memory: the device's allocations, or the process's own pages.

    The process's pages leave out mapped files: the kernel may drop those at any time. They are
    read at every block, since the kernel's own peak counts mapped files in.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts from the present state."""
        self._device = device
        self._peak_bytes: int | None = None
        if device.type == "cuda":
            torch.cuda.init()  # The statistics cannot be reset before.
            torch.cuda.reset_peak_memory_stats(device)
        self.sample()

    @property
    def peak_bytes(self) -> int | None:
        """The peak since the gauge was made; None where the system does not tell."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return self._peak_bytes

    def sample(self) -> None:
        """Takes the present state into account."""
        if self._device.type == "cuda":
            return
        own_bytes = _own_bytes()
        if own_bytes is not None:
            self._peak_bytes = max(own_bytes, self._peak_bytes or 0)


class Watch:
    """Follows one model's blocks through the steps of one loop."""

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device, steps: int) -> None:
        """Hooks the blocks; ``close`` takes the hooks off again."""
        self._device, self._steps = device, steps
        self._gauge = MemoryGauge(device)
        self._step_s: list[float] = []
        self._finished = 0
        self._events: list[torch.cuda.Event] = []
        self._bar: Bar | None = None
        blocks = list(blocks)
        self._count = len(blocks)
        self._hooks = [block.register_forward_hook(self._on_block) for block in blocks]

    def close(self) -> None:
        """Takes the hooks off the blocks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def peak_bytes(self) -> int | None:
        """Peak of memory since the watch began."""
        return self._gauge.peak_bytes

    @property
    def step_s(self) -> float:
        """Seconds a step: the mean, without the first step where there are more."""
        steady = self._step_s[1:] or self._step_s
        return sum(steady) / len(steady)

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """Shows one step's progress and take its time."""
        digits = len(str(self._steps))
        self._bar = make_bar(f"step {index + 1:>{digits}}/{self._steps}", self._count, "blocks")
        self._finished = 0
        start = time.perf_counter()
        try:
            yield
            self._drain()
            self._step_s.append(time.perf_counter() - start)
        finally:
            self._events.clear()
            self._bar.close()
            self._bar = None

    def _on_block(self, *_: object) -> None:
        self._gauge.sample()
        if self._device.type == "cuda":
            # The host runs ahead of the device: a block is done when the device has passed here.
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
            self._poll()
        else:
            self._show(self._finished + 1)

    def _poll(self) -> None:
        while self._finished < len(self._events) and self._events[self._finished].query():
            self._show(self._finished + 1)

    def _drain(self) -> None:
        """Waits for the device, showing its progress meanwhile."""
        if self._device.type != "cuda":
            return
        self._poll()
        while self._finished < len(self._events):
            time.sleep(0.002)
            self._poll()
        torch.cuda.synchronize(self._device)

    def _show(self, finished: int) -> None:
        self._finished = finished
        if self._bar is not None:
            self._bar.show(finished)


def settle(device: torch.device) -> None:
    """Gives unused memory back, so that one run's leavings do not count in the next run's peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return  # Only glibc has it.


def _own_bytes() -> int | None:
    """Reads the process's anonymous and shared pages (Linux); None elsewhere."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    try:
        return 1024 * sum(int(fields[key].split()[0]) for key in ("RssAnon", "RssShmem"))
    except KeyError:
        return None

"""Other readers on the link, so that a slower link is represented on a fast machine.

Copies do not serve: a copy engine that always has more queued on one stream keeps to that stream,
so on an H100 a model's copies were held up for minutes, and then the others'. A kernel that reads
page-locked memory shares the link itself, request by request: beside four of its programs, which
take four of 132 processors, copies ran at 26 to 27 of 55 GB/s. More of them take no more than
half, unless they take all processors; so a quarter of a link is not represented.

What is left for copies is no fixed rate, so it is measured under the same load, and so is compute.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_SOURCE = 1 << 24
_STEP = 1 << 14
_NUMBERS = 1 << 24
"""Of 4 bytes, for each launch: about 2 ms, for which one that waits for the device waits too."""
_QUEUED = 8
"""With two, on an H100, copies came to 31 GB/s in passes where they had 27 alone: the thread that
keeps the readers coming shares Python's lock with the model, and came too late."""


class _Reader:
    """A stream with kernels that read, and the thread that keeps them coming."""

    def __init__(self, device: torch.device, programs: int) -> None:
        """Compiles the kernel and starts."""
        from bench.reader_kernel import launch

        self._launch, self._programs = launch, programs
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._source = torch.zeros(_SOURCE, dtype=torch.int32, pin_memory=True)
        self._target = torch.empty(programs * _STEP, dtype=torch.int32, device=device)
        # Blocking events: a spinning wait would take a processor from the measured program.
        self._events = [torch.cuda.Event(blocking=True) for _ in range(_QUEUED)]
        self.start()

    def start(self) -> None:
        """Fills the queue and starts the thread; they were not running."""
        self._stop = threading.Event()
        for event in self._events:
            self._enqueue(event)
        self._thread = threading.Thread(target=self._work, name="bench-eater", daemon=True)
        self._thread.start()

    def _enqueue(self, event: torch.cuda.Event) -> None:
        with torch.cuda.stream(self._stream):
            self._launch(self._source, self._target, self._programs, _NUMBERS, _STEP)
        event.record(self._stream)

    def _work(self) -> None:
        while not self._stop.is_set():
            for event in self._events:
                event.synchronize()
                self._enqueue(event)

    def stop(self) -> None:
        """Blocks until nothing reads any more."""
        self._stop.set()
        self._thread.join()
        self._stream.synchronize()


class Load:
    """Readers that run, or none."""

    def __init__(self, reader: _Reader | None) -> None:
        """Takes what runs."""
        self._reader = reader

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Blocks until nothing reads, and has them read again at the end.

        Another process that takes its turn brings readers of its own: a GPU shares its time out
        between the kernels of two processes, so that these would take half of it.
        """
        if self._reader is None:
            yield
            return
        self._reader.stop()
        try:
            yield
        finally:
            self._reader.start()


@contextlib.contextmanager
def eating(device: torch.device, count: int) -> Iterator[Load]:
    """Runs ``count`` readers while open.

    Raises:
        ValueError: They need a CUDA device; the CPU's link is slowed down by its rate.
        ImportError: Triton, which comes with torch for CUDA, is not there.
    """
    if not count:
        yield Load(None)
        return
    if device.type != "cuda":
        raise ValueError(f"other readers need a CUDA device, found {device}")
    reader = _Reader(device, count)
    try:
        yield Load(reader)
    finally:
        reader.stop()

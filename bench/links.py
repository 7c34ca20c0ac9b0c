"""The link to a device, for engines written here: a queue of copies, and marks in both directions.

On CUDA that is a stream and events; on the CPU a thread whose copies are held to a rate, so that
the same engines run without a GPU.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Link(ABC):
    """Copies in order on a queue of their own; marks are made by `mark`."""

    device: torch.device

    @abstractmethod
    def mark(self) -> Any:
        """Makes a mark. A wait for one that was never recorded is no wait."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueues a copy; returns at once."""

    @abstractmethod
    def record_copies(self, mark: Any) -> None:
        """Sets the mark when the copies so far have ended."""

    @abstractmethod
    def record_compute(self, mark: Any) -> None:
        """Sets the mark when the computations so far have ended."""

    @abstractmethod
    def copies_wait(self, mark: Any) -> None:
        """Holds the copies that follow until the mark is set."""

    @abstractmethod
    def compute_waits(self, mark: Any) -> None:
        """Holds the computations that follow until the mark is set."""

    @abstractmethod
    def blocking_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies in order with the computations, from memory that is not page-locked."""

    @abstractmethod
    def host_buffer(self, size: int) -> torch.Tensor:
        """Host memory that is fast to copy from."""

    def close(self) -> None:  # noqa: B027 - nothing to do unless there is a thread
        """Ends what runs."""


class CudaLink(Link):
    """A stream and events."""

    def __init__(self, device: torch.device) -> None:
        """Makes the stream."""
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        """An event."""
        return torch.cuda.Event()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """A copy on the stream."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record_copies(self, mark: torch.cuda.Event) -> None:
        """On the copy stream."""
        mark.record(self._stream)

    def record_compute(self, mark: torch.cuda.Event) -> None:
        """On the current stream."""
        mark.record(torch.cuda.current_stream(self.device))

    def copies_wait(self, mark: torch.cuda.Event) -> None:
        """On the copy stream."""
        self._stream.wait_event(mark)

    def compute_waits(self, mark: torch.cuda.Event) -> None:
        """On the current stream."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def blocking_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """On the current stream; the driver stages it."""
        target.copy_(source)

    def host_buffer(self, size: int) -> torch.Tensor:
        """Page-locked."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class HostLink(Link):
    """A thread that copies at a rate; the calling thread is the device."""

    def __init__(self, bytes_per_s: float) -> None:
        """Starts the thread."""
        self.device = torch.device("cpu")
        self._rate = bytes_per_s
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="bench-link", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _paced(self, target: torch.Tensor, source: torch.Tensor) -> None:
        until = time.perf_counter() + source.numel() * source.element_size() / self._rate
        target.copy_(source)
        time.sleep(max(0.0, until - time.perf_counter()))

    def mark(self) -> threading.Event:
        """An event that is set."""
        event = threading.Event()
        event.set()
        return event

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """On the thread."""
        self._tasks.put(lambda: self._paced(target, source))

    def record_copies(self, mark: threading.Event) -> None:
        """By the thread."""
        mark.clear()
        self._tasks.put(mark.set)

    def record_compute(self, mark: threading.Event) -> None:
        """At once: what was computed so far has ended."""
        mark.set()

    def copies_wait(self, mark: threading.Event) -> None:
        """By the thread."""

        def wait() -> None:
            mark.wait()

        self._tasks.put(wait)

    def compute_waits(self, mark: threading.Event) -> None:
        """In the calling thread."""
        mark.wait()

    def blocking_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """In the calling thread, at the link's rate."""
        self._paced(target, source)

    def host_buffer(self, size: int) -> torch.Tensor:
        """Plain memory."""
        return torch.empty(size, dtype=torch.uint8)

    def close(self) -> None:
        """Ends the thread."""
        self._tasks.put(None)
        self._thread.join()


def open_link(device: torch.device, bytes_per_s: float | None) -> Link:
    """The link of a device; ``bytes_per_s`` is needed on the CPU."""
    if device.type == "cuda":
        return CudaLink(device)
    if bytes_per_s is None:
        raise ValueError("the CPU's link needs a rate in bytes per second, found None")
    return HostLink(bytes_per_s)

"""The driver's calls that streaming one block needs, whoever makes them.

A streamed block waits for its copy and marks its end. The copy is enqueued, waits for the block
whose memory it takes, and marks its own end. These are two marks, two waits and one copy at least,
and what they take, and what they make the launches that follow take, is no engine's to save.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_COPY_BYTES = 1 << 17
_NON_BLOCKING = 1
_DISABLE_TIMING = 2
_CALLS = 5


class NeededCalls:
    """The calls for one block, in the order in which an engine makes them after its forward."""

    def __init__(self, driver: Any, compute: int, target: int, source: int, *keep: object) -> None:
        """Makes two pairs of events and a stream for copies; a context is current.

        The stream is none of torch's: at the first of those torch makes a pool, which would hold
        device memory in the cells that follow.

        Args:
            driver: The driver's functions by name, such as a ``ctypes.PyDLL``.
            compute: The stream that blocks run on, a handle.
            target: The address of 128 KiB of device memory.
            source: The address of as much page-locked host memory.
            keep: What must live as long as this.

        Raises:
            RuntimeError: The driver refuses; the call and its status are named.
        """
        self._driver, self._keep = driver, keep
        self._compute, self._copies = ctypes.c_void_p(compute), ctypes.c_void_p()
        self._target, self._source = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._bytes, self._version = ctypes.c_size_t(_COPY_BYTES), ctypes.c_int()
        self._make("cuStreamCreate", self._copies, _NON_BLOCKING)
        self._events = [ctypes.c_void_p() for _ in range(4)]
        for event in self._events:
            self._make("cuEventCreate", event, _DISABLE_TIMING)
        self._done, self._done_before, self._ready, self._ready_before = self._events

    @staticmethod
    def of(device: torch.device) -> NeededCalls:
        """On a device's current stream; allocates both memories."""
        target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
        source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        return NeededCalls(
            ctypes.PyDLL("libcuda.so.1"),  # which keeps Python's lock, as the engine does
            torch.cuda.current_stream(device).cuda_stream,
            target.data_ptr(),
            source.data_ptr(),
            *(target, source),
        )

    def _make(self, function: str, handle: ctypes.c_void_p, flags: int) -> None:
        status = getattr(self._driver, function)(ctypes.byref(handle), flags)
        if status:
            raise RuntimeError(f"{function} failed with {status}")

    def close(self) -> None:
        """Gives events and stream back; what was enqueued ends by itself."""
        while self._events:
            self._driver.cuEventDestroy_v2(self._events.pop())
        if self._copies:
            self._driver.cuStreamDestroy_v2(self._copies)
            self._copies = ctypes.c_void_p()

    def make(self) -> None:
        """Makes them. Blocks for nothing on the device.

        Raises:
            RuntimeError: The driver refuses one; all statuses are named.
        """
        driver, copies, compute = self._driver, self._copies, self._compute
        statuses = (
            driver.cuEventRecord(self._done, compute),
            driver.cuStreamWaitEvent(copies, self._done_before, 0),
            driver.cuMemcpyHtoDAsync_v2(self._target, self._source, self._bytes, copies),
            driver.cuEventRecord(self._ready, copies),
            driver.cuStreamWaitEvent(compute, self._ready_before, 0),
        )
        if any(statuses):
            raise RuntimeError(f"the driver's calls failed with {statuses}")
        # What is waited for is of the block before, as where an engine copies ahead.
        self._done, self._done_before = self._done_before, self._done
        self._ready, self._ready_before = self._ready_before, self._ready

    def make_none(self) -> None:
        """As many calls that do nothing: what these take is Python's."""
        ask, version = self._driver.cuDriverGetVersion, ctypes.byref(self._version)
        for _ in range(_CALLS):
            ask(version)

"""What the driver's calls take that streaming one block needs, whoever makes them.

A streamed block waits for its copy and marks its end. The copy is enqueued, waits for the block
whose memory it takes, and marks its own end. These are two marks, two waits and one copy at least,
and what they take is no engine's to save. They are made here by a hook between the launches of two
blocks, where an engine would make them, with the caches as launches leave them.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from bench import measure, weights
from bench.host_time import NARROW, ROUNDS, tenth

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import nn

_COPY_BYTES = 1 << 17
_DISABLE_TIMING = 2
_CALLS = 5


class NeededCalls:
    """The calls for one block, in the order in which an engine makes them after its forward."""

    def __init__(
        self, driver: Any, compute: int, copies: int, target: int, source: int, *keep: object
    ) -> None:
        """Makes two pairs of events.

        Args:
            driver: The driver's functions by name, such as a ``ctypes.PyDLL``.
            compute: The stream that blocks run on, a handle.
            copies: The stream for copies, a handle.
            target: The address of 128 KiB of device memory.
            source: The address of as much page-locked host memory.
            keep: What must live as long as this.

        Raises:
            RuntimeError: The driver refuses; the call and its status are named.
        """
        self._driver, self._keep = driver, keep
        self._compute, self._copies = ctypes.c_void_p(compute), ctypes.c_void_p(copies)
        self._target, self._source = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._bytes, self._version = ctypes.c_size_t(_COPY_BYTES), ctypes.c_int()
        self._events = [self._event() for _ in range(4)]
        self._done, self._done_before, self._ready, self._ready_before = self._events

    @staticmethod
    def of(device: torch.device) -> NeededCalls:
        """On a device's current stream and a new one beside it; allocates both memories."""
        target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
        source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        copies = torch.cuda.Stream(device)
        return NeededCalls(
            ctypes.PyDLL("libcuda.so.1"),  # which keeps Python's lock, as the engine does
            torch.cuda.current_stream(device).cuda_stream,
            copies.cuda_stream,
            target.data_ptr(),
            source.data_ptr(),
            *(target, source, copies),
        )

    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        status = self._driver.cuEventCreate(ctypes.byref(event), _DISABLE_TIMING)
        if status:
            raise RuntimeError(f"cuEventCreate failed with {status}")
        return event

    def close(self) -> None:
        """Gives the events back."""
        while self._events:
            self._driver.cuEventDestroy_v2(self._events.pop())

    def make(self) -> float:
        """Makes them; seconds that they took. Blocks for nothing on the device.

        Raises:
            RuntimeError: The driver refuses one; all statuses are named.
        """
        driver, copies, compute = self._driver, self._copies, self._compute
        begun = time.perf_counter()
        statuses = (
            driver.cuEventRecord(self._done, compute),
            driver.cuStreamWaitEvent(copies, self._done_before, 0),
            driver.cuMemcpyHtoDAsync_v2(self._target, self._source, self._bytes, copies),
            driver.cuEventRecord(self._ready, copies),
            driver.cuStreamWaitEvent(compute, self._ready_before, 0),
        )
        spent = time.perf_counter() - begun
        if any(statuses):
            raise RuntimeError(f"the driver's calls failed with {statuses}")
        # What is waited for is of the block before, as where an engine copies ahead.
        self._done, self._done_before = self._done_before, self._done
        self._ready, self._ready_before = self._ready_before, self._ready
        return spent

    def make_none(self) -> float:
        """As many calls that do nothing; seconds that these took, which are Python's."""
        ask, version = self._driver.cuDriverGetVersion, ctypes.byref(self._version)
        begun = time.perf_counter()
        for _ in range(_CALLS):
            ask(version)
        return time.perf_counter() - begun


def driver_time(folder: Path, device: torch.device) -> dict[str, float]:
    """Seconds of these calls for one block of the stack that `bench.host_time` measures with."""
    path = weights.make(NARROW, folder, device)
    stack = weights.load(NARROW, path).to(device)
    x, c = NARROW.inputs(NARROW.least_tokens(), device)
    calls = NeededCalls.of(device)
    try:
        found = needed_s(calls, stack.order, lambda: measure.timed(stack, x, c, 1), ROUNDS)
    finally:
        measure.wait(device)
        calls.close()
        weights.remove(NARROW, folder)
    return {"driver_s": found}


def needed_s(
    calls: NeededCalls, blocks: Sequence[nn.Module], run: Callable[[], object], rounds: int
) -> float:
    """Seconds of the driver's calls for one block, Python's part taken off; the mean over blocks.

    Passes with the calls and passes with as many that do nothing take turns, ``rounds`` of each,
    and of each block the fastest tenth is taken.
    """
    seconds: dict[Callable[[], float], list[list[float]]] = {
        make: [[] for _ in blocks] for make in (calls.make, calls.make_none)
    }
    for _ in range(rounds):
        for make, of_blocks in seconds.items():
            handles = [
                block.register_forward_hook(_taking(make, found))
                for block, found in zip(blocks, of_blocks, strict=True)
            ]
            try:
                run()
            finally:
                for handle in handles:
                    handle.remove()
    with_calls, without = (
        statistics.mean(tenth(found) for found in of_blocks) for of_blocks in seconds.values()
    )
    return max(0.0, with_calls - without)


def _taking(make: Callable[[], float], found: list[float]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        found.append(make())

    return hook

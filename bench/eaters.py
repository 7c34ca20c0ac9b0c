"""Other processes that copy, so that a slower link is represented on a fast machine.

A GPU's copy engine keeps to a stream of a process that has more queued, so other streams of the
same process are no load: on an H100 a model's copies were held up for minutes, and then the
others'. Between processes it shares its time out, in slices of about a millisecond: beside one,
two, three and four others that always have copies queued, copies on an H200 ran at 28.0, 18.7, 14.1
and 11.3 of 55.2 GB/s, and products of matrices took as long as ever.

The rate is measured under the same load, and so is compute.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

_BYTES = 64 << 20
"""Of a copy: longer than a slice of time. Of 2 MiB, others got more than their share."""
_QUEUED = 4
_READY_S = 60.0

Work = Callable[[int, Callable[[], None]], None]
"""Copies to the device of that number for ever, and calls what it is given once it does."""


def _copy(ordinal: int, ready: Callable[[], None]) -> None:
    device = torch.device("cuda", ordinal)
    source = torch.empty(_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    # Blocking events: a spinning wait would take a processor from the measured program.
    events = [torch.cuda.Event(blocking=True) for _ in range(_QUEUED)]
    with torch.cuda.stream(torch.cuda.Stream(device)):
        while True:
            for event in events:
                event.synchronize()
                target.copy_(source, non_blocking=True)
                event.record()
            ready()


def _end_with_parent() -> None:
    """Ends the process when its parent has ended, killed or not."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def _main(work: Work, ordinal: int, said: Connection) -> None:
    threading.Thread(target=_end_with_parent, name="bench-parent", daemon=True).start()
    is_ready = False

    def ready() -> None:
        nonlocal is_ready
        if not is_ready:
            is_ready = True
            said.send(None)

    work(ordinal, ready)


class Load:
    """Processes that copy, or none."""

    def __init__(self, ordinal: int, count: int, work: Work) -> None:
        """Starts ``count`` of them; blocks until all copy.

        Raises:
            RuntimeError: One ended, or was not ready in time; none is left then.
        """
        self._processes: list[SpawnProcess] = []
        context = multiprocessing.get_context("spawn")
        heard = []
        try:
            for _ in range(count):
                hear, say = context.Pipe(duplex=False)
                process = context.Process(target=_main, args=(work, ordinal, say), daemon=True)
                process.start()
                say.close()
                self._processes.append(process)
                heard.append(hear)
            for process, hear in zip(self._processes, heard, strict=True):
                self._hear(process, hear)
        except BaseException:
            self.close()
            raise

    def _hear(self, process: SpawnProcess, hear: Connection) -> None:
        if not hear.poll(_READY_S):
            raise RuntimeError(f"a process that copies was not ready in {_READY_S:.0f} s")
        try:
            hear.recv()
        except EOFError:
            process.join()
            self.check()
        finally:
            hear.close()

    def check(self) -> None:
        """Makes sure that all still copy; does not block.

        Raises:
            RuntimeError: One has ended, and its status.
        """
        for process in self._processes:
            if process.exitcode is not None:
                raise RuntimeError(f"a process that copies ended with status {process.exitcode}")

    def close(self) -> None:
        """Kills them; blocks until they have ended."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


@contextlib.contextmanager
def eating(device: torch.device, count: int, work: Work = _copy) -> Iterator[Load]:
    """Has ``count`` other processes copy to ``device`` while open.

    Raises:
        ValueError: They need a CUDA device; the CPU's link is slowed down by its rate.
        RuntimeError: One ended, or was not ready in time.
    """
    if count and device.type != "cuda":
        raise ValueError(f"other processes that copy need a CUDA device, found {device}")
    load = Load(device.index or 0, count, work)
    try:
        yield load
    finally:
        load.close()

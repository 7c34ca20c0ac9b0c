"""Other copies on the link, so that a slower link is represented on a fast machine.

Each eater is a stream that always has copies queued. What is left for others is no fixed rate, so
it is measured under the same load. On an H100 that failed with copies of 64 MiB: copies of 256 MiB
kept the whole rate beside them, and a model's were held up for minutes. They are as large as a
model's now, and a run that they take nothing from is refused; neither was tried on a GPU yet.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 8 << 20
_QUEUED = 3


def _eat(device: torch.device, stop: threading.Event, ready: threading.Barrier) -> None:
    stream = torch.cuda.Stream(device)
    source = torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_CHUNK, dtype=torch.uint8, device=device)
    # Blocking events: a spinning wait would take a processor from the measured program.
    events = [torch.cuda.Event(blocking=True) for _ in range(_QUEUED)]
    turn = 0
    while not stop.is_set():
        event = events[turn % _QUEUED]
        event.synchronize()
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        event.record(stream)
        if turn == _QUEUED:
            ready.wait()
        turn += 1
    stream.synchronize()


@contextlib.contextmanager
def eating(device: torch.device, count: int) -> Iterator[None]:
    """Runs ``count`` eaters while open.

    Raises:
        ValueError: Eaters need a CUDA device; the CPU's link is slowed down by its rate.
    """
    if count and device.type != "cuda":
        raise ValueError(f"other copies need a CUDA device, found {device}")
    stop, ready = threading.Event(), threading.Barrier(count + 1)
    threads = [
        threading.Thread(target=_eat, args=(device, stop, ready), name="bench-eater", daemon=True)
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    if count:
        ready.wait(timeout=60)
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()

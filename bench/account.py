"""Where the time of a pass went, from a profile: parts that add up to the whole.

A pass is what happens on the stream that computes, from one mark to the next; the mark is a kernel
that does nothing. Every nanosecond of a pass belongs to one part:

    compute        a kernel runs
    copy_inline    a copy to the device runs on that stream itself
    launch         nothing runs, and the host has not launched the next kernel yet
    exposed_copy   nothing runs although the next kernel was launched: it waits for another stream
    device         the same, but for less than `_GAP_NS`: what the device takes between kernels
"""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_GAP_NS = 10_000.0
MARK = "spin_kernel"
"""In the name of the kernel that `torch.cuda._sleep` launches: it begins a pass."""
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass
class Account:
    """Seconds of one pass, by part."""

    compute: float = 0.0
    copy_inline: float = 0.0
    launch: float = 0.0
    exposed_copy: float = 0.0
    device: float = 0.0
    kernels: int = 0
    hooks: float | None = None
    """Of the host in hooks around blocks; no part of the sum, since the host runs ahead."""

    @property
    def total(self) -> float:
        """The sum of the parts, seconds."""
        return self.compute + self.copy_inline + self.launch + self.exposed_copy + self.device

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, with the sum."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class _Work:
    start: float
    end: float
    launched: float
    is_copy: bool


def _stream_of_compute(events: list[dict[str, Any]]) -> Any:
    """The one with the marks; others may be busier, with what only eats the link's bandwidth."""
    for event in events:
        if event.get("cat") == "kernel" and MARK in event["name"]:
            return event["args"].get("stream")
    raise ValueError("the profile needs marks, found none: is this a GPU's?")


def _passes(events: list[dict[str, Any]]) -> list[list[_Work]]:
    """What ran on the stream that computes, cut at the marks, each of which begins a pass; ns."""
    stream = _stream_of_compute(events)
    launches = {
        event["args"]["correlation"]: 1e3 * (event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    passes: list[list[_Work]] = []
    on_stream = (
        event
        for event in events
        if event.get("cat") in _ON_DEVICE and event["args"].get("stream") == stream
    )
    for event in sorted(on_stream, key=lambda event: float(event["ts"])):
        start, end = 1e3 * event["ts"], 1e3 * (event["ts"] + event["dur"])
        launched = launches.get(event["args"].get("correlation"), start)
        if MARK in event["name"]:
            passes.append([])
        if passes:
            is_copy = event["cat"] == "gpu_memcpy" and "HtoD" in event["name"]
            passes[-1].append(_Work(start, end, launched, is_copy))
    return passes


def _one(works: list[_Work]) -> Account:
    """The parts of the pass that these works make, up to the end of the last; in ns."""
    found = Account(kernels=len(works))
    now = works[0].start
    for work in works:
        _gap(found, now, work)
        length = max(0.0, work.end - max(now, work.start))
        if work.is_copy:
            found.copy_inline += length
        else:
            found.compute += length
        now = max(now, work.end)
    return found


def _gap(found: Account, now: float, work: _Work) -> None:
    if work.start <= now:
        return
    late = min(max(work.launched, now), work.start)
    found.launch += late - now
    rest = work.start - late
    if rest >= _GAP_NS:
        found.exposed_copy += rest
    else:
        found.device += rest


def from_trace(events: list[dict[str, Any]]) -> Account:
    """The mean of all whole passes of a profile but the first; what follows the last mark is none.

    The first pass begins on a device at rest, with what was copied ahead meanwhile.

    Raises:
        ValueError: There are fewer than three marks.
    """
    passes = _passes(events)
    if not any(event.get("cat") in _LAUNCHES for event in events):
        raise ValueError("the profile needs calls into CUDA, found none")
    if len(passes) < 3:
        raise ValueError(f"the profile needs three marks, found {len(passes)}")
    total = Account()
    count = len(passes) - 2
    for works, following in itertools.pairwise(passes[1:]):
        part = _one(works)
        _gap(part, max(work.end for work in works), following[0])
        for name in ("compute", "copy_inline", "launch", "exposed_copy", "device"):
            setattr(total, name, getattr(total, name) + 1e-9 * getattr(part, name) / count)
        total.kernels += part.kernels
    total.kernels //= count
    return total


def profile(run_pass: Callable[[], object], passes: int = 3) -> tuple[Account, float]:
    """Profiles ``passes`` passes on the GPU that are enqueued without a break.

    Only what the device does and the calls into CUDA are recorded: to record torch's own functions
    too would slow the host down, and with it what is measured. Even so the host is slower.

    Returns:
        The account, and the seconds of a pass by events around the same passes.
    """
    activity = torch.profiler.ProfilerActivity
    try:
        events, seconds = _trace(run_pass, passes, [activity.CUDA])
        return from_trace(events), seconds
    except ValueError:  # a profiler that records calls only together with torch's functions
        events, seconds = _trace(run_pass, passes, [activity.CPU, activity.CUDA])
        return from_trace(events), seconds


def _trace(
    run_pass: Callable[[], object], passes: int, activities: list[Any]
) -> tuple[list[dict[str, Any]], float]:
    times = [torch.cuda.Event(enable_timing=True) for _ in range(passes + 1)]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for time in times:
            torch.cuda._sleep(1)
            time.record()
            if time is not times[-1]:
                run_pass()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events, 1e-3 * times[1].elapsed_time(times[-1]) / (passes - 1)

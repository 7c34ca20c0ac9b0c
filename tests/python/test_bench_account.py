"""Where the time of a pass went, from profiles made by hand.

Goal: every nanosecond belongs to one part, and to the right one.
Method: traces of a few kernels in the form that torch's profiler writes.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import bench_path
import pytest

bench_path.put_on_path()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from bench.account import MARK, from_trace  # noqa: E402
from bench.driver_calls import _base, split, without_changes  # noqa: E402
from bench.hook_clock import HookClock  # noqa: E402
from bench.host_time import Span, Ticks, added_host_time  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Trace:
    """Writes events; times in microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._number = 0

    def work(
        self,
        launched: float,
        start: float,
        end: float,
        cat: str = "kernel",
        stream: int = 7,
        name: str = "gemm",
    ) -> None:
        self._number += 1
        name = "Memcpy HtoD (Pinned -> Device)" if cat == "gpu_memcpy" else name
        link = {"correlation": self._number}
        call = {"ts": launched - 1, "dur": 1, "args": dict(link)}
        self.events.append({"cat": "cuda_runtime"} | call)
        arguments = link | {"stream": stream}
        row = {"cat": cat, "name": name, "ts": start, "dur": end - start, "args": arguments}
        self.events.append(row)

    def mark(self, launched: float, start: float, end: float) -> None:
        self.work(launched, start, end, name=f"at::cuda::(anonymous namespace)::{MARK}(long)")


def two_passes(*works: tuple[float, float, float, str], until: float = 1100) -> Trace:
    """A pass of 1000 us with these works after a mark, and the next pass's mark."""
    trace = Trace()
    trace.work(5, 20, 30)  # before the first mark
    trace.mark(6, 40, 60)  # the first pass, which is left out
    trace.mark(10, 100, 200)
    for launched, start, end, cat in works:
        trace.work(launched, start, end, cat)
    trace.mark(950, until, until + 100)
    trace.work(960, until + 100, until + 900)  # after the last
    return trace


def parts(trace: Trace) -> dict[str, float]:
    value = from_trace(trace.events).to_json()
    names = ("compute", "copy_inline", "launch", "exposed_copy", "device", "total")
    return {name: round(1e6 * value[name], 3) for name in names}


def test_a_wait_for_another_stream_is_an_exposed_copy() -> None:
    found = parts(two_passes((20, 500, 1100, "kernel")))
    assert found["exposed_copy"] == 300
    assert found["compute"] == 700
    assert found["launch"] == 0


def test_a_kernel_that_is_launched_late_is_a_launch_gap() -> None:
    found = parts(two_passes((700, 705, 1100, "kernel")))
    assert found["launch"] == 500
    assert found["device"] == 5
    assert found["exposed_copy"] == 0


def test_a_late_launch_and_a_wait_share_one_gap() -> None:
    found = parts(two_passes((400, 500, 1100, "kernel")))
    assert (found["launch"], found["exposed_copy"]) == (200, 100)


def test_a_copy_on_the_stream_that_computes_is_no_compute() -> None:
    found = parts(two_passes((20, 200, 1100, "gpu_memcpy")))
    assert (found["copy_inline"], found["compute"]) == (900, 100)


def test_copies_of_other_streams_are_no_part() -> None:
    trace = two_passes((20, 200, 1100, "kernel"))
    before = parts(trace)
    trace.work(20, 150, 900, "gpu_memcpy", stream=20)
    trace.work(20, 0, 5000, stream=21)  # busier than the one that computes
    assert parts(trace) == before


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_add_up_to_the_pass(seed: int) -> None:
    import random

    chance = random.Random(seed)
    now, works = 200.0, []
    while now < 1000:
        start = now + chance.choice([0, 2, 30])
        end = start + chance.uniform(1, 40)
        works.append((max(11.0, start - chance.uniform(1, 200)), start, end, "kernel"))
        now = end
    found = parts(two_passes(*works, until=now + 3))
    assert found["total"] == pytest.approx(now + 3 - 100, abs=1e-2)


def test_a_profile_without_passes_is_refused() -> None:
    trace = Trace()
    trace.mark(10, 100, 200)
    trace.mark(20, 300, 400)
    with pytest.raises(ValueError, match="needs three marks, found 2"):
        from_trace(trace.events)
    with pytest.raises(ValueError, match="needs marks"):
        from_trace([])


def test_driver_calls_are_told_apart() -> None:
    counts = Counter({"cuStreamSynchronize": 2, "cuMemAlloc": 3, "cuMemHostRegister": 1})
    assert split(counts) == (2, 4)
    assert _base("cuMemAlloc_v2") == "cuMemAlloc"
    assert _base("cuStreamSynchronize_ptsz") == "cuStreamSynchronize"


@pytest.mark.parametrize(
    ("seen", "plans", "expected"),
    [
        ([0], [7], (0, 1)),  # nothing was asked
        ([2, 0, 0], [7, 8, 8], (0, 2)),  # for a plan that was taken up within the passes
        ([2, 1, 0], [7, 8, 8], (0, 2)),  # ... or in those that follow
        ([2, 0], [7, 7], (2, 1)),  # for no plan: it counts
        ([2] * 8, [1, 2, 2, 3, 3, 4, 4, 5], (2, 4)),  # plans without end
    ],
)
def test_calls_for_a_plan_that_is_taken_up_are_not_those_of_steady_passes(
    seen: list[int], plans: list[int], expected: tuple[int, int]
) -> None:
    windows, known = iter(seen), iter(plans)

    def watch() -> dict[str, Any]:
        count = next(windows)
        return {"calls": {"cuMemHostRegister": count} if count else {}, "allocating": count}

    found = without_changes(watch, lambda: next(known))
    assert (found["allocating"], found["watches"]) == expected


def test_the_clock_around_blocks_adds_up_and_goes_away() -> None:
    block = nn.Identity()
    clock = HookClock([block])
    for _ in range(4):
        block(1)
    account = clock.account(2, spent_s=1.0)
    assert account.total == pytest.approx(0.5)
    assert account.kernels == 2
    assert account.hooks is not None
    assert 0 <= account.hooks < 0.5
    clock.close()
    assert not block._forward_hooks
    assert not block._forward_pre_hooks


def test_the_hosts_time_is_taken_of_both_kinds_of_blocks(tmp_path: Path) -> None:
    found = added_host_time(tmp_path, torch.device("cpu"), 2e9)
    kinds = ("double", "single")
    of_kinds = {f"{kind}_{what}_s" for kind in kinds for what in ("call", "bare")}
    assert set(found) == {"call_s", "hooks_s", "idle_hooks_s"} | of_kinds
    assert found["hooks_s"] > 0
    assert found["idle_hooks_s"] < found["call_s"]
    assert found["double_bare_s"] > 0
    added = sorted(found[f"{kind}_call_s"] for kind in kinds)
    assert added[0] < found["call_s"] < added[1]
    assert not list(tmp_path.iterdir())


def test_a_span_reaches_from_before_the_hooks_to_after_them() -> None:
    first, last = nn.Identity(), nn.Identity()
    first.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    last.register_forward_hook(lambda *_: time.sleep(0.01))
    span = Span(first, last)
    last(first(1))
    assert span.close()[0] >= 0.02
    assert not first._forward_hooks


def test_ticks_count_what_is_between_them_before_and_after_the_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]

    def takes(seconds: float) -> Callable[..., None]:
        def pass_by(*_: object) -> None:
            now[0] += seconds

        return pass_by

    class Slow(nn.Module):
        def forward(self, x: int) -> int:
            now[0] += 100.0
            return x

    block = Slow()
    block.register_forward_pre_hook(takes(1.0))
    block.register_forward_hook(takes(10.0))
    monkeypatch.setattr("bench.host_time.time.perf_counter", lambda: now[0])
    ticks = Ticks(block)
    block(1)
    block(1)
    assert ticks.close() == [11.0, 11.0]
    assert len(block._forward_pre_hooks) == len(block._forward_hooks) == 1

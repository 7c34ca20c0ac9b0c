"""The driver's calls that no engine streams without: which they are, and what of them is counted.

Goal: the part of the host's time that `bench run` calls nobody's to save is of the right calls.
Method: a driver that writes down what it is asked, the fake driver, and a stack whose calls are
counted.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import bench_path
import pytest
import torch
from bench_results import first, good

from bench import host_time
from bench.needed_calls import NeededCalls
from bench.page import text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

assert bench_path.ROOT.is_dir()
COMPUTE, COPIES = 7, 8


class Noting:
    """A driver whose events have numbers and whose calls succeed, but for one."""

    def __init__(self, refused: str = "") -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.events: list[int] = []
        self._refused = refused

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.seen.append((name, *(getattr(each, "value", each) for each in arguments)))
            return 700 if name == self._refused else 0

        return call

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        assert flags == 1
        stream._obj.value = COPIES
        return 702 if self._refused == "cuStreamCreate" else 0

    def cuEventCreate(self, event: Any, flags: int) -> int:
        assert flags == 2
        self.events.append(len(self.events) + 1)
        event._obj.value = self.events[-1]
        return 701 if self._refused == "cuEventCreate" else 0


def noted(driver: Noting) -> NeededCalls:
    return NeededCalls(driver, COMPUTE, 0x1000, 0x2000)


def of_a_block(done: int, done_before: int, ready: int, ready_before: int) -> list[Any]:
    return [
        ("cuEventRecord", done, COMPUTE),
        ("cuStreamWaitEvent", COPIES, done_before, 0),
        ("cuMemcpyHtoDAsync_v2", 0x1000, 0x2000, 1 << 17, COPIES),
        ("cuEventRecord", ready, COPIES),
        ("cuStreamWaitEvent", COMPUTE, ready_before, 0),
    ]


def test_a_block_marks_and_waits_twice_and_copies_once() -> None:
    driver = Noting()
    calls = noted(driver)
    one, other, third, fourth = driver.events
    for _ in range(3):
        calls.make()
    # what is waited for is what was marked at the block before
    at_first, then = of_a_block(one, other, third, fourth), of_a_block(other, one, fourth, third)
    assert driver.seen == at_first + then + at_first
    driver.seen.clear()
    calls.close()
    calls.close()
    gone = [("cuEventDestroy_v2", event) for event in driver.events]
    assert sorted(driver.seen) == [*gone, ("cuStreamDestroy_v2", COPIES)]


def test_as_many_calls_do_nothing() -> None:
    driver = Noting()
    noted(driver).make_none()
    assert [name for name, *_ in driver.seen] == ["cuDriverGetVersion"] * 5


def test_a_refusal_is_told() -> None:
    with pytest.raises(RuntimeError, match="cuStreamCreate failed with 702"):
        noted(Noting("cuStreamCreate"))
    with pytest.raises(RuntimeError, match="cuEventCreate failed with 701"):
        noted(Noting("cuEventCreate"))
    with pytest.raises(RuntimeError, match=r"\(0, 0, 700, 0, 0\)"):
        noted(Noting("cuMemcpyHtoDAsync_v2")).make()


@pytest.fixture
def fake(fake_driver: Path) -> Iterator[Any]:
    driver = ctypes.PyDLL(str(fake_driver))
    context = ctypes.c_void_p()
    assert driver.cuInit(0) == 0
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert driver.cuCtxSetCurrent(context) == 0
    yield driver
    assert driver.cuCtxSetCurrent(None) == 0
    assert driver.cuDevicePrimaryCtxRelease_v2(0) == 0


def left(fake: Any, what: bytes) -> int:
    found = ctypes.c_int64(-1)
    assert fake.fakecuda_get(what, ctypes.byref(found)) == 0
    return found.value


def test_a_driver_takes_them_and_copies(fake: Any) -> None:
    stream, target, source = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_void_p()
    assert fake.cuStreamCreate(ctypes.byref(stream), 1) == 0
    size = ctypes.c_size_t(1 << 17)
    assert fake.cuMemAlloc_v2(ctypes.byref(target), size) == 0
    assert fake.cuMemHostAlloc(ctypes.byref(source), size, 0) == 0
    assert source.value is not None
    ctypes.memset(source.value, 5, size.value)
    found = (ctypes.c_uint8 * size.value)()
    calls = NeededCalls(fake, stream.value or 0, target.value, source.value)
    for _ in range(3):
        calls.make()
        calls.make_none()
    assert fake.cuCtxSynchronize() == 0
    assert fake.cuMemcpyDtoHAsync_v2(found, target, size, stream) == 0
    assert fake.cuStreamSynchronize(stream) == 0
    calls.close()
    assert set(found) == {5}
    assert left(fake, b"events") == 0
    assert left(fake, b"streams") == 1
    assert fake.cuMemFree_v2(target) == 0
    assert fake.cuMemFreeHost(source) == 0
    assert fake.cuStreamDestroy_v2(stream) == 0


class Taking:
    """Calls that take a set time by their own clock, which nothing else moves."""

    def __init__(self) -> None:
        self.now, self.made, self.made_none = 0.0, 0, 0

    def perf_counter(self) -> float:
        return self.now

    def make(self) -> None:
        self.made += 1
        self.now += 7.0

    def make_none(self) -> None:
        self.made_none += 1
        self.now += 2.0


def test_only_what_the_driver_takes_is_counted_once_for_each_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Any = Taking()
    monkeypatch.setattr(host_time, "time", calls)
    monkeypatch.setattr(host_time, "_ROUNDS", 13)
    found = host_time.added_host_time(tmp_path, torch.device("cpu"), 2e9, calls)
    assert found.pop("needed_s") == 7.0 - 2.0
    assert set(found.values()) == {0.0}
    blocks = len(host_time.NARROW.build().order)
    assert (calls.made, calls.made_none) == (13 * blocks, 13 * blocks)


def test_the_page_tells_it_where_it_was_measured() -> None:
    results = good()
    assert "| alone | host CPU ms |" in text([results], "x.svg")
    hooks = {"call_s": 60e-6, "hooks_s": 30e-6, "idle_hooks_s": 9e-6}
    first(results)["hooks"] = hooks
    assert "| hooks us | alone | idle | host CPU ms |" in text([results], "x.svg")
    hooks["needed_s"] = 20.1e-6
    page = text([results], "x.svg")
    assert "| hooks us | alone | idle | needed | host CPU ms |" in page
    assert "| 30.0 | 9.0 | 20.1 |" in page

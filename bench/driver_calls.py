"""Counts what a program asks of the CUDA driver that it must not ask in a steady pass.

Uses CUPTI's callbacks, so that calls from any language count. Only the named calls are watched:
a steady pass makes none of them, so watching costs nothing. There is one subscriber to CUPTI in a
process: this must not be open while torch's profiler is.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SYNCHRONISING = ("cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize")
ALLOCATING = (
    "cuMemAlloc",
    "cuMemFree",
    "cuMemAllocAsync",
    "cuMemFreeAsync",
    "cuMemHostAlloc",
    "cuMemAllocHost",
    "cuMemFreeHost",
    "cuMemHostRegister",
    "cuMemHostUnregister",
    "cuMemCreate",
    "cuMemMap",
    "cuMemUnmap",
)
_DRIVER_DOMAIN = 1
_ENTER = 0
_MOST_IDS = 1200
_TRIES = 4


class _CallbackData(ctypes.Structure):
    """The start of CUpti_CallbackData: site, and the function's name further on."""

    _fields_ = (
        ("site", ctypes.c_int),
        ("name", ctypes.c_char_p),
    )


_Callback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.POINTER(_CallbackData)
)


def _library() -> ctypes.CDLL:
    site = os.path.dirname(os.path.dirname(torch.__file__))
    beside = glob.glob(os.path.join(site, "nvidia", "*", "lib", "libcupti.so*"))
    for name in ("libcupti.so.13", "libcupti.so.12", "libcupti.so", *sorted(beside)):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError("libcupti was not found beside torch or by the loader")


def _base(name: str) -> str:
    """A call's name without what marks its version or stream: ``cuMemAlloc_v2`` is cuMemAlloc."""
    return name.removesuffix("_ptsz").split("_v")[0]


class DriverCalls:
    """Counts by name, filled while `watching`."""

    def __init__(self) -> None:
        """Loads CUPTI and finds the numbers of the watched calls.

        Raises:
            OSError: There is no CUPTI.
            RuntimeError: CUPTI refuses, or knows none of the calls.
        """
        self.counts: Counter[str] = Counter()
        self._cupti = _library()
        self._names = self._numbers()
        self._callback = _Callback(self._count)

    def _numbers(self) -> dict[int, str]:
        wanted = {*SYNCHRONISING, *ALLOCATING}
        found: dict[int, str] = {}
        for number in range(1, _MOST_IDS):
            text = ctypes.c_char_p()
            status = self._cupti.cuptiGetCallbackName(_DRIVER_DOMAIN, number, ctypes.byref(text))
            if status == 0 and text.value:
                name = _base(text.value.decode())
                if name in wanted:
                    found[number] = name
        if not {"cuCtxSynchronize", "cuStreamSynchronize"} <= set(found.values()):
            raise RuntimeError(f"CUPTI knows {sorted(set(found.values()))} only")
        return found

    def _count(self, _: Any, domain: int, number: int, data: Any) -> None:
        if domain == _DRIVER_DOMAIN and data.contents.site == _ENTER:
            self.counts[self._names.get(number, str(number))] += 1

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cupti, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} failed with {status}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[Counter[str]]:
        """Counts while open."""
        self.counts.clear()
        subscriber = ctypes.c_void_p()
        self._call("cuptiSubscribe", ctypes.byref(subscriber), self._callback, None)
        try:
            for number in self._names:
                self._call("cuptiEnableCallback", 1, subscriber, _DRIVER_DOMAIN, number)
            yield self.counts
        finally:
            self._call("cuptiUnsubscribe", subscriber)


def split(counts: Counter[str]) -> tuple[int, int]:
    """The synchronising and the allocating calls."""
    return (
        sum(counts[name] for name in SYNCHRONISING),
        sum(counts[name] for name in ALLOCATING),
    )


def without_changes(
    watch: Callable[[], dict[str, Any]], changes: Callable[[], int]
) -> dict[str, Any]:
    """What ``watch`` finds while no plan is taken up: a change of plan waits and page-locks once.

    Locks come passes ahead of the change that they are for, so a window in which calls were seen is
    followed by another, and is watched anew where ``changes`` has grown by its end; four times at
    most. `watches` is how often. Calls that no change explains are returned.
    """
    watches = 0
    while watches < _TRIES:
        watches += 1
        before = changes()
        found = watch()
        if not found["calls"]:
            break
        watch()
        if changes() == before:
            break
    return found | {"watches": watches}

"""Watches the host's memory, and has streams give some back before the system runs out of it."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from typing import TYPE_CHECKING

from dgls_torch.cgroup import read_number, read_text
from dgls_torch.memory import HostMemory, host_memory
from dgls_torch.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_LOOK_S = 1.0
# Share of time in which all that could run waited for memory, over ten seconds, in percent.
_PRESSED = 10.0
_FULL = re.compile(r"^full avg10=([0-9.]+)", re.MULTILINE)


def pressure(root: Path) -> float | None:
    """How long everything waited for memory of late, in percent (PSI); ``None`` if unknown."""
    found = _FULL.search(read_text(root / "proc/pressure/memory"))
    return float(found[1]) if found else None


def floor_bytes(host: HostMemory) -> int:
    """What is to stay available: 1/16 of the memory; of less than 8 GiB 512 MiB, at most 1/8."""
    whole = min(host.physical_bytes, host.cgroup_limit_bytes or host.physical_bytes)
    return max(whole // 16, min(512 * MIB, whole // 8))


class Guard:
    """Looks at the memory once a second in a thread of its own, and asks for what lacks.

    It asks again only while that helps or the shortage grows: giving page-locks up only lets the
    system swap, and where it cannot, the rest is better kept.
    """

    def __init__(
        self,
        give_back: Callable[[int], None],
        look: Callable[[], tuple[HostMemory, float | None]] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            give_back: Told how many bytes lack.
            look: Reads the memory and the pressure; the system's, if not given.
        """
        self._give_back = give_back
        self._look = look or look_at_system
        self._asked_at: int | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name="dgls-guard", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread. Does nothing twice."""
        self._stopped.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5.0)

    def check(self) -> int:
        """One look: asks for what lacks, and returns how much that was."""
        host, pressed = self._look()
        available, floor = host.available_bytes, floor_bytes(host)
        lacking = max(0, floor + floor // 2 - available) if available < floor else 0
        if pressed is not None and pressed >= _PRESSED and available < 2 * floor:
            lacking = max(lacking, floor // 2)
        if not lacking:
            self._asked_at = None
            return 0
        before, self._asked_at = self._asked_at, available
        useless = before is not None and before - MIB <= available < before + floor // 8
        if useless:
            self._asked_at = before
            return 0
        self._give_back(lacking)
        return lacking

    def _run(self) -> None:
        # An engine that is gone, or a system that tells nothing, ends it.
        with contextlib.suppress(OSError, RuntimeError):
            while not self._stopped.wait(_interval_s()):
                self.check()


def look_at_system() -> tuple[HostMemory, float | None]:
    """The host's memory and the pressure on it; for tests, with another figure of what is left."""
    from pathlib import Path

    host = host_memory()
    available = read_number(os.environ.get("DGLS_TEST_AVAILABLE"))
    if available is not None:
        import dataclasses

        host = dataclasses.replace(host, available_bytes=available)
    return host, pressure(Path("/"))


def _interval_s() -> float:
    return float(os.environ.get("DGLS_TEST_GUARD_S", _LOOK_S))

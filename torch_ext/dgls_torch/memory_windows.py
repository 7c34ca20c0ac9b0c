"""Decides the host's memory on Windows, where promised memory counts as well as RAM.

Kept apart because it runs nowhere else: our tests give it a stand-in for kernel32, and nothing of
ours has run it on Windows. The structure is the API's MEMORYSTATUSEX.
"""

from __future__ import annotations

import ctypes
import sys

from dgls_torch.memory import HostMemory


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("physical", ctypes.c_uint64),
        ("physical_available", ctypes.c_uint64),
        ("commit_limit", ctypes.c_uint64),
        ("commit_available", ctypes.c_uint64),
        ("address_space", ctypes.c_uint64),
        ("address_space_available", ctypes.c_uint64),
        ("extended_available", ctypes.c_uint64),
    )


def host_memory() -> HostMemory:
    """Reads RAM and commit; the commit that this process can still take bounds what is available.

    Raises:
        OSError: Windows refuses to tell.
    """
    if sys.platform != "win32":
        raise OSError("memory_windows needs Windows")
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise ctypes.WinError(ctypes.get_last_error())
    # The field is named after the page file, but it is RAM and page file together, less what is
    # promised; Windows does not over-commit, so this runs out while RAM is still free.
    return HostMemory(
        physical_bytes=status.physical,
        available_bytes=min(status.physical_available, status.commit_available),
        system_available_bytes=status.physical_available,
        commit_available_bytes=status.commit_available,
        # WDDM's budget for memory that a GPU shares with the host is half of the RAM, for all
        # programs together; the driver refuses page-locks beyond it.
        pin_limit_bytes=status.physical // 2,
    )

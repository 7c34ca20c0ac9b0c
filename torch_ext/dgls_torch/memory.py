"""Decides how much host and device memory is free to take, from what the system says about it."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dgls_torch.cgroup import memory_levels, read_number, read_text
from dgls_torch.units import GIB, MIB, format_bytes, parse_budget

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_CAP_IPC_LOCK = 14
_RLIMIT = re.compile(r"^Max (.+?) {2,}(\S+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """What the host has, and each limit this process runs into; ``None`` is no limit.

    Attributes:
        physical_bytes: The RAM of the machine.
        available_bytes: What can be taken now: the least of what the machine, the cgroup and the
            commit limit leave. Page cache counts as available, as the kernel can drop it.
        system_available_bytes: The machine's share of that: ``MemAvailable``.
        cgroup_limit_bytes: The tightest limit of the process's cgroup and those above it.
        cgroup_used_bytes: What that cgroup uses, without page cache.
        cgroup_available_bytes: The least that any of these cgroups leaves.
        memlock_limit_bytes: ``RLIMIT_MEMLOCK``. It binds ``mlock`` without CAP_IPC_LOCK, and not
            the CUDA driver, which locks pages in the kernel.
        address_space_limit_bytes: ``RLIMIT_AS``.
        address_space_used_bytes: The address space taken so far.
        data_limit_bytes: ``RLIMIT_DATA``.
        data_used_bytes: The private writable memory taken so far.
        commit_available_bytes: What Windows can still promise; it never promises more than it has.
        locks_freely: Whether ``RLIMIT_MEMLOCK`` does not bind: root has CAP_IPC_LOCK.
        pin_limit_bytes: What the system lets a GPU's driver page-lock, where that is known.
        wsl: Whether this is Linux under Windows, where page-locking fails early.
    """

    physical_bytes: int
    available_bytes: int
    system_available_bytes: int
    cgroup_limit_bytes: int | None = None
    cgroup_used_bytes: int | None = None
    cgroup_available_bytes: int | None = None
    memlock_limit_bytes: int | None = None
    address_space_limit_bytes: int | None = None
    address_space_used_bytes: int = 0
    data_limit_bytes: int | None = None
    data_used_bytes: int = 0
    commit_available_bytes: int | None = None
    locks_freely: bool = False
    pin_limit_bytes: int | None = None
    wsl: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """One GPU's memory, as the driver and torch's caching allocator see it, in bytes.

    Attributes:
        total_bytes: The memory of the GPU.
        driver_free_bytes: What no process has taken.
        reserved_bytes: What torch has taken from the driver.
        active_bytes: The part of it that tensors use.
        split_bytes: The unused rest of segments that are partly used; it cannot be given back.
        fraction: The part of the total that torch may take.
    """

    total_bytes: int
    driver_free_bytes: int
    reserved_bytes: int = 0
    active_bytes: int = 0
    split_bytes: int = 0
    fraction: float = 1.0

    @property
    def free_bytes(self) -> int:
        """What one large allocation by torch can get, once torch gives its cache back."""
        cached = max(0, self.reserved_bytes - self.active_bytes - self.split_bytes)
        by_driver = self.driver_free_bytes + cached
        by_torch = int(self.total_bytes * self.fraction) - (self.reserved_bytes - cached)
        return max(0, min(by_driver, by_torch))


def host_memory(root: str | os.PathLike[str] = "/") -> HostMemory:
    """Reads the host's memory and every limit on it.

    Args:
        root: The folder that stands for ``/``; a test gives one with its own ``proc`` and ``sys``.
    """
    if sys.platform == "win32":
        from dgls_torch.memory_windows import host_memory as windows_host_memory

        return windows_host_memory()
    base = Path(root)
    system = _sizes(base / "proc/meminfo")
    if "MemTotal" not in system:
        return _unknown_host_memory()
    # Kernels before 3.14 have no MemAvailable; what is free is then the safe answer.
    available = system.get("MemAvailable", system.get("MemFree", 0))
    levels = list(memory_levels(base))
    limit, used = min(levels, default=(None, None))
    headroom = min((max(0, most - taken) for most, taken in levels), default=None)
    rlimits = dict(_RLIMIT.findall(read_text(base / "proc/self/limits")))
    status = _sizes(base / "proc/self/status")
    return HostMemory(
        physical_bytes=system["MemTotal"],
        available_bytes=available if headroom is None else min(available, headroom),
        system_available_bytes=available,
        cgroup_limit_bytes=limit,
        cgroup_used_bytes=used,
        cgroup_available_bytes=headroom,
        memlock_limit_bytes=read_number(rlimits.get("locked memory")),
        address_space_limit_bytes=read_number(rlimits.get("address space")),
        address_space_used_bytes=status.get("VmSize", 0),
        data_limit_bytes=read_number(rlimits.get("data size")),
        data_used_bytes=status.get("VmData", 0),
        locks_freely=_locks_freely(base),
        wsl="microsoft" in read_text(base / "proc/sys/kernel/osrelease").lower(),
    )


def device_memory(device: torch.device | str) -> DeviceMemory:
    """Reads a GPU's memory; this starts CUDA in the process.

    Raises:
        ValueError: The device is no CUDA device.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device needs to be a CUDA device, found {device}")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    stats = torch.cuda.memory_stats(device)
    return DeviceMemory(
        total_bytes=total,
        driver_free_bytes=free,
        reserved_bytes=stats.get("reserved_bytes.all.current", 0),
        active_bytes=stats.get("active_bytes.all.current", 0),
        split_bytes=stats.get("inactive_split_bytes.all.current", 0),
        fraction=torch.cuda.get_per_process_memory_fraction(device),
    )


def free_vram(device: torch.device | str) -> int:
    """Returns the bytes that an arena on the device can get; on the CPU the arena is RAM.

    Raises:
        ValueError: The device is neither a CUDA device nor the CPU.
    """
    return host_memory().available_bytes if _is_cpu(device) else device_memory(device).free_bytes


def auto_vram_bytes(
    device: torch.device | str, activation_bytes: int | None = None, *, held_bytes: int = 0
) -> int:
    """Chooses the budget for the weights on a device.

    On a GPU it is what is free, less the room for activations, less a margin of 1/16 of the GPU
    and at least 512 MiB for what changes unseen: other programs, fragments, kernels' workspaces.
    On the CPU it is half of the available RAM, as the weights themselves may need the rest.

    Args:
        device: A CUDA device or the CPU.
        activation_bytes: The measured peak of everything but the weights during a pass; before
            any was measured, ``None`` stands for 1/8 of the GPU.
        held_bytes: What the caller has on the device already and would give up for the answer.

    Returns:
        The budget in bytes; 0 when the device is too full.

    Raises:
        ValueError: The device is neither a CUDA device nor the CPU.
    """
    if _is_cpu(device):
        return (host_memory().available_bytes + held_bytes) // 2
    memory = device_memory(device)
    if activation_bytes is None:
        activation_bytes = memory.total_bytes // 8
    margin = max(512 * MIB, memory.total_bytes // 16)
    return max(0, memory.free_bytes + held_bytes - activation_bytes - margin)


def pinned_budget(pinned: object, host: HostMemory) -> int:
    """Returns how many bytes of host memory may be page-locked in place.

    A size is an order. ``"auto"`` is half of what is available, and never so much that less than
    2 GiB or 1/8 of the machine would stay available. Under WSL it is nothing: page-locking fails
    there after about 1 GiB whatever the machine has, and the staging chunks need that much.

    Raises:
        ValueError: As `dgls_torch.units.parse_bytes`.
        TypeError: As `dgls_torch.units.parse_bytes`.
    """
    ordered = parse_budget(pinned, "pinned", least=0)
    if ordered is not None:
        return ordered
    if host.wsl:
        return 0
    chosen = _half(host, host.available_bytes)
    return chosen if host.pin_limit_bytes is None else min(chosen, host.pin_limit_bytes)


def encoded_budget(host: HostMemory, taken_bytes: int) -> int:
    """Returns how many bytes of host memory may hold encoded weights, beside ``taken_bytes``.

    It is new memory, other than what is page-locked in place: of what is left as much as
    ``pinned="auto"`` takes.
    """
    return _half(host, host.available_bytes - taken_bytes)


def _half(host: HostMemory, left: int) -> int:
    """Half of what is left, and never so much that little of the machine stays available."""
    return max(0, min(left // 2, left - max(2 * GIB, host.physical_bytes // 8)))


def pin_limits(host: HostMemory, *, by_driver: bool) -> Iterator[tuple[int, str]]:
    """Yields what each limit leaves for page-locks, and a sentence about it.

    ``RLIMIT_MEMLOCK`` binds ``mlock``, and not a GPU's driver, which locks in the kernel.
    """
    if not by_driver and not host.locks_freely and host.memlock_limit_bytes is not None:
        most = format_bytes(host.memlock_limit_bytes)
        yield host.memlock_limit_bytes, f"the locked-memory limit (ulimit -l) is {most}"
    most = format_bytes(host.physical_bytes)
    yield host.physical_bytes, f"the machine has {most} of RAM"
    if host.cgroup_limit_bytes is not None:
        most = format_bytes(host.cgroup_limit_bytes)
        yield host.cgroup_limit_bytes, f"the cgroup (container) is limited to {most}"
    if by_driver and host.pin_limit_bytes is not None:
        most = format_bytes(host.pin_limit_bytes)
        yield host.pin_limit_bytes, f"the system lets a GPU's driver page-lock {most}"


def preflight_host(need_bytes: int, what: str, host: HostMemory | None = None) -> None:
    """Refuses what the host cannot hold, before it is tried: a killed process explains nothing.

    Args:
        need_bytes: The host memory about to be taken.
        what: What needs it; the message starts with this.
        host: The host's memory; ``None`` reads it now.

    Raises:
        MemoryError: Some limit leaves less. The message names it, with the numbers.
    """
    left, reason = min(_limits(host_memory() if host is None else host))
    if need_bytes > left:
        need, found = format_bytes(need_bytes), format_bytes(left)
        raise MemoryError(f"{what} needs {need} of host memory, found {found}: {reason}")


def _limits(host: HostMemory) -> Iterator[tuple[int, str]]:
    def of(left: int, limit: int) -> tuple[str, str]:
        return format_bytes(max(0, left)), format_bytes(limit)

    left, most = of(host.system_available_bytes, host.physical_bytes)
    yield host.system_available_bytes, f"the machine has {left} available of {most}"
    if host.cgroup_limit_bytes is not None and host.cgroup_available_bytes is not None:
        left, most = of(host.cgroup_available_bytes, host.cgroup_limit_bytes)
        used = format_bytes(host.cgroup_used_bytes or 0)
        reason = f"the cgroup (container) leaves {left}; its tightest limit is {most}, {used} used"
        yield host.cgroup_available_bytes, reason
    if host.commit_available_bytes is not None:
        left = format_bytes(host.commit_available_bytes)
        yield host.commit_available_bytes, f"RAM and page file together can commit {left} more"
    if host.address_space_limit_bytes is not None:
        room = max(0, host.address_space_limit_bytes - host.address_space_used_bytes)
        left, most = of(room, host.address_space_limit_bytes)
        yield room, f"the address-space limit (ulimit -v) of {most} leaves {left}"
    if host.data_limit_bytes is not None:
        room = max(0, host.data_limit_bytes - host.data_used_bytes)
        left, most = of(room, host.data_limit_bytes)
        yield room, f"the data-size limit (ulimit -d) of {most} leaves {left}"


def _is_cpu(device: torch.device | str) -> bool:
    import torch

    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device needs to be a CUDA device or the CPU, found {device}")
    return device.type == "cpu"


def _locks_freely(base: Path) -> bool:
    found = re.search(
        r"^CapEff:\s*([0-9a-f]+)$", read_text(base / "proc/self/status"), re.MULTILINE
    )
    return found is not None and bool(int(found[1], 16) >> _CAP_IPC_LOCK & 1)


def _unknown_host_memory() -> HostMemory:
    # A POSIX system without /proc says how large it is, not how much of that is free.
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    half = physical // 2
    return HostMemory(physical_bytes=physical, available_bytes=half, system_available_bytes=half)


def _sizes(path: Path) -> dict[str, int]:
    """Reads the lines of the form ``Name:  123 kB``."""
    found = re.findall(r"^(\w+):\s+([0-9]+) kB$", read_text(path), re.MULTILINE)
    return {name: int(size) * 1024 for name, size in found}

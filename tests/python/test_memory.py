"""Host and device memory.

Goal: the tightest limit always counts, whichever layer of the system sets it.
Method: made-up ``/proc`` trees, a stand-in for torch.cuda and for the Windows API, and seeded loops
over random limits. Cgroups have a file of their own, test_cgroup.py.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from dgls_torch import memory, memory_windows
from dgls_torch.memory import (
    DeviceMemory,
    HostMemory,
    auto_vram_bytes,
    device_memory,
    free_vram,
    host_memory,
    pinned_budget,
    preflight_host,
)

if TYPE_CHECKING:
    from pathlib import Path

MIB, GIB = 2**20, 2**30

LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max data size             {data}            unlimited            bytes
Max locked memory         {memlock}              8388608              bytes
Max address space         {address}            unlimited            bytes
"""


def put(root: Path, name: str, text: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def machine(root: Path, total: int = 64 * GIB, available: int = 48 * GIB) -> Path:
    """Writes a machine without limits."""
    put(
        root,
        "proc/meminfo",
        f"MemTotal:       {total // 1024} kB\nMemFree:        {available // 2048} kB\n"
        f"MemAvailable:   {available // 1024} kB\nHugePages_Total:       0",
    )
    put(root, "proc/sys/kernel/osrelease", "6.8.0-45-generic")
    return root


def test_a_machine_without_limits(tmp_path: Path) -> None:
    host = host_memory(machine(tmp_path))
    assert host == HostMemory(
        physical_bytes=64 * GIB, available_bytes=48 * GIB, system_available_bytes=48 * GIB
    )


def test_an_old_kernel_counts_only_what_is_free(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", "MemTotal: 4096 kB\nMemFree: 1024 kB")
    assert host_memory(tmp_path).available_bytes == MIB


def test_without_proc_half_of_the_machine_counts(tmp_path: Path) -> None:
    host = host_memory(tmp_path)
    assert host.physical_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host.available_bytes == host.physical_bytes // 2


def test_this_machine_answers() -> None:
    host = host_memory()
    assert host.physical_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < host.available_bytes <= host.system_available_bytes <= host.physical_bytes
    assert free_vram("cpu") <= host.physical_bytes


def test_rlimits_and_what_is_used_of_them(tmp_path: Path) -> None:
    root = machine(tmp_path)
    limits = LIMITS.format(memlock=65536, address=8 * GIB, data="unlimited")
    put(root, "proc/self/limits", limits)
    put(root, "proc/self/status", "Name:\tpython\nVmSize:\t 2097152 kB\nVmData:\t 1048576 kB")
    host = host_memory(root)
    assert host.memlock_limit_bytes == 65536
    assert (host.address_space_limit_bytes, host.address_space_used_bytes) == (8 * GIB, 2 * GIB)
    assert (host.data_limit_bytes, host.data_used_bytes) == (None, GIB)


@pytest.mark.parametrize(
    ("release", "wsl"),
    [("5.15.167.4-microsoft-standard-WSL2", True), ("4.4.0-Microsoft", True), ("6.8.0", False)],
)
def test_wsl_is_recognised(tmp_path: Path, release: str, wsl: bool) -> None:
    root = machine(tmp_path)
    put(root, "proc/sys/kernel/osrelease", release)
    assert host_memory(root).wsl is wsl


def some_host(**fields: object) -> HostMemory:
    values = {
        "physical_bytes": 64 * GIB,
        "available_bytes": 40 * GIB,
        "system_available_bytes": 40 * GIB,
    }
    return HostMemory(**(values | fields))


@pytest.mark.parametrize(
    ("physical", "available", "budget"),
    [
        (64 * GIB, 40 * GIB, 20 * GIB),  # Half; 20 GiB stay.
        (64 * GIB, 12 * GIB, 4 * GIB),  # 1/8 of the machine stays.
        (8 * GIB, 3 * GIB, GIB),  # 2 GiB stay.
        (8 * GIB, 2 * GIB, 0),
        (8 * GIB, 0, 0),
    ],
)
def test_the_automatic_page_lock_budget(physical: int, available: int, budget: int) -> None:
    assert pinned_budget("auto", some_host(physical_bytes=physical, available_bytes=available)) == (
        budget
    )


def test_the_automatic_page_lock_budget_always_leaves_enough() -> None:
    random_ = random.Random(2)
    for _ in range(2000):
        physical = random_.randrange(1, 512) * GIB
        available = random_.randrange(0, physical + 1)
        budget = pinned_budget(
            "auto", some_host(physical_bytes=physical, available_bytes=available)
        )
        assert 0 <= budget <= available // 2
        assert budget == 0 or available - budget >= max(2 * GIB, physical // 8)


def test_a_page_lock_budget_is_an_order_and_wsl_gets_none_by_itself() -> None:
    small = some_host(available_bytes=GIB, wsl=True)
    assert pinned_budget("auto", small) == 0
    assert pinned_budget("3GiB", small) == 3 * GIB
    assert pinned_budget(0, some_host()) == 0
    with pytest.raises(ValueError, match="pinned needs"):
        pinned_budget("much", some_host())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "found 40.00 GiB: the machine has 40.00 GiB available of 64.00 GiB"),
        (
            {
                "cgroup_limit_bytes": 16 * GIB,
                "cgroup_used_bytes": 4 * GIB,
                "cgroup_available_bytes": 12 * GIB,
            },
            "found 12.00 GiB: the cgroup (container) leaves 12.00 GiB; its tightest limit is "
            "16.00 GiB, 4.00 GiB used",
        ),
        (
            {"commit_available_bytes": 5 * GIB},
            "found 5.00 GiB: RAM and page file together can commit 5.00 GiB more",
        ),
        (
            {"address_space_limit_bytes": 8 * GIB, "address_space_used_bytes": 5 * GIB},
            "found 3.00 GiB: the address-space limit (ulimit -v) of 8.00 GiB leaves 3.00 GiB",
        ),
        (
            {"data_limit_bytes": 2 * GIB, "data_used_bytes": 3 * GIB},
            "found 0 B: the data-size limit (ulimit -d) of 2.00 GiB leaves 0 B",
        ),
    ],
)
def test_preflight_names_the_limit_that_binds(fields: dict[str, int], sentence: str) -> None:
    with pytest.raises(MemoryError) as refused:
        preflight_host(50 * GIB, "the copy of the weights", some_host(**fields))
    assert str(refused.value) == (
        f"the copy of the weights needs 50.00 GiB of host memory, {sentence}"
    )


def test_preflight_refuses_exactly_what_does_not_fit() -> None:
    random_ = random.Random(3)
    for _ in range(2000):
        left = {
            "system_available_bytes": random_.randrange(100),
            "cgroup_available_bytes": random_.choice([None, random_.randrange(100)]),
            "commit_available_bytes": random_.choice([None, random_.randrange(100)]),
            "data_limit_bytes": random_.choice([None, random_.randrange(100)]),
        }
        host = some_host(cgroup_limit_bytes=100, **left)
        most = min(value for value in left.values() if value is not None)
        preflight_host(most, "x", host)
        with pytest.raises(MemoryError, match="x needs"):
            preflight_host(most + 1, "x", host)


def test_preflight_reads_the_host_itself() -> None:
    preflight_host(1, "one byte")
    with pytest.raises(MemoryError, match=r"an exbibyte needs 1048576\.00 TiB of host memory"):
        preflight_host(2**60, "an exbibyte")


def test_free_device_memory_counts_what_torch_can_give_back() -> None:
    gpu = DeviceMemory(total_bytes=24 * GIB, driver_free_bytes=10 * GIB)
    assert gpu.free_bytes == 10 * GIB
    gpu = DeviceMemory(
        total_bytes=24 * GIB,
        driver_free_bytes=10 * GIB,
        reserved_bytes=8 * GIB,
        active_bytes=5 * GIB,
        split_bytes=GIB,
    )
    assert gpu.free_bytes == 12 * GIB


def test_free_device_memory_keeps_to_torchs_fraction() -> None:
    gpu = DeviceMemory(
        total_bytes=24 * GIB,
        driver_free_bytes=20 * GIB,
        reserved_bytes=4 * GIB,
        active_bytes=3 * GIB,
        fraction=0.5,
    )
    assert gpu.free_bytes == 9 * GIB
    full = DeviceMemory(
        total_bytes=24 * GIB,
        driver_free_bytes=20 * GIB,
        reserved_bytes=GIB,
        active_bytes=GIB,
        fraction=0.01,
    )
    assert full.free_bytes == 0


def test_free_device_memory_is_never_more_than_either_view() -> None:
    random_ = random.Random(4)
    for _ in range(2000):
        total = random_.randrange(1, 100)
        reserved = random_.randrange(total + 1)
        active = random_.randrange(reserved + 1)
        gpu = DeviceMemory(
            total_bytes=total,
            driver_free_bytes=random_.randrange(total - reserved + 1),
            reserved_bytes=reserved,
            active_bytes=active,
            split_bytes=random_.randrange(reserved - active + 1),
        )
        assert 0 <= gpu.free_bytes <= total - active - gpu.split_bytes
        assert gpu.free_bytes <= gpu.driver_free_bytes + reserved - active
        assert gpu.free_bytes >= gpu.driver_free_bytes


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Stands in for a 24 GiB card with 20 GiB free, of which torch has cached 1 GiB."""
    stats = {
        "reserved_bytes.all.current": 3 * GIB,
        "active_bytes.all.current": 2 * GIB,
        "inactive_split_bytes.all.current": 0,
    }
    asked = []

    def of(answer: object) -> object:
        def ask(device: torch.device) -> object:
            asked.append(device)
            return answer

        return ask

    monkeypatch.setattr(torch.cuda, "mem_get_info", of((19 * GIB, 24 * GIB)))
    monkeypatch.setattr(torch.cuda, "memory_stats", of(stats))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", of(1.0))
    yield stats
    assert set(asked) == {torch.device("cuda:1")}


def test_a_gpu_is_read_through_torch(gpu: dict[str, int]) -> None:
    assert device_memory("cuda:1") == DeviceMemory(
        total_bytes=24 * GIB,
        driver_free_bytes=19 * GIB,
        reserved_bytes=3 * GIB,
        active_bytes=2 * GIB,
    )
    assert free_vram("cuda:1") == free_vram(torch.device("cuda", 1)) == 20 * GIB
    # Nothing was allocated through torch yet: some of its versions then know no numbers at all.
    gpu.clear()
    assert device_memory("cuda:1").reserved_bytes == 0


@pytest.mark.usefixtures("gpu")
def test_the_automatic_budget_on_a_gpu() -> None:
    margin = 24 * GIB // 16
    assert auto_vram_bytes("cuda:1") == 20 * GIB - 3 * GIB - margin
    assert auto_vram_bytes("cuda:1", 5 * GIB) == 15 * GIB - margin
    assert auto_vram_bytes("cuda:1", 0) == 20 * GIB - margin
    assert auto_vram_bytes("cuda:1", 5 * GIB, held_bytes=2 * GIB) == 17 * GIB - margin
    assert auto_vram_bytes("cuda:1", 100 * GIB) == 0


def test_the_automatic_budget_on_a_small_gpu_keeps_512_mib(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = DeviceMemory(total_bytes=4 * GIB, driver_free_bytes=3 * GIB)
    monkeypatch.setattr(memory, "device_memory", lambda _: small)
    assert auto_vram_bytes("cuda") == 3 * GIB - 512 * MIB - 512 * MIB


def test_the_automatic_budget_on_the_cpu_is_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_memory", some_host)
    assert free_vram("cpu") == 40 * GIB
    assert auto_vram_bytes("cpu") == auto_vram_bytes(torch.device("cpu"), 7 * GIB) == 20 * GIB
    assert auto_vram_bytes("cpu", held_bytes=4 * GIB) == 22 * GIB


def test_other_devices_are_refused() -> None:
    for ask in (free_vram, auto_vram_bytes):
        with pytest.raises(ValueError, match="device needs to be a CUDA device or the CPU"):
            ask("meta")
    with pytest.raises(ValueError, match="device needs to be a CUDA device, found cpu"):
        device_memory("cpu")


@pytest.mark.needs_cuda
def test_a_real_gpu_gives_back_what_torch_cached() -> None:
    torch.cuda.empty_cache()
    before = free_vram("cuda")
    held = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    assert free_vram("cuda") <= before - 200 * MIB
    del held
    cached = device_memory("cuda")
    assert cached.reserved_bytes - cached.active_bytes >= 256 * MIB
    # Other programs may come and go, but not within the width of what was just given back.
    assert free_vram("cuda") >= before - 128 * MIB
    assert free_vram("cuda") <= cached.total_bytes


class FakeKernel:
    """Stands in for kernel32."""

    def __init__(self, works: bool) -> None:
        self.works = works

    def GlobalMemoryStatusEx(self, pointer: object) -> int:
        status = pointer._obj
        assert status.length == ctypes.sizeof(status) == 64  # MEMORYSTATUSEX
        status.physical, status.physical_available = 32 * GIB, 20 * GIB
        status.commit_limit, status.commit_available = 40 * GIB, 6 * GIB
        return int(self.works)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel(works=True)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", lambda *_, **__: kernel, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: 5, raising=False)
    monkeypatch.setattr(ctypes, "WinError", lambda code: OSError(code, "denied"), raising=False)
    return kernel


@pytest.mark.usefixtures("windows")
def test_on_windows_commit_bounds_what_is_available() -> None:
    assert host_memory() == HostMemory(
        physical_bytes=32 * GIB,
        available_bytes=6 * GIB,
        system_available_bytes=20 * GIB,
        commit_available_bytes=6 * GIB,
        pin_limit_bytes=16 * GIB,
    )


def test_a_refusal_of_windows_is_an_os_error(windows: FakeKernel) -> None:
    windows.works = False
    with pytest.raises(OSError, match="denied"):
        host_memory()


@pytest.mark.skipif(sys.platform == "win32", reason="about other systems")
def test_the_windows_part_refuses_other_systems() -> None:
    with pytest.raises(OSError, match="needs Windows"):
        memory_windows.host_memory()

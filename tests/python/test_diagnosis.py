"""What the doctor finds wrong, and how it says so.

Goal: each thing that can be wrong is found alone, with a remedy; a good machine has none.
Method: made-up facts; nothing here asks the machine.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest

from dgls_torch.diagnosis import Facts, diagnose, render
from dgls_torch.memory import HostMemory

GIB = 2**30
HOST = HostMemory(
    physical_bytes=64 * GIB, available_bytes=48 * GIB, system_available_bytes=48 * GIB
)
GOOD_GPU = Facts(
    dgls_version="0.1.0",
    torch_version="2.11.0+cu130",
    torch_cuda="13.0",
    python_version="3.12.1",
    system="Linux",
    host=HOST,
    nvidia_device=True,
    driver_version=13010,
    gpu_name="NVIDIA GeForce RTX 3060",
    vram_total_bytes=12 * GIB,
    vram_free_bytes=11 * GIB,
    page_lock_asked_bytes=4 * GIB,
    page_lock_bytes=4 * GIB,
    copy_locked_bytes_per_s=25e9,
    copy_pageable_bytes_per_s=8e9,
)
GOOD_CPU = dataclasses.replace(
    GOOD_GPU,
    torch_version="2.10.0+cpu",
    torch_cuda=None,
    nvidia_device=False,
    driver_version=None,
    driver_error="libcuda.so.1 was not found",
    gpu_name=None,
    gpu_error="torch finds none",
    vram_total_bytes=None,
    vram_free_bytes=None,
)


def of_host(**fields: Any) -> dict[str, HostMemory]:
    return {"host": dataclasses.replace(HOST, **fields)}


def test_good_machines_have_nothing_wrong() -> None:
    assert diagnose(GOOD_GPU) == []
    assert diagnose(GOOD_CPU) == []
    # A CUDA build of torch is no fault of a machine without a GPU.
    assert diagnose(dataclasses.replace(GOOD_CPU, torch_cuda="13.0")) == []


@pytest.mark.parametrize(
    ("good", "fields", "problem", "remedy"),
    [
        (
            GOOD_GPU,
            {"native_error": "undefined symbol: x"},
            "the native part of dgls_torch did not load: undefined symbol: x",
            sys.executable,
        ),
        (
            GOOD_CPU,
            {"torch_version": "2.9.1+cu128"},
            "needs torch 2.10 or newer, found 2.9.1+cu128",
            "pytorch.org",
        ),
        (
            GOOD_GPU,
            {"torch_version": "1.13.0"},
            "needs torch 2.10 or newer, found 1.13.0",
            "pytorch.org",
        ),
        (
            GOOD_CPU,
            {"nvidia_device": True},
            "an NVIDIA device but no usable driver: libcuda.so.1 was not found",
            "Install NVIDIA's driver",
        ),
        (
            GOOD_CPU,
            {"nvidia_device": True, "driver_version": 13000},
            "torch 2.10.0+cpu is built without CUDA",
            "Install a CUDA build",
        ),
        (
            # Windows shows no device files, but its driver answers.
            GOOD_CPU,
            {"driver_version": 13000},
            "torch 2.10.0+cpu is built without CUDA",
            "Install a CUDA build",
        ),
        (
            GOOD_GPU,
            {"gpu_name": None, "driver_version": 12090},
            "torch needs a driver for CUDA 13.0, found one for CUDA 12.9",
            "Update NVIDIA's driver",
        ),
        (
            GOOD_GPU,
            {"gpu_name": None, "gpu_error": "no CUDA-capable device"},
            "torch uses no GPU: no CUDA-capable device",
            "CUDA_VISIBLE_DEVICES",
        ),
        (
            GOOD_CPU,
            {"torch_rocm": "7.1"},
            "torch is built for ROCm 7.1",
            'device="cpu"',
        ),
        (
            GOOD_GPU,
            {"copy_locked_bytes_per_s": 3.2e9},
            "copies to the GPU need at least 5.0 GB/s, found 3.2 GB/s",
            "nvidia-smi -q",
        ),
        (
            GOOD_GPU,
            {"copy_locked_bytes_per_s": None, "copy_error": "out of memory"},
            "measuring copies failed: out of memory",
            "--json",
        ),
        (
            GOOD_GPU,
            {"page_lock_bytes": None, "page_lock_error": "invalid argument"},
            "measuring page-locking failed: invalid argument",
            "--json",
        ),
        (
            GOOD_GPU,
            {"page_lock_bytes": 64 * 2**20, **of_host(memlock_limit_bytes=64 * 2**20)},
            "only 64.00 MiB of 4.00 GiB could be page-locked, and the memlock limit is 64.00 MiB",
            "ulimit -l unlimited",
        ),
        (
            GOOD_GPU,
            {"page_lock_bytes": GIB, **of_host(memlock_limit_bytes=64 * 2**20)},
            "only 1.00 GiB of 4.00 GiB could be page-locked, so more",
            'pinned="1024MiB"',
        ),
        (
            GOOD_GPU,
            {"page_lock_bytes": 0},
            "only 0 B of 4.00 GiB could be page-locked",
            'pinned="0MiB"',
        ),
        (
            GOOD_GPU,
            {"page_lock_bytes": 7 * 2**29},
            "only 3.50 GiB of 4.00 GiB could be page-locked",
            'pinned="3584MiB"',
        ),
        (GOOD_GPU, {**of_host(wsl=True), "page_lock_bytes": GIB}, "this is WSL", ".wslconfig"),
        (
            GOOD_CPU,
            of_host(cgroup_limit_bytes=16 * GIB, cgroup_available_bytes=9 * GIB),
            "the cgroup (container) may use 16.00 GiB of the machine's 64.00 GiB",
            "docker run --memory",
        ),
        (
            GOOD_GPU,
            of_host(address_space_limit_bytes=32 * GIB),
            "the address-space limit of this process is 32.00 GiB",
            "ulimit -v unlimited",
        ),
        (
            GOOD_GPU,
            of_host(data_limit_bytes=32 * GIB),
            "the data-size limit of this process is 32.00 GiB",
            "ulimit -d unlimited",
        ),
    ],
)
def test_each_problem_is_found_alone_with_its_remedy(
    good: Facts, fields: dict[str, Any], problem: str, remedy: str
) -> None:
    (finding,) = diagnose(dataclasses.replace(good, **fields))
    assert problem in finding.problem
    assert remedy in finding.remedy
    # One sentence: a full stop at its end, and the next one would start with a capital.
    assert finding.remedy.endswith(".")
    assert ". " not in finding.remedy


@pytest.mark.parametrize(
    ("good", "fields"),
    [
        (GOOD_GPU, {"torch_version": "2.10.0a0+git1234"}),
        (GOOD_GPU, {"torch_version": "3.0.0"}),
        (GOOD_GPU, {"torch_version": "unreadable"}),
        (GOOD_GPU, {"driver_version": 14000}),
        (GOOD_GPU, {"page_lock_bytes": 4 * GIB - 2**28}),
        (GOOD_GPU, {"copy_locked_bytes_per_s": 5e9}),
        (GOOD_GPU, of_host(memlock_limit_bytes=65536)),
        (GOOD_GPU, of_host(cgroup_limit_bytes=64 * GIB)),
        (GOOD_CPU, {"page_lock_bytes": 0, **of_host(memlock_limit_bytes=65536)}),
        (GOOD_CPU, {"copy_locked_bytes_per_s": 1e9}),
    ],
)
def test_what_only_looks_wrong_is_not_reported(good: Facts, fields: dict[str, Any]) -> None:
    assert diagnose(dataclasses.replace(good, **fields)) == []


def test_without_the_native_part_nothing_is_said_of_a_driver_that_was_not_asked() -> None:
    facts = dataclasses.replace(
        GOOD_CPU, nvidia_device=True, driver_error=None, native_error="no such file"
    )
    problems = [finding.problem for finding in diagnose(facts)]
    assert len(problems) == 2
    assert "did not load" in problems[0]
    assert "built without CUDA" in problems[1]


def test_several_problems_are_all_found() -> None:
    facts = dataclasses.replace(
        GOOD_GPU,
        torch_version="2.9.0",
        copy_locked_bytes_per_s=1e9,
        **of_host(wsl=True, cgroup_limit_bytes=8 * GIB),
    )
    found = diagnose(facts)
    assert len(found) == 4
    shown = render(facts, found)
    assert "What is wrong (4):" in shown
    for number, finding in enumerate(found, 1):
        assert f"{number}. {finding.problem}\n   -> {finding.remedy}" in shown


def test_a_good_machine_is_shown_in_ten_aligned_lines() -> None:
    lines = render(GOOD_GPU, []).splitlines()
    assert lines == [
        "dgls_torch  0.1.0",
        "torch       2.11.0+cu130, built for CUDA 13.0",
        "Python      3.12.1 on Linux",
        "driver      CUDA 13.1",
        "GPU         NVIDIA GeForce RTX 3060",
        "VRAM        11.00 GiB free of 12.00 GiB",
        "page-lock   4.00 GiB locked of 4.00 GiB tried",
        "copy        to the GPU: 25.0 GB/s page-locked, 8.0 GB/s pageable",
        "RAM         48.00 GiB available of 64.00 GiB",
        "limits      cgroup none, memlock none, address space none, data none",
        "",
        "Nothing is wrong.",
    ]


def test_a_machine_without_a_gpu_says_what_happens_instead() -> None:
    facts = dataclasses.replace(
        GOOD_CPU,
        copy_pageable_bytes_per_s=None,
        **of_host(
            cgroup_limit_bytes=96 * GIB, cgroup_used_bytes=GIB, memlock_limit_bytes=8 * 2**20
        ),
    )
    lines = render(facts, []).splitlines()
    assert lines[1] == "torch       2.10.0+cpu, built without CUDA"
    assert lines[3] == "driver      none: libcuda.so.1 was not found"
    assert lines[4] == "GPU         none: torch finds none"
    assert lines[5] == "VRAM        none: models stream from RAM or a file on the CPU"
    assert lines[7] == "copy        to the arena in RAM: 25.0 GB/s page-locked, unknown pageable"
    assert lines[9] == (
        "limits      cgroup 96.00 GiB (1.00 GiB used), memlock 8.00 MiB, address space none, "
        "data none"
    )

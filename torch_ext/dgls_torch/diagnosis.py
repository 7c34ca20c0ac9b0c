"""Decides what is wrong with a machine for streaming, and how that is said; pure."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import TYPE_CHECKING

from dgls_torch.units import MIB, format_bytes, format_rate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dgls_torch.memory import HostMemory

_OLDEST_TORCH = (2, 10)
# PCIe 3.0 x8 reaches 6 to 7 GB/s; a desktop card below 5 GB/s sits in a slot with too few lanes.
_SLOW_BYTES_PER_S = 5e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found out; ``None`` where there is nothing, and then the error says why.

    Attributes:
        dgls_version: The version of this package.
        torch_version: The version of torch.
        torch_cuda: The CUDA version torch is built for.
        torch_rocm: The ROCm version torch is built for.
        python_version: The version of Python.
        system: The operating system and its version.
        host: The host's memory and its limits.
        nvidia_device: Whether the system shows an NVIDIA GPU, with a driver or without.
        native_error: Why the native part did not load.
        driver_version: The CUDA version of the driver, as 12090 for 12.9.
        driver_error: Why there is no driver.
        gpu_name: The GPU that torch uses.
        gpu_error: Why torch uses none.
        vram_total_bytes: The GPU's memory.
        vram_free_bytes: What torch can get of it now.
        page_lock_asked_bytes: How much host memory was tried to be page-locked at once.
        page_lock_bytes: How much of it could be.
        page_lock_error: Why that is unknown.
        copy_locked_bytes_per_s: The rate of copies from page-locked memory, to the GPU or, where
            there is none, to the arena in RAM.
        copy_pageable_bytes_per_s: The same from plain memory.
        copy_error: Why one of them is unknown.
    """

    dgls_version: str
    torch_version: str
    torch_cuda: str | None = None
    torch_rocm: str | None = None
    python_version: str
    system: str
    host: HostMemory
    nvidia_device: bool = False
    native_error: str | None = None
    driver_version: int | None = None
    driver_error: str | None = None
    gpu_name: str | None = None
    gpu_error: str | None = None
    vram_total_bytes: int | None = None
    vram_free_bytes: int | None = None
    page_lock_asked_bytes: int = 0
    page_lock_bytes: int | None = None
    page_lock_error: str | None = None
    copy_locked_bytes_per_s: float | None = None
    copy_pageable_bytes_per_s: float | None = None
    copy_error: str | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong, and the one sentence that says what to do about it."""

    problem: str
    remedy: str


def diagnose(facts: Facts) -> list[Finding]:
    """Judges the facts; an empty list means that nothing is wrong."""
    problems = (*_software(facts), *_gpu_access(facts), *_speed(facts), *_limits(facts))
    return [Finding(problem, remedy) for problem, remedy in problems]


def render(facts: Facts, findings: Sequence[Finding]) -> str:
    """Shows the facts as aligned lines, then each finding with its remedy."""
    lines = [f"{label:<12}{text}" for label, text in _lines(facts)]
    lines += ["", "Nothing is wrong." if not findings else f"What is wrong ({len(findings)}):"]
    for number, finding in enumerate(findings, 1):
        lines += [f"{number}. {finding.problem}", f"   -> {finding.remedy}"]
    return "\n".join(lines)


def _software(facts: Facts) -> Iterator[tuple[str, str]]:
    pip = f'"{sys.executable}" -m pip'
    if facts.native_error is not None:
        yield (
            f"the native part of dgls_torch did not load: {facts.native_error}",
            f"Reinstall it for this Python: {pip} install --force-reinstall --no-deps dgls_torch.",
        )
    version = re.match(r"(\d+)\.(\d+)", facts.torch_version)
    if version is not None and tuple(map(int, version.groups())) < _OLDEST_TORCH:
        yield (
            f"dgls_torch needs torch 2.10 or newer, found {facts.torch_version}",
            f"Upgrade torch with the command that pytorch.org gives for your CUDA, run as {pip}.",
        )


def _gpu_access(facts: Facts) -> Iterator[tuple[str, str]]:
    driver, cuda = facts.driver_version, facts.torch_cuda
    if facts.torch_rocm is not None:
        yield (
            f"torch is built for ROCm {facts.torch_rocm}, and dgls_torch streams to CUDA only",
            'Run on the CPU with device="cpu", or use an NVIDIA GPU with a CUDA build of torch.',
        )
    elif facts.nvidia_device and driver is None and facts.native_error is None:
        yield (
            f"there is an NVIDIA device but no usable driver: {facts.driver_error}",
            "Install NVIDIA's driver, or give the container the GPU (docker run --gpus all).",
        )
    elif driver is None and not facts.nvidia_device:
        return
    elif cuda is None:
        yield (
            f"torch {facts.torch_version} is built without CUDA, so the GPU stays idle",
            "Install a CUDA build of torch with the command that pytorch.org gives, run as "
            f'"{sys.executable}" -m pip.',
        )
    elif driver is not None and driver // 1000 < int(cuda.split(".")[0]):
        yield (
            f"torch needs a driver for CUDA {cuda}, found one for CUDA {_dotted(driver)}",
            "Update NVIDIA's driver, or install a build of torch for that older CUDA.",
        )
    elif facts.gpu_name is None:
        yield (
            f"there is an NVIDIA driver or device, but torch uses no GPU: {facts.gpu_error}",
            "Check that nvidia-smi lists the GPU and that CUDA_VISIBLE_DEVICES does not hide it.",
        )


def _speed(facts: Facts) -> Iterator[tuple[str, str]]:
    for what, error in (("page-locking", facts.page_lock_error), ("copies", facts.copy_error)):
        if error is not None:
            yield (
                f"measuring {what} failed: {error}",
                "Run the doctor again while nothing else uses the GPU and the memory, and if it "
                "stays, report it with the output of --json.",
            )
    # Without a GPU nothing depends on a link, and nothing needs to be page-locked.
    if facts.gpu_name is None:
        return
    rate = facts.copy_locked_bytes_per_s
    if rate is not None and rate < _SLOW_BYTES_PER_S:
        needed = format_rate(_SLOW_BYTES_PER_S)
        yield (
            f"copies to the GPU need at least {needed}, found {format_rate(rate)}",
            "Compare the link's width and generation under load with its maximum (nvidia-smi -q "
            "-d PCIE) and move the card to a slot with all its lanes.",
        )
    locked, asked = facts.page_lock_bytes, facts.page_lock_asked_bytes
    # Said once, with WSL itself; and a driver locks whole chunks, so the last one may be missing.
    if facts.host.wsl or locked is None or locked * 10 >= asked * 9:
        return
    found = f"only {format_bytes(locked)} of {format_bytes(asked)} could be page-locked"
    limit = facts.host.memlock_limit_bytes
    if limit is not None and locked <= limit:
        yield (
            f"{found}, and the memlock limit is {format_bytes(limit)}",
            "Raise it with ulimit -l unlimited, or docker run --ulimit memlock=-1.",
        )
    else:
        yield (
            f"{found}, so more weights go through staging",
            f'Set pinned="{locked // MIB}MiB", so that no more is tried, or close programs '
            "that page-lock memory too.",
        )


def _limits(facts: Facts) -> Iterator[tuple[str, str]]:
    host = facts.host
    if host.wsl:
        yield (
            "this is WSL, where page-locking stops at about 1 GiB and copies are slower",
            "Run on Linux or Windows itself, or else raise memory= in .wslconfig so that at least "
            "the weights fit.",
        )
    cgroup = host.cgroup_limit_bytes
    if cgroup is not None and cgroup < host.physical_bytes:
        limit, has = format_bytes(cgroup), format_bytes(host.physical_bytes)
        yield (
            f"the cgroup (container) may use {limit} of the machine's {has} of RAM",
            "Raise the container's memory limit (docker run --memory) if weights need more.",
        )
    limits = (
        ("address-space", "-v", host.address_space_limit_bytes),
        ("data-size", "-d", host.data_limit_bytes),
    )
    for name, flag, most in limits:
        if most is not None:
            yield (
                f"the {name} limit of this process is {format_bytes(most)}",
                f"Lift it with ulimit {flag} unlimited: CUDA and mapped weights need far more.",
            )


def _lines(facts: Facts) -> Iterator[tuple[str, str]]:
    host = facts.host
    build = "ROCm" if facts.torch_rocm else "CUDA"
    version = facts.torch_rocm or facts.torch_cuda
    built = f"built for {build} {version}" if version else "built without CUDA"
    yield "dgls_torch", facts.dgls_version
    yield "torch", f"{facts.torch_version}, {built}"
    yield "Python", f"{facts.python_version} on {facts.system}"
    if facts.driver_version is not None:
        yield "driver", f"CUDA {_dotted(facts.driver_version)}"
    else:
        yield "driver", f"none: {facts.driver_error or facts.native_error}"
    if facts.gpu_name is not None:
        yield "GPU", facts.gpu_name
        free, total = facts.vram_free_bytes or 0, facts.vram_total_bytes or 0
        yield "VRAM", f"{format_bytes(free)} free of {format_bytes(total)}"
    else:
        yield "GPU", f"none: {facts.gpu_error}"
        yield "VRAM", "none: models stream from RAM or a file on the CPU"
    if facts.page_lock_bytes is None:
        yield "page-lock", f"not measured: {facts.page_lock_error or facts.native_error}"
    else:
        asked = format_bytes(facts.page_lock_asked_bytes)
        yield "page-lock", f"{format_bytes(facts.page_lock_bytes)} locked of {asked} tried"
    target = "to the GPU" if facts.gpu_name is not None else "to the arena in RAM"
    rates = (facts.copy_locked_bytes_per_s, facts.copy_pageable_bytes_per_s)
    fast, slow = (format_rate(rate) if rate is not None else "unknown" for rate in rates)
    yield "copy", f"{target}: {fast} page-locked, {slow} pageable"
    left, physical = format_bytes(host.available_bytes), format_bytes(host.physical_bytes)
    yield "RAM", f"{left} available of {physical}"
    used = host.cgroup_used_bytes
    limits = (
        ("cgroup", _limit(host.cgroup_limit_bytes, used)),
        ("memlock", _limit(host.memlock_limit_bytes)),
        ("address space", _limit(host.address_space_limit_bytes)),
        ("data", _limit(host.data_limit_bytes)),
    )
    yield "limits", ", ".join(f"{name} {limit}" for name, limit in limits)


def _limit(most: int | None, used: int | None = None) -> str:
    if most is None:
        return "none"
    return format_bytes(most) + ("" if used is None else f" ({format_bytes(used)} used)")


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"

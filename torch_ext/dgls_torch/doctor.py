"""Decides what to ask and measure on a machine that is to stream, and prints the answers.

`collect` asks and measures; what it found is judged and shown without the machine (`diagnosis`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dgls_torch._extension import __version__, load
from dgls_torch.diagnosis import Facts, Finding, diagnose, render
from dgls_torch.memory import device_memory, host_memory
from dgls_torch.units import GIB, MIB

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

__all__ = ["Facts", "Finding", "collect", "diagnose", "has_nvidia_device", "main", "render"]

T = TypeVar("T")

_PAGE_LOCK_MOST = 4 * GIB
_COPY_MOST = 256 * MIB
_COPY_REPEATS = 5
_CPU_DEVICE = -1


def collect(native: Any = None, root: str | os.PathLike[str] = "/") -> Facts:
    """Asks the system, torch and the driver, and measures page-locking and copies.

    Takes a second or two, and for that long up to 4 GiB, but at most 1/4 of the available RAM.

    Args:
        native: What answers the native questions; ``None`` loads ``torch.ops.dgls``.
        root: The folder that stands for ``/``; a test gives its own.
    """
    host = host_memory(root)
    native_error = None
    if native is None:
        native, native_error = _asked(_load_native)
    index, gpu = _gpu()
    device = _CPU_DEVICE if index is None else index
    asked = min(host.available_bytes // 4, _PAGE_LOCK_MOST)
    size = max(1, min(host.available_bytes // 8, _COPY_MOST))
    measured: dict[str, Any] = {"page_lock_asked_bytes": asked}
    if native is not None:
        driver, driver_error = _asked(native.driver_version)
        locked, lock_error = _asked(lambda: native.measure_page_lock(device, asked))
        fast, fast_error = _asked(lambda: native.measure_copy(device, size, _COPY_REPEATS, True))
        slow, slow_error = _asked(lambda: native.measure_copy(device, size, _COPY_REPEATS, False))
        measured |= {
            "driver_version": driver,
            "driver_error": driver_error,
            "page_lock_bytes": locked,
            "page_lock_error": lock_error,
            "copy_locked_bytes_per_s": fast,
            "copy_pageable_bytes_per_s": slow,
            "copy_error": fast_error or slow_error,
        }
    return Facts(
        dgls_version=__version__,
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_rocm=torch.version.hip,
        python_version=platform.python_version(),
        system=platform.platform(),
        host=host,
        nvidia_device=has_nvidia_device(root),
        native_error=native_error,
        **gpu,
        **measured,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the doctor: ``python -m dgls_torch doctor [--json]``.

    Returns:
        The exit status: 0 when nothing is wrong, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dgls_torch doctor",
        description="Measures what this machine can do for streaming, and says what is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="print the same data as JSON")
    arguments = parser.parse_args(argv)
    facts = collect()
    findings = diagnose(facts)
    if arguments.json:
        shown = {"facts": facts, "findings": findings}
        print(json.dumps(shown, default=dataclasses.asdict, indent=2))
    else:
        print(render(facts, findings))
    return 1 if findings else 0


def has_nvidia_device(root: str | os.PathLike[str] = "/") -> bool:
    """Tells whether Linux shows an NVIDIA GPU: on the PCI bus, as a device file, or under WSL."""
    base = Path(root)
    if any((base / "dev").glob("nvidia[0-9]*")) or (base / "usr/lib/wsl/lib/libcuda.so.1").exists():
        return True
    for device in (base / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        # 03 is a display controller: a card's own sound and USB are NVIDIA devices as well.
        if vendor.strip() == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def _load_native() -> Any:
    load()
    return torch.ops.dgls


def _asked(question: Callable[[], T]) -> tuple[T | None, str | None]:
    """Returns the answer, or the first line of why there is none: torch appends its C++ stack."""
    try:
        return question(), None
    except (ImportError, AttributeError, OSError, RuntimeError, MemoryError) as error:
        lines = str(error).strip().splitlines()
        return None, lines[0] if lines else type(error).__name__


def _gpu() -> tuple[int | None, dict[str, Any]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # torch warns only once why it has no CUDA.
        available = torch.cuda.is_available()
    if not available:
        reason = str(caught[0].message).splitlines()[0] if caught else "torch finds none"
        return None, {"gpu_error": reason}

    def ask() -> tuple[int, dict[str, Any]]:
        index = torch.cuda.current_device()
        memory = device_memory(f"cuda:{index}")
        return index, {
            "gpu_name": torch.cuda.get_device_name(index),
            "vram_total_bytes": memory.total_bytes,
            "vram_free_bytes": memory.free_bytes,
        }

    found, error = _asked(ask)
    return found if found is not None else (None, {"gpu_error": error})

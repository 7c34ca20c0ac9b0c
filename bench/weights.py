"""Where the weights lie: one file in shared memory that every engine's process maps."""

from __future__ import annotations

import mmap
import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from bench.stacks import Stack, Workload

_ALIGNMENT = 512


def _offsets(stack: Stack) -> tuple[list[tuple[torch.nn.Parameter, int, int]], int]:
    """Each parameter with its place and bytes, and the bytes of the file."""
    places, at = [], 0
    for parameter in stack.parameters():
        size = parameter.numel() * parameter.element_size()
        places.append((parameter, at, size))
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, at


def _values(parameter: torch.nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    """Random values that keep the activations finite through all blocks."""
    shape, device = parameter.shape, generator.device
    if parameter.dim() < 2:
        return 1 + 0.01 * torch.randn(shape, generator=generator, device=device)
    spread = float(shape[-1]) ** -0.5
    values: torch.Tensor = spread * torch.randn(shape, generator=generator, device=device)
    return values


def make(workload: Workload, folder: Path, device: torch.device) -> Path:
    """Writes the weights, drawn on ``device``, unless they are there; returns the file."""
    path = folder / f"{workload.key}.weights"
    places, size = _offsets(workload.build())
    if path.exists() and path.stat().st_size == size:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.truncate(size)
    target = torch.from_file(str(partial), shared=True, size=size, dtype=torch.uint8)
    generator = torch.Generator(device).manual_seed(0)
    for parameter, at, length in places:
        values = _values(parameter, generator).to(parameter.dtype)
        target[at : at + length].copy_(values.reshape(-1).view(torch.uint8))
    del target
    partial.rename(path)
    return path


def load(workload: Workload, path: Path) -> Stack:
    """The stack with its weights mapped: no copy of them is made.

    Every parameter has a storage of its own, as some engines tell tied weights by storage.
    """
    stack = workload.build()
    places, _ = _offsets(stack)
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    for parameter, at, length in places:
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=length, offset=at)
        value = raw.view(parameter.dtype).view(parameter.shape)
        _assign(stack, parameter, value)
    return stack


def _assign(stack: Stack, old: torch.nn.Parameter, value: torch.Tensor) -> None:
    for module in stack.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
                return
    raise LookupError("a parameter belongs to no module")


def remove(workload: Workload, folder: Path) -> None:
    """Gives the memory of the file back."""
    (folder / f"{workload.key}.weights").unlink(missing_ok=True)


def quiet() -> None:
    """Keeps torch from warning of what is meant here."""
    warnings.filterwarnings("ignore", message="The given buffer is not writable")

"""A kernel that reads page-locked host memory; of its own, since Triton is needed to import it."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def read(source, target, rounds, size, step: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program goes ``rounds`` times over its part of ``source``, in steps of ``step``."""
    program = tl.program_id(0)
    part = source + program * size
    places = tl.arange(0, step)
    total = tl.zeros((step,), tl.int32)
    for i in range(rounds):
        total += tl.load(part + (i * step) % size + places)
    tl.store(target + program * step + places, total)


def launch(source: Any, target: Any, programs: int, numbers: int, step: int) -> None:
    """Reads ``numbers`` 32-bit numbers in all, on the current stream; does not block."""
    size = source.numel() // programs // step * step
    rounds = numbers // (programs * step)
    read[(programs,)](source, target, rounds, size, step=step, num_warps=32)

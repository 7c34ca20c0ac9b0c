"""The device memory of an engine: one allocation, owned by torch."""

from __future__ import annotations

import torch

from dgls_torch.memory import device_memory, host_memory
from dgls_torch.units import format_bytes


def empty_arena(size: int, device: torch.device) -> torch.Tensor:
    """Device memory for residents and slots: one allocation, owned by torch.

    A normal tensor also under inference mode: parameters are bound to views of it.

    Raises:
        torch.OutOfMemoryError: With how much was wanted for what.
    """
    with torch.inference_mode(False):
        try:
            return torch.empty(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"the plan takes {format_bytes(size)} on {device}, which are not free; give a "
                f"smaller vram ({error})"
            ) from error


def has_room(size: int, device: torch.device) -> bool:
    """Whether an arena of ``size`` bytes fits beside all that is there now.

    Where it does not, a system may still grant it, and swap, or end a process for it.
    """
    if device.type == "cuda":
        return device_memory(device).driver_free_bytes >= size
    return host_memory().available_bytes >= 2 * size

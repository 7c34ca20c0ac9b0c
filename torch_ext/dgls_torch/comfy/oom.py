"""Out of memory in the middle of a run: the blocks make room, and the step is run once more."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management as mm
import torch

from dgls_torch.comfy.residency import Residency
from dgls_torch.units import format_bytes

log = logging.getLogger("dgls_torch")


def with_room(executor: Any, *arguments: Any, **fields: Any) -> Any:
    """An APPLY_MODEL wrapper: one forward, and a second try with half of the blocks' memory.

    Raises:
        torch.OutOfMemoryError: There is no more room to make.
    """
    try:
        return executor(*arguments, **fields)
    except torch.OutOfMemoryError as error:
        freed = _make_room(executor.class_obj)
        if freed == 0:
            raise
        log.warning("DGLS: %s; trying again with %s less for weights", error, format_bytes(freed))
    # Outside of the handler, which would keep the failed forward's tensors alive.
    mm.soft_empty_cache(True)
    return executor(*arguments, **fields)


def _make_room(model: Any) -> int:
    """Gives back half of what the engine holds, or all of it where half is too little."""
    residency = Residency.of(model)
    held = residency.held_bytes
    freed = residency.shrink(held // 2) if held else 0
    model.model_loaded_weight_memory = max(0, model.model_loaded_weight_memory - freed)
    return freed

"""Page-locks in ComfyUI's own account: what the engine locks counts as if ComfyUI had locked it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import comfy.model_management as mm

from dgls_torch.memory import host_memory, pinned_budget

if TYPE_CHECKING:
    import dgls_torch


class Pins:
    """How much one model's stream has page-locked, as it stands in ``TOTAL_PINNED_MEMORY``.

    The engine locks and unlocks by itself, so ComfyUI is told afterwards. What is told is taken
    back when this object goes, which is with its model.
    """

    def __init__(self) -> None:
        """Nothing is locked yet."""
        self._told = [0]
        self._finalizer = weakref.finalize(self, _tell, self._told, 0)
        self._finalizer.atexit = False

    @property
    def told_bytes(self) -> int:
        """What of ComfyUI's count is this stream's."""
        return self._told[0]

    def tell(self, stream: dgls_torch.Stream | None) -> None:
        """Brings ComfyUI's count up to date with a stream, or with none."""
        locked = 0
        if stream is not None:
            report = stream.report()
            locked = report.pinned_bytes + report.staging_bytes + report.encoded_held_bytes
        _tell(self._told, locked)


def _tell(told: list[int], locked_bytes: int) -> None:
    mm.TOTAL_PINNED_MEMORY = max(0, mm.TOTAL_PINNED_MEMORY + locked_bytes - told[0])
    told[0] = locked_bytes


def pinned_limit(wanted_bytes: int) -> int:
    """Host bytes that may be page-locked in place, for blocks of ``wanted_bytes``.

    ComfyUI is asked to let go of what it may lock again later, as it does before it locks something
    itself; no more than its own limit leaves is taken, nor than this machine can spare.
    """
    if mm.MAX_PINNED_MEMORY <= 0:  # there is no GPU to copy to, or --disable-pinned-memory
        return 0
    mm.ensure_pin_registerable(wanted_bytes)
    left = max(0, int(mm.MAX_PINNED_MEMORY) - int(mm.TOTAL_PINNED_MEMORY))
    return min(left, pinned_budget("auto", host_memory()))

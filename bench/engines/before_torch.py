"""What engines need in place before torch is imported; imports no torch itself."""

from __future__ import annotations


def aimdo() -> None:
    """Loads comfy-aimdo's library, which looks after the memory that torch asks for.

    Raises:
        RuntimeError: It cannot be loaded.
    """
    from comfy_aimdo import control

    if not control.init():
        raise RuntimeError("comfy-aimdo could not load its library: is there a CUDA driver?")

"""What a DGLS node asks for, as it travels with a patcher and all of its clones."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dgls_torch.units import format_bytes, parse_budget

#: The smallest budget that can be meant: less is a forgotten unit.
_LEAST_BYTES = 1 << 16


class LoraMode(enum.Enum):
    """Where a LoRA's maths is done for streamed weights.

    ON_THE_FLY: at each use, in the compute dtype, as ComfyUI does for weights that it offloads.
    BAKED: once, into the weights, as ComfyUI does for weights that it loads completely.
    """

    ON_THE_FLY = "on the fly"
    BAKED = "baked"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One node's settings. Made anew for each node, never changed.

    Attributes:
        vram_bytes: Budget for all weights on the device; ``None`` takes what ComfyUI offers.
        resident: Names of blocks that stay on the device; the others are streamed then, through
            ``slots`` of them at a time. ``None`` lets the planner choose.
        unit: What is streamed at a time: ``"block"``, or ``"layer"``, each layer of the blocks.
        compress: Whether bf16 and fp8 weights go to the device encoded: ``"off"``, or ``"auto"``,
            as many as hide the copies.
        slots: Blocks on the device at a time, of those that are streamed, when ``resident`` is
            given.
        reserve_bytes: What an automatic budget leaves for LoRA weights.
        lora: Where LoRA maths is done.
        verbose: Whether plan and measurements go to the log.
    """

    vram_bytes: int | None = None
    resident: tuple[str, ...] | None = None
    unit: str = "block"
    compress: str = "off"
    slots: int = 2
    reserve_bytes: int = 0
    lora: LoraMode = LoraMode.ON_THE_FLY
    verbose: bool = False

    def on_model_patcher_clone(self) -> Settings:
        """What a clone of the patcher gets: the same, as it never changes."""
        return self


def parse_vram(text: object) -> int | None:
    """Reads the ``vram`` input: ``None`` for auto, else bytes.

    Raises:
        ValueError: It is no size, or below 64 KiB; the message says what is allowed.
        TypeError: It is neither text nor a number.
    """
    allowed = 'allowed is "auto" or a size such as "8GiB" or "7500 MB", at least 64 KiB'
    if isinstance(text, str) and not text.strip():
        return None
    try:
        size = parse_budget(text, "vram", least=1)
    except ValueError as error:
        raise ValueError(f"{error}; {allowed}") from error
    if size is not None and size < _LEAST_BYTES:
        raise ValueError(f"vram is {text!r}, which is {format_bytes(size)}; {allowed}")
    return size

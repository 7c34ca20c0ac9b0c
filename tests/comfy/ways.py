"""The ways of storing weights and of running ComfyUI that every tiny model is checked in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        title: For people.
        arguments: More arguments of the server.
        weight_dtype: What Load Diffusion Model is told.
        number_bytes: About how many bytes a number takes, of files that are not in 8 bits already.
        is_full: Whether LoRAs and plain runs are checked as well, or budgets only.
        some: Names of the models that are checked; all where empty.
    """

    title: str
    arguments: tuple[str, ...] = ()
    weight_dtype: str = "default"
    number_bytes: float = 4
    is_full: bool = False
    some: tuple[str, ...] = ()

    def names(self, names: list[str]) -> list[str]:
        return [name for name in names if not self.some or name in self.some]

    def rounds(self, most: int) -> int:
        """Only the complete way is run again in a second server."""
        return most if self.is_full else 1

    def bytes(self, entry: dict[str, Any]) -> int:
        """All weights of a model in this way, about."""
        if entry["file"].endswith("_fp8.safetensors"):
            return int(entry["bytes"])
        return int(entry["numbers"] * self.number_bytes)


_FEW = ("flux", "flux_fp8", "wan21_t2v", "sd15", "z_image")
WAYS = [
    Way("Weights as in the file", is_full=True),
    Way("Weights bf16, cast at use", ("--bf16-unet",), number_bytes=2, is_full=True),
    Way("Weights fp8, cast at use", weight_dtype="fp8_e4m3fn", number_bytes=1.2),
    Way("ComfyUI with --fast", ("--fast",), some=_FEW),
    Way(
        "ComfyUI with --disable-smart-memory --cache-none",
        ("--disable-smart-memory", "--cache-none"),
        some=_FEW,
    ),
]

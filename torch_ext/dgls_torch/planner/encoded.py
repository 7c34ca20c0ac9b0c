"""What weights that go over the link encoded would change in a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgls_torch.encoding import BUFFER_LEAST, SHARE, decoder_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dgls_torch.planner.sizes import ModelSizes

HIDES = 0.93
"""What copies may take of the compute for ``"auto"`` to encode nothing (adapt/balance.rs)."""


@dataclass(frozen=True)
class Encoded:
    """Weights that go over the link encoded, as far as they may.

    Attributes:
        share: Bytes on the link for each byte that is streamed, if what is streamed is like all.
        buffer_bytes: Device memory to decode from, of the budget.
        least_buffer_bytes: What of it the smallest budget that works has.
    """

    share: float
    buffer_bytes: int
    least_buffer_bytes: int

    def held_bytes(self, streamed_bytes: int) -> int:
        """Host memory that holds the encoded form of so many streamed bytes."""
        return round(streamed_bytes * SHARE * (1 - self.share) / (1 - SHARE))


def encoded_of(
    sizes: ModelSizes, compress: str, vram_bytes: int, resident: Sequence[int] | None = None
) -> Encoded | None:
    """What ``compress`` does on a GPU with a budget; ``None`` where it does nothing.

    Args:
        sizes: The model.
        compress: As for `dgls_torch.stream`.
        vram_bytes: The budget for all weights.
        resident: The blocks that stay whole, by order.
    """
    if compress == "off" or sizes.encodable_bytes == 0:
        return None
    blocks = [sum(block.tensor_bytes) for block in sizes.blocks]
    stay = {number for number in resident or () if 0 <= number < len(blocks)}
    others = [size for number, size in enumerate(blocks) if number not in stay]
    needed = sizes.outside_bytes + sum(blocks[number] for number in stay) + max(others, default=0)
    buffer_bytes = decoder_bytes(compress, vram_bytes, needed)
    if buffer_bytes == 0:
        return None
    share = 1 - (1 - SHARE) * sizes.encodable_bytes / sum(blocks)
    return Encoded(share, buffer_bytes, 0 if compress == "auto" else BUFFER_LEAST)


def with_encoded(
    outside_bytes: int, bytes_per_s: float, encoded: Encoded | None
) -> tuple[int, float]:
    """Bytes outside of blocks with the buffer, and the rate of weights as they are used."""
    if encoded is None:
        return outside_bytes, bytes_per_s
    return outside_bytes + encoded.buffer_bytes, bytes_per_s / encoded.share

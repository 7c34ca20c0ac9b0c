"""What weights that go over the link encoded would change in a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dgls_torch.encoding import BUFFER_LEAST, decoder_bytes
from dgls_torch.layout import least_of_blocks
from dgls_torch.planner.form import make_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dgls_torch.planner.form import Inputs
    from dgls_torch.planner.sizes import ModelSizes

HIDES = 0.93
"""What copies may take of the compute for ``"auto"`` to encode nothing (adapt/balance.rs)."""


@dataclass(frozen=True)
class Encoded:
    """Weights that go over the link encoded, as far as they may.

    Attributes:
        share: Bytes on the link for each byte that is streamed, if what is streamed is like all.
        held_share: Of those the encoded ones, which the host holds.
        buffer_bytes: Device memory to decode from, of the budget.
        least_buffer_bytes: What of it the smallest budget that works has.
    """

    share: float
    held_share: float
    buffer_bytes: int
    least_buffer_bytes: int

    def held_bytes(self, streamed_bytes: int) -> int:
        """Host memory that holds the encoded form of so many streamed bytes."""
        return round(streamed_bytes * self.held_share)


def _encoded_of(
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
    needed = sizes.outside_bytes + sum(least_of_blocks(blocks, resident or ()))
    buffer_bytes = decoder_bytes(compress, vram_bytes, needed)
    if buffer_bytes == 0:
        return None
    held_share = sizes.encoded_bytes / sum(blocks)
    share = 1 - sizes.encodable_bytes / sum(blocks) + held_share
    return Encoded(share, held_share, buffer_bytes, 0 if compress == "auto" else BUFFER_LEAST)


def inputs_of(
    sizes: ModelSizes,
    vram_bytes: int,
    compute_s: Sequence[float],
    h2d_bytes_per_s: float,
    copy_latency_s: float,
    compress: str,
    **options: Any,
) -> tuple[Inputs, int, Encoded | None]:
    """A model in the planner's form within a budget for all its weights, as `make_inputs`.

    Returns:
        The inputs, with the rate of weights as they are used; bytes outside of blocks, with what
        is decoded from; and what goes encoded.
    """
    encoded = _encoded_of(sizes, compress, vram_bytes, options.get("resident"))
    outside_bytes = sizes.outside_bytes
    if encoded is not None:
        outside_bytes += encoded.buffer_bytes
        h2d_bytes_per_s /= encoded.share
    room = vram_bytes - outside_bytes
    inputs = make_inputs(sizes, room, compute_s, h2d_bytes_per_s, copy_latency_s, **options)
    return inputs, outside_bytes, encoded

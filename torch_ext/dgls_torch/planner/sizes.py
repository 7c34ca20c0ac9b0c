"""What a plan needs to know of a model: bytes of each tensor, and where its FLOPs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgls_torch.encoding import encoded_bytes, may_encode
from dgls_torch.files import SafetensorsSource
from dgls_torch.layout import Anatomy, aligned

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dgls_torch.config import StreamConfig


@dataclass(frozen=True)
class BlockSizes:
    """One block: its tensors' bytes as they lie in the arena, and the elements of its matrices."""

    name: str
    tensor_bytes: tuple[int, ...]
    matrix_elements: int


@dataclass(frozen=True)
class ModelSizes:
    """The blocks of a model in order of registration, and the bytes of all else.

    Of the blocks' bytes ``encodable_bytes`` may go over the link encoded, then ``encoded_bytes``.
    """

    blocks: tuple[BlockSizes, ...]
    outside_bytes: int
    encodable_bytes: int = 0
    encoded_bytes: int = 0

    def compute_s(self, tokens: int, tflops: float) -> list[float]:
        """Seconds of each block, from two operations for each element of a matrix and token."""
        return [2 * b.matrix_elements * tokens / (tflops * 1e12) for b in self.blocks]

    def split_s(self, seconds: float) -> list[float]:
        """The seconds of all blocks together split by the elements of their matrices."""
        total = sum(block.matrix_elements for block in self.blocks)
        if total == 0:
            return [seconds / len(self.blocks)] * len(self.blocks)
        return [seconds * block.matrix_elements / total for block in self.blocks]


def sizes_of(model: nn.Module, config: StreamConfig) -> ModelSizes:
    """Finds the blocks that `dgls_torch.stream` would, wherever the model's bytes are.

    Raises:
        ValueError: There are no blocks, or they overlap.
    """
    source = None if config.source_path is None else SafetensorsSource(config.source_path)
    anatomy = Anatomy(model, config, source, _anywhere)
    blocks = [
        BlockSizes(
            name=name,
            tensor_bytes=tuple(aligned(p.bytes) for weight in weights for p in weight.parts),
            matrix_elements=sum(w.param.numel() for w in weights if w.param.dim() > 1),
        )
        for (name, _), weights in zip(anatomy.blocks, anatomy.weights, strict=True)
    ]
    parts = [part for weights in anatomy.weights for weight in weights for part in weight.parts]
    encodable = sum(part.bytes for part in parts if may_encode(part))
    return ModelSizes(tuple(blocks), anatomy.outside_bytes, encodable, encoded_bytes(parts))


def _anywhere(name: str, tensor: torch.Tensor) -> None:
    """A plan reads no bytes, so a model may be on meta or on a device."""

"""The tensors in the arena that the hooks bind while a block runs.

They are made whenever a plan is taken up, while the device waits: one operation for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dgls_torch.weights import inner_tensors

if TYPE_CHECKING:
    from dgls_torch.weights import Weight


class Views:
    """Makes the views of all blocks."""

    def __init__(self, weights: list[list[Weight]]) -> None:
        """Takes the weights of each block."""
        self._weights = weights
        # Offsets come in the native order: those in memory first.
        self._ordered = []
        for of_block in weights:
            parts = [part for weight in of_block for part in weight.parts]
            ordered = sorted(parts, key=lambda part: part.file is not None)
            self._ordered.append([id(part) for part in ordered])

    def make(
        self, arena: torch.Tensor, uses: list[tuple[int, list[int]]]
    ) -> tuple[list[list[list[torch.Tensor] | None]], list[list[torch.Tensor]]]:
        """Makes the views of every use: its block, and the offset of each of its tensors.

        Returns:
            For each block and each use one view for each target, or ``None`` where the use is
            another block's; and for each block the tensors that were made to stand in for
            parameters, with those inside of them.
        """
        places: list[list[list[torch.Tensor] | None]] = [[None] * len(uses) for _ in self._weights]
        made: list[list[torch.Tensor]] = [[] for _ in self._weights]
        typed = _Typed(arena), _Typed(arena)
        with torch.inference_mode(False), torch.no_grad():
            for position, (block, offsets) in enumerate(uses):
                places[block][position] = self._of_use(block, offsets, typed, made[block])
        return places, made

    def _of_use(
        self,
        block: int,
        offsets: list[int],
        typed: tuple[_Typed, _Typed],
        made: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        offset_of = dict(zip(self._ordered[block], offsets, strict=True))
        views: list[torch.Tensor] = []
        for weight in self._weights[block]:
            if weight.param.is_inference():  # its views have to be inference tensors too
                with torch.inference_mode():
                    view = _bound(weight, offset_of, typed[1])
            else:
                view = _bound(weight, offset_of, typed[0])
            views += [view] * weight.target_count
            if weight.is_entry:
                made += [view, *inner_tensors(view)]
        return views


def _bound(weight: Weight, offset_of: dict[int, int], typed: _Typed) -> torch.Tensor:
    return weight.bound(
        [part.view(typed[part.dtype], offset_of[id(part)]) for part in weight.parts]
    )


class _Typed(dict[torch.dtype, torch.Tensor]):
    """The arena as elements of each type; bytes that are left over at its end are in none."""

    def __init__(self, arena: torch.Tensor) -> None:
        super().__init__()
        self._arena = arena

    def __missing__(self, dtype: torch.dtype) -> Any:
        whole = self._arena.numel() // dtype.itemsize * dtype.itemsize
        self[dtype] = self._arena[:whole].view(dtype)
        return self[dtype]

"""Tables for people."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING

from dgls_torch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dgls_torch.report import BlockPlan

_ROWS_MOST = 20
"""A table of more blocks is read by nobody."""
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
"""A part of a dotted name that is a number."""


def block_table(blocks: Sequence[BlockPlan]) -> list[str]:
    """The lines of a table of blocks; neighbours of one size share a row.

    Where that leaves many, as of layers, those of one size share a row whose names differ in their
    first number alone, which stands as ``*``: the same layer of each block.
    """
    rows = [_row(f"{same[0].name} .. {same[-1].name}", same) for same in _neighbours(blocks)]
    if len(rows) > _ROWS_MOST:
        alike: dict[tuple[str, int], list[BlockPlan]] = {}
        for block in blocks:
            key = _NUMBER.sub("*", block.name, count=1), _bytes(block)
            alike.setdefault(key, []).append(block)
        rows = min(rows, [_row(name, same) for (name, _), same in alike.items()], key=len)
    return table([("blocks", "count", "each", "resident", "streamed"), *rows])


def _neighbours(blocks: Iterable[BlockPlan]) -> list[list[BlockPlan]]:
    return [list(same) for _, same in groupby(blocks, key=_bytes)]


def _bytes(block: BlockPlan) -> int:
    return block.resident_bytes + block.streamed_bytes


def _row(name: str, same: list[BlockPlan]) -> tuple[str, ...]:
    resident = _span([block.resident_bytes for block in same])
    streamed = _span([block.streamed_bytes for block in same])
    name = name if len(same) > 1 else same[0].name
    return name, str(len(same)), format_bytes(_bytes(same[0])), resident, streamed


def _span(sizes: list[int]) -> str:
    """The least and the most of some sizes, or the one they all are."""
    least, most = format_bytes(min(sizes)), format_bytes(max(sizes))
    return most if least == most else f"{least} to {most}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for people: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  " + "  ".join([first.ljust(widths[0]), *cells]))
    return lines

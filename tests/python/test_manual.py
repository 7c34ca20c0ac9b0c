"""A choice of one's own: which blocks stay, and how many are copied ahead.

Goal: the choice is kept exactly, outputs are the resident model's, and what cannot be is refused
with the sizes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import SMALL, inputs, net, same
from torch import nn

import dgls_torch


def facts(model: nn.Module) -> tuple[int, int, int]:
    """Bytes outside of the blocks, of each block, and how many blocks there are."""
    with dgls_torch.stream(model, 1 << 30, **SMALL) as s:
        return s.plan.outside_bytes, s.plan.block_bytes // len(s.plan.blocks), len(s.plan.blocks)


@pytest.mark.parametrize("resident", [[], [0], [1, 4], ["blocks.2", 5], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("prefetch", [None, 0, 1, 2])
def test_the_choice_is_kept(resident: list[Any], prefetch: int | None) -> None:
    model, x = net(), inputs()
    expected = net()(x)
    outside, block, _ = facts(model)
    vram = outside + (len(resident) + 3) * block
    options = {**SMALL, "resident": resident, "prefetch": prefetch}
    with torch.inference_mode(), dgls_torch.stream(model, vram, **options) as s:
        for _ in range(8):
            assert same(model(x), expected)
        numbers = [int(str(r).removeprefix("blocks.")) for r in resident]
        kept = {f"blocks.{n}" for n in numbers}
        for entry in s.plan.blocks:
            assert (entry.streamed_bytes == 0) == (entry.name in kept), s.plan
            assert 0 in (entry.streamed_bytes, entry.resident_bytes), s.plan
        assert s.plan.outside_bytes + s.plan.arena_bytes <= vram


def test_a_choice_that_does_not_fit_is_refused_with_the_smallest_budget() -> None:
    model = net()
    outside, block, _ = facts(model)
    options = {**SMALL, "resident": [0, 1, 2]}
    with pytest.raises(ValueError, match="the resident blocks take") as refused:
        dgls_torch.stream(model, outside + 4 * block - 256, **options)
    smallest = int(str(refused.value).rsplit("(", 1)[1].split()[0])
    dgls_torch.stream(model, smallest, **options).detach()
    with pytest.raises(ValueError, match="too small"):
        dgls_torch.stream(model, smallest - 1, **options)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"resident": [6]}, "there are blocks 0 to 5"),
        ({"resident": ["blocks.9"]}, "'blocks.0' to 'blocks.5'"),
        ({"resident": [-1]}, "from 0 on, found -1"),
        ({"resident": [1, 1]}, "found 1 twice"),
        ({"prefetch": -1}, "0 to 1000 blocks, found -1"),
        ({"prefetch": 1001}, "0 to 1000 blocks, found 1001"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], needed: str) -> None:
    with pytest.raises(ValueError, match=needed):
        dgls_torch.stream(net(), 1 << 20, **SMALL, **options)


@pytest.mark.parametrize(
    "options", [{"resident": 3}, {"resident": [1.5]}, {"resident": "0"}, {"prefetch": 1.0}]
)
def test_wrong_types_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        dgls_torch.stream(net(), 1 << 20, **SMALL, **options)


@pytest.mark.parametrize("blocks", [3, 5, 6])
def test_without_adapting_addresses_stay(blocks: int) -> None:
    """Else an odd number of blocks takes turns: a cycle of several passes."""
    model, x = net(blocks), inputs()
    outside, block, _ = facts(model)
    where: list[list[int]] = []

    def note(module: nn.Module, _: Any) -> None:
        where[-1].append(module.weight.data_ptr())

    for part in model.blocks:
        part.up.register_forward_pre_hook(note)
    vram = outside + (5 * block) // 2
    with torch.inference_mode(), dgls_torch.stream(model, vram, adapt=False, **SMALL) as s:
        for _ in range(12):
            where.append([])
            model(x)
        assert s.report().adopted == 0
    assert all(places == where[-1] for places in where[2:])

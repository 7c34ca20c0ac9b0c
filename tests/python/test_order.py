"""Blocks may run in any order, any number of times, with any arguments.

Goal: the order of use is learned, and one that was not foreseen costs copies, never a wrong byte.
Method: a model whose forward is told which blocks to run, beside a twin that is not streamed, over
many seeded passes in one stream; blocks with every kind of argument and result.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers import SMALL, Block, budgets, check, inputs, net, same
from torch import nn

import dgls_torch

ORDERS = {
    "backwards": [5, 4, 3, 2, 1, 0],
    "twice": [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5],
    "each twice": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
    "u-shaped": [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0],
    "half": [0, 2, 4],
    "one": [3],
    "one often": [3] * 7,
    "odd": [1, 5, 3, 3, 5],
    "none": [],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_fixed_order_is_learned_in_one_pass(order: list[int]) -> None:
    model, x = net(), inputs()
    expected = net()(x, order)
    for size in budgets(model):
        with torch.inference_mode(), dgls_torch.stream(model, size, **SMALL) as s:
            for _ in range(2):
                assert same(model(x, order), expected)
            learned = s.report()
            for _ in range(4):
                assert same(model(x, order), expected)
            report = s.report()
        assert report.mispredicted == learned.mispredicted
        # The first use after a plan was adopted is fetched when it comes.
        assert report.on_demand - learned.on_demand <= report.adopted - learned.adopted
        assert report.rebuilds - report.adopted == (0 if order in ([], list(range(6))) else 1)
        assert report.passes == 6
        assert report.uses == 6 * len(order)
        used = list(dict.fromkeys([*order, *range(6)]))
        assert [block.name for block in report.plan.blocks] == [f"blocks.{i}" for i in used]


def test_the_registered_order_needs_no_learning() -> None:
    model, x = net(), inputs()
    for report in check(model, lambda m: m(x), passes=6):
        assert report.mispredicted == 0
        assert report.rebuilds == report.adopted
        # The very first block, and the first one after a plan was adopted.
        assert 1 <= report.on_demand <= 1 + report.adopted


@pytest.mark.parametrize("seed", range(8))
def test_a_new_order_in_every_pass(seed: int) -> None:
    chance = random.Random(seed)
    model, twin, x = net(7), net(7), inputs()
    for size in chance.sample(budgets(model), 3):
        order = list(range(7))
        with torch.inference_mode(), dgls_torch.stream(model, size, **SMALL) as s:
            for number in range(60):
                change = chance.randrange(8)
                if change == 0:
                    chance.shuffle(order)
                elif change == 1:
                    order = [i for i in range(7) if chance.random() < 0.7]
                elif change == 2:
                    order = chance.choices(range(7), k=chance.randrange(20))
                elif change == 3:
                    order = list(range(7))
                got = model(x, order)
                assert same(got, twin(x, order)), f"pass {number}, {order}, seed {seed}\n{s.plan}"


def test_blocks_that_slept_for_many_passes_wake_up() -> None:
    model, twin, x = net(), net(), inputs()
    for size in budgets(model):
        with torch.inference_mode(), dgls_torch.stream(model, size, **SMALL) as s:
            for _ in range(4):
                assert same(model(x, [0, 1, 2]), twin(x, [0, 1, 2]))
            before = s.report().mispredicted
            for order in ([0, 4, 1, 2], [5, 5], [4], [0, 1, 2], [3, 4, 5]):
                assert same(model(x, order), twin(x, order))
            assert s.report().mispredicted > before


def test_blocks_outside_of_any_pass() -> None:
    model, twin, x = net(), net(), inputs()
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **SMALL):
        for index in [4, 4, 0, 1, 5, 2, 3, 0, 1, 0, 1]:
            assert same(model.blocks[index](x), twin.blocks[index](x))
        assert same(model(x), twin(x))


def test_parts_of_a_block_outside_of_the_block() -> None:
    model, twin, x = net(), net(), inputs()
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **SMALL):
        for _ in range(2):
            assert same(model.blocks[3].up(x), twin.blocks[3].up(x))
            assert same(model.blocks[3].forward(x), twin.blocks[3].forward(x))
            assert same(model(x), twin(x))


def test_one_module_in_several_places_is_one_block() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(2)
        a, b, c = Block(), Block(), Block()
        return nn.Sequential(a, b, a, c, b, a, c).eval()

    model = build()
    reports = check(model, lambda m: m(inputs()), passes=5)
    assert [len(report.plan.blocks) for report in reports] == [3] * len(reports)
    assert {report.rebuilds for report in reports} == {1}


def test_a_block_that_is_used_by_another_model() -> None:
    model, twin, x = net(), net(), inputs()
    other = nn.Sequential(model.blocks[1], nn.Tanh(), model.blocks[4])
    want = nn.Sequential(twin.blocks[1], nn.Tanh(), twin.blocks[4])(x)
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **SMALL):
        for _ in range(3):
            assert same(model(x), twin(x))
            assert same(other(x), want)


class Talkative(nn.Module):
    """A block with every kind of argument, and a nested result."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner = Block(width)

    def forward(
        self, x: torch.Tensor, *rest: Any, mask: Any = None, extra: Any = None, **kw: Any
    ) -> Any:
        y = self.inner(x)
        for value in rest:
            y = y if value is None else y + value
        if mask is not None:
            y = y * mask
        if extra is not None:
            y = y + extra["bias"][0]
        return {"out": y, "more": [(y + 1, None)], **kw}


class Telling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.ModuleList(Talkative() for _ in range(5))

    def forward(self, x: torch.Tensor) -> Any:
        seen = []
        for index, layer in enumerate(self.layers):
            arguments: tuple[tuple[Any, ...], dict[str, Any]] = [
                ((x,), {}),
                ((), {"x": x}),
                ((x, None, x, 2.5), {"mask": x > 0}),
                ((x,), {"extra": {"bias": (x, "text")}, "name": "a", "number": 3, "none": None}),
                ((), {"mask": None, "x": x, "extra": None}),
            ][index]
            result = layer(*arguments[0], **arguments[1])
            seen.append(result)
            x = result["out"] if index % 2 else result["more"][0][0]
        return seen


def test_arguments_and_results_of_any_kind() -> None:
    check(Telling().eval(), lambda m: m(inputs()))


def test_a_block_without_arguments() -> None:
    class Bare(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(width))

        def forward(self, x: torch.Tensor | None = None) -> Any:
            return self.table * 2 if x is None else x + self.table

    model = net(block=Bare)
    check(model, lambda m: [block() for block in m.blocks])


def test_a_block_that_returns_its_own_weight() -> None:
    class Table(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(width))

        def forward(self) -> torch.Tensor:
            return self.table

    model = net(block=Table)
    check(model, lambda m: [block() for block in m.blocks])

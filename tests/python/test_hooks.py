"""Our hooks beside those of others, and exceptions of every kind in the middle of a block.

Goal: whatever is raised wherever, the next call is right and a detach leaves the model as it was;
hooks of others see the weights that the block computes with.
Method: a model with a fault that is switched on in one block, and hooks of every kind around it.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from helpers import SMALL, Block, Snapshot, budgets, check, inputs, net, same
from torch import nn

import dgls_torch


class Stop(BaseException):
    """No Exception: torch calls no hook for it."""


ERRORS = [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, Stop]


class Faulty(Block):
    """A block that raises what it is told to, in the middle."""

    error: type[BaseException] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.norm(x))
        if self.error is not None:
            raise self.error
        return self.down(x)


def masters(model: nn.Module) -> list[tuple[int, int]]:
    return [(id(p), p.data_ptr()) for p in model.parameters()]


@pytest.mark.parametrize("index", [0, 3, 5])
@pytest.mark.parametrize("error", ERRORS)
def test_after_an_exception_in_a_block(error: type[BaseException], index: int) -> None:
    model, x = net(block=Faulty), inputs()
    before = Snapshot(model)
    with torch.inference_mode():
        expected = model(x)
        for size in budgets(model):
            with dgls_torch.stream(model, size, **SMALL) as s:
                for _ in range(3):
                    model.blocks[index].error = error
                    with pytest.raises(error):
                        model(x)
                    model.blocks[index].error = None
                    assert same(model(x), expected)
                assert s.report().passes == 3
                model.blocks[index].error = error
                with pytest.raises(error):
                    model(x)
            del model.blocks[index].error
            before.check(model)
            assert same(model(x), expected)


@pytest.mark.parametrize("error", ERRORS)
def test_masters_are_back_after_an_exception(error: type[BaseException]) -> None:
    model, x = net(block=Faulty), inputs()
    before = masters(model)
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **SMALL) as s:
        model.blocks[2].error = error
        for call in (model, model.blocks[2]):
            with pytest.raises(error):
                call(x)
            if issubclass(error, Exception):
                assert masters(model) == before
            s.replan()
            assert masters(model) == before
            with pytest.raises(error):
                call(x)
            model(x, [])  # a pass without any block
            assert masters(model) == before
            with pytest.raises(error):
                call(x)
            model.blocks[1](x)  # another block takes back what was left bound
            assert masters(model) == before


@pytest.mark.parametrize("error", ERRORS)
def test_an_exception_that_leaves_the_with_block(error: type[BaseException]) -> None:
    model, x = net(block=Faulty), inputs()
    model.blocks[4].error = error
    before = Snapshot(model)
    with (
        pytest.raises(error),
        torch.no_grad(),
        dgls_torch.stream(model, budgets(model)[0], **SMALL),
    ):
        model(x)
    before.check(model)


@pytest.mark.parametrize("where", ["pre", "post", "prepended", "always"])
@pytest.mark.parametrize("first", [True, False], ids=["before us", "after us"])
@pytest.mark.parametrize("error", ERRORS)
def test_an_exception_in_a_hook_of_others(
    error: type[BaseException], first: bool, where: str
) -> None:
    model, x, on = net(), inputs(), [False]

    def hook(*_: Any) -> None:
        if on[0]:
            raise error

    def register(block: nn.Module) -> Any:
        if where in ("pre", "prepended"):
            return block.register_forward_pre_hook(hook, prepend=where == "prepended")
        return block.register_forward_hook(hook, always_call=where == "always")

    with torch.inference_mode():
        expected = model(x)
        theirs = register(model.blocks[2]) if first else None
        with dgls_torch.stream(model, budgets(model)[1], **SMALL):
            theirs = theirs or register(model.blocks[2])
            for _ in range(3):
                assert same(model(x), expected)
                on[0] = True
                with pytest.raises(error):
                    model(x)
                on[0] = False
                assert same(model(x), expected)
        theirs.remove()
        assert not any(module._forward_hooks for module in model.modules())
        assert same(model(x), expected)


def test_hooks_of_others_see_the_weights_that_compute() -> None:
    model, x, seen = net(), inputs(), []
    host = {id(p): p.data_ptr() for p in model.parameters()}

    def look(module: nn.Module, *_: Any) -> None:
        for weight in module.parameters():
            seen.append(weight.data_ptr() != host[id(weight)])
            seen.append(not weight.isnan().any())

    for block in model.blocks:
        block.register_forward_pre_hook(look)
        block.register_forward_pre_hook(look, prepend=True)
        block.register_forward_pre_hook(look, with_kwargs=True)
        block.register_forward_hook(look)
        block.register_forward_hook(look, with_kwargs=True)
        block.register_forward_hook(look, always_call=True)
        block.up.register_forward_hook(look)
    check(model, lambda m: m(x))
    assert len(seen) > 1000
    # Outside of a stream, in the reference calls, they are the host's own.
    assert sum(seen) > len(seen) * 0.8


def test_hooks_of_others_may_change_arguments_and_results() -> None:
    model = net()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
        block.register_forward_pre_hook(lambda _, a, k: ((a[0] * 2,), k), with_kwargs=True)
        block.register_forward_hook(lambda _m, _a, out: out - 1)
        block.register_forward_hook(lambda _m, _a, _k, out: out * 3, with_kwargs=True)
    model.register_forward_pre_hook(lambda _, args: (args[0] + 2, *args[1:]))
    model.register_forward_hook(lambda _m, _a, out: out * 5)
    check(model, lambda m: m(inputs()))


def test_hooks_that_come_and_go_while_streamed() -> None:
    model, twin, x = net(), net(), inputs()
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **SMALL):
        theirs = [b.register_forward_hook(lambda _m, _a, out: out + 1) for b in model.blocks]
        others = [b.register_forward_hook(lambda _m, _a, out: out + 1) for b in twin.blocks]
        assert same(model(x), twin(x))
        for hook in theirs + others:
            hook.remove()
        for block in (*model.blocks, *twin.blocks):
            block.register_forward_pre_hook(lambda _, args: (args[0] * 2,), prepend=True)
        assert same(model(x), twin(x))
    assert all(len(b._forward_pre_hooks) == 1 and not b._forward_hooks for b in model.blocks)


@pytest.mark.parametrize("other", [2, 3])
@pytest.mark.parametrize("name", ["__call__", "forward"])
def test_a_block_inside_a_running_block(name: str, other: int) -> None:
    model, x, deep = net(), inputs(), []
    before = Snapshot(model)

    def call(*_: Any) -> None:
        if not deep:
            deep.append(1)
            getattr(model.blocks[other], name)(x)
            deep.clear()

    with torch.inference_mode():
        expected = model(x)
        with dgls_torch.stream(model, budgets(model)[0], **SMALL):
            hook = model.blocks[2].up.register_forward_hook(call)
            if name == "forward":  # no hook of ours, so it runs on the host's weights
                assert same(model(x), expected)
            else:
                with pytest.raises(
                    RuntimeError, match=r"'blocks\.2' was still running when another"
                ):
                    model(x)
            hook.remove()
            assert same(model(x), expected)
        before.check(model)


def test_a_view_of_a_weight_as_result_is_refused() -> None:
    class Table(nn.Module):
        make: Any = staticmethod(lambda view: view)

        def __init__(self, width: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, width))

        def forward(self, x: torch.Tensor) -> Any:
            return self.make(x + self.table[0])

    model, x = net(block=Table), inputs()
    block = model.blocks[2]
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **SMALL):
        for make in (
            lambda _: block.table[3],
            lambda _: block.table.t(),
            lambda _: block.table.expand(2, 8, 32),
            lambda x: (x, block.table[1:2]),
            lambda x: [x, (None, {"a": x, "b": block.table.detach()})],
            lambda x: {"out": x, "table": block.table.view(-1)},
        ):
            block.make = make
            with pytest.raises(RuntimeError, match=r"'blocks\.2' returns a view of one of its"):
                block(x)
            with pytest.raises(RuntimeError, match="returns a view"):
                model(x)
        for make in (lambda _: block.table[3].clone(), lambda _: 3, lambda _: (None, "text", x)):
            block.make = make
            block(x)
        block.make = lambda _: block.table  # the parameter itself is the master's again
        assert same(block(x), net(block=Table).blocks[2].table)


def test_nothing_of_the_hooks_is_left_behind() -> None:
    model = net()
    before = Snapshot(model)
    for _ in range(3):
        s = dgls_torch.stream(model, 1 << 20, **SMALL)
        with torch.no_grad():
            model(inputs())
        s.detach()
        s.detach()
        before.check(model)
        assert model._forward_pre_hooks == {}
        assert all(block._forward_hooks_always_called == {} for block in model.blocks)
    del s
    gc.collect()
    assert "dgls" not in repr([*model.modules()]).lower()

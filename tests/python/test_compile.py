"""torch.compile of a streamed model, and streaming of a compiled one.

Goal: the resident model's bits in every combination, no warning, and no graph that is compiled anew
because weights lie elsewhere in the next pass.
Method: the eager backend, which runs what dynamo captured; the second pass on must not recompile,
and warnings are errors here, as in all tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import SMALL, Snapshot, budgets, inputs, net, same
from torch import nn

import dgls_torch
from dgls_torch.native import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_model(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compile_in_place(model: nn.Module) -> Any:
    model.compile(backend="eager")
    return model


def compile_blocks(model: nn.Module) -> Any:
    for block in model.blocks:
        block.compile(backend="eager")
    return model


def compile_forwards(model: nn.Module) -> Any:
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager")
    return model


def compile_inside(model: nn.Module) -> Any:
    for block in model.blocks:
        block.up = torch.compile(block.up, backend="eager")
    return model


WAYS = [compile_model, compile_in_place, compile_blocks, compile_forwards, compile_inside]


@pytest.mark.parametrize("compile_it", WAYS)
@pytest.mark.parametrize("first", ["stream", "compile"])
def test_compiled_and_streamed(compile_it: Any, first: str) -> None:
    x, other = inputs(), inputs(seed=5)
    model = net(4)
    with torch.inference_mode():
        expected, more = model(x), model(other)
    called = compile_it(model) if first == "compile" else None
    before = Snapshot(model) if first == "compile" else None
    for size in budgets(model)[:3]:
        with torch.inference_mode(), dgls_torch.stream(model, size, **SMALL) as s:
            called = compile_it(model) if called is None else called
            for _ in range(2):
                assert same(called(x), expected)
            with torch._dynamo.config.patch(error_on_recompile=True):
                for _ in range(4):
                    assert same(called(x), expected)
                    assert same(called(other), more)
            assert s.report().passes == 10
            assert s.report().mispredicted == 0
        with torch.inference_mode():
            assert same(called(x), expected)
    if before is not None:
        before.check(model)


def test_blocks_compile_as_a_whole() -> None:
    model, x = net(4), inputs()
    with torch.inference_mode():
        expected = model(x)
        with dgls_torch.stream(model, budgets(model)[0], **SMALL):
            for block in model.blocks:
                block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
            for _ in range(3):
                assert same(model(x), expected)


def test_a_compiled_model_may_be_streamed_by_its_wrapper() -> None:
    model, x = net(4), inputs()
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        expected = model(x)
        with dgls_torch.stream(compiled, budgets(model)[0], **SMALL) as s:
            for _ in range(3):
                assert same(compiled(x), expected)
            assert s.report().uses == 12
        assert same(compiled(x), expected)


def test_what_hooks_call_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """They plan anew, and move versions, in the middle of a compiled model."""
    order = [5, 3, 4, 1, 0, 2]
    model, x = net().requires_grad_(False), inputs()
    expected = model(x, order)
    compiled = torch.compile(model, backend="eager")
    frames = torch._dynamo.utils.counters["frames"]
    rebuild, traced = Engine.rebuild, []

    def counted(engine: Engine) -> None:
        before = frames["total"]
        rebuild(engine)
        traced.append(frames["total"] - before)

    monkeypatch.setattr(Engine, "rebuild", counted)
    with dgls_torch.stream(model, budgets(model)[0], **SMALL) as s:
        for mode in (torch.no_grad, torch.enable_grad):
            for _ in range(3):
                with mode():
                    assert same(compiled(x, order), expected)
        assert s.report().rebuilds == 1
    assert traced == [0]


def test_hooks_stay_untraced_when_dynamo_forgets() -> None:
    model, x = net(4), inputs()
    with torch.inference_mode():
        expected = model(x)
        with dgls_torch.stream(model, budgets(model)[0], **SMALL):
            for _ in range(3):
                torch._dynamo.reset()
                compiled = torch.compile(model, backend="eager")
                for _ in range(2):
                    assert same(compiled(x), expected)


def test_a_dynamo_without_skipped_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are no public ones: without them the hooks are slower, and that is all."""
    monkeypatch.delattr("torch._C._dynamo.eval_frame.set_code_exec_strategy")
    model, x = net(4), inputs()
    with torch.inference_mode():
        expected = model(x)
        with dgls_torch.stream(model, budgets(model)[0], **SMALL):
            compiled = torch.compile(model, backend="eager")
            for _ in range(2):
                assert same(compiled(x), expected)

"""Weights that are changed while they stream: the next use has the new ones, or refuses.

Goal: no result is ever computed from the weights of yesterday.
Method: every way to change a weight, between passes and in the middle of one, under every budget,
beside a twin that is not streamed; sources that a change cannot reach have to refuse.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import SMALL, Pair, Snapshot, budgets, inputs, net, same
from safetensors.torch import save_file
from torch import nn

import dgls_torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def wrapped(seed: int = 0) -> nn.Module:
    model = net(seed=seed)
    for block in model.blocks:
        payload = torch.randint(-9, 9, (32, 32), dtype=torch.int8)
        block.norm = nn.Linear(32, 32)
        block.norm.weight = nn.Parameter(Pair(payload, torch.rand(32, 1)), requires_grad=False)
    return model


def add_to_one(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[2].up.weight.add_(0.5)


def add_to_all(model: nn.Module) -> None:
    with torch.no_grad():
        for number, weight in enumerate(model.blocks.parameters()):
            weight += number / 100


def add_in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model.blocks[1].down.bias.mul_(3)


def load(model: nn.Module) -> None:
    model.load_state_dict(net(seed=9).state_dict())


def load_one_block(model: nn.Module) -> None:
    model.blocks[4].load_state_dict(net(seed=9).blocks[4].state_dict())


def initialise(model: nn.Module) -> None:
    torch.manual_seed(11)
    for block in model.blocks:
        nn.init.normal_(block.down.weight)


def train(model: nn.Module) -> None:
    model.blocks[3].requires_grad_(True)
    optimizer = torch.optim.SGD(model.blocks[3].parameters(), lr=0.1)
    for weight in model.blocks[3].parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


CHANGES = [
    add_to_one,
    add_to_all,
    add_in_inference_mode,
    load,
    load_one_block,
    initialise,
    train,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_holds_from_the_next_use_on(change: Callable[[nn.Module], None]) -> None:
    for size in budgets(net()):
        model, twin, x = net(), net(), inputs()
        with dgls_torch.stream(model, size, adapt=False, **SMALL) as s:
            for _ in range(2):
                with torch.inference_mode():
                    assert same(model(x), twin(x))
                    assert same(model(x), twin(x))
                    moved = s.report().h2d_bytes_total
                    model(x)
                    usual = s.report().h2d_bytes_total - moved
                change(model)
                change(twin)
                with torch.inference_mode():
                    assert same(model(x), twin(x)), s.plan
                    assert same(model.blocks[2](x), twin.blocks[2](x))
                    model(x)
                    moved = s.report().h2d_bytes_total
                    model(x)
                    assert s.report().h2d_bytes_total - moved == usual, "reloaded for ever"
        assert same(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_a_change_in_the_middle_of_a_pass(ahead: int) -> None:
    """A hook changes a block whose copies may be on their way already."""

    def hooked(model: nn.Module) -> nn.Module:
        def change(*_: Any) -> None:
            with torch.no_grad():
                model.blocks[ahead].up.weight.mul_(1.25)

        model.blocks[0].register_forward_hook(change)
        return model

    for size in budgets(net()):
        model, twin, x = hooked(net()), hooked(net()), inputs()
        with torch.inference_mode(), dgls_torch.stream(model, size, **SMALL) as s:
            for number in range(5):
                assert same(model(x), twin(x)), f"pass {number}\n{s.plan}"


@pytest.mark.parametrize("make", [net, wrapped], ids=["plain", "wrapped"])
def test_a_block_that_changes_its_own_weights_is_refused(make: Any) -> None:
    model, x, on = make(), inputs(), [True]

    def change(*_: Any) -> None:
        with torch.no_grad():
            weight = model.blocks[2].norm.weight
            if on[0]:
                weight.copy_(Pair(weight.payload, weight.scale * 2) if make is wrapped else -weight)

    hook = model.blocks[2].up.register_forward_hook(change)
    for size in (budgets(model)[0], 1 << 30):
        with torch.inference_mode(), dgls_torch.stream(model, size, **SMALL):
            for call in (model, model.blocks[2]):
                with pytest.raises(RuntimeError, match=r"blocks\.2' changes its weights while it"):
                    call(x)
            on[0] = False
            assert same(model(x), make()(x))
            on[0] = True
    hook.remove()
    with torch.inference_mode():
        assert same(list(model.parameters())[2:4], list(make().parameters())[2:4])


def test_a_change_by_a_hook_of_others_before_the_pass() -> None:
    def hooked(model: nn.Module) -> nn.Module:
        def change(*_: Any) -> None:
            with torch.no_grad():
                model.blocks[0].up.weight.mul_(1.25)

        model.register_forward_pre_hook(change)
        return model

    for size in budgets(net()):
        model, twin, x = hooked(net()), hooked(net()), inputs()
        with torch.inference_mode(), dgls_torch.stream(model, size, **SMALL):
            for _ in range(4):
                assert same(model(x), twin(x))


def test_blocks_that_are_called_without_the_model_see_changes_too() -> None:
    for size in budgets(net()):
        model, twin, x = net(), net(), inputs()
        with torch.inference_mode(), dgls_torch.stream(model, size, **SMALL):
            for _ in range(3):
                for index in range(6):
                    assert same(model.blocks[index](x), twin.blocks[index](x))
                for one in (model, twin):
                    add_in_inference_mode(one)


@pytest.mark.parametrize("inner", [False, True])
def test_changes_of_wrapped_weights(inner: bool) -> None:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for block in model.blocks:
                if inner:
                    block.norm.weight.scale.mul_(2)
                else:
                    block.norm.weight.copy_(Pair(block.norm.weight.payload, torch.ones(32, 1)))

    for size in budgets(wrapped()):
        model, twin, x = wrapped(), wrapped(), inputs()
        with dgls_torch.stream(model, size, **SMALL):
            for _ in range(3):
                with torch.inference_mode():
                    assert same(model(x), twin(x))
                change(model)
                change(twin)


def replace_data(model: nn.Module) -> None:
    weight = model.blocks[2].up.weight
    weight.data = weight.data * 2


def to_half_and_back(model: nn.Module) -> None:
    model.half().float()


def replace_wrapped(model: nn.Module) -> None:
    old = model.blocks[2].norm.weight
    made = Pair(old.payload, old.scale * 2)
    model.blocks[2].norm.weight = nn.Parameter(made, requires_grad=False)


@pytest.mark.parametrize("change", [replace_data, to_half_and_back, replace_wrapped])
def test_a_replaced_weight_is_refused_until_detach(change: Callable[[nn.Module], None]) -> None:
    make = wrapped if change is replace_wrapped else net
    for size in (budgets(make())[0], 1 << 30):
        model, twin, x = make(), make(), inputs()
        with torch.inference_mode():
            with dgls_torch.stream(model, size, **SMALL):
                model(x)
                change(model)
                for call in (model, model, model.blocks[2]):
                    with pytest.raises(RuntimeError, match=r"blocks\.\d' was replaced by another"):
                        call(x)
            change(twin)
            assert same(model(x), twin(x))


def test_a_new_parameter_in_the_place_of_one_is_used() -> None:
    model, twin, x = net(), net(), inputs()
    with torch.inference_mode(), dgls_torch.stream(model, 1 << 30, **SMALL):
        model(x)
        for one in (model, twin):
            one.load_state_dict(net(seed=4).state_dict(), assign=True)
        assert same(model(x), twin(x))
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_what_streams_from_a_file_refuses_changes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "net.safetensors"
    save_file(net().state_dict(), path)
    with torch.device(kind):
        model = net()
    x = inputs()
    with torch.inference_mode(), dgls_torch.stream(model, 1 << 30, source=path, **SMALL):
        expected = model(x)
        with torch.no_grad():
            model.blocks[2].up.weight.add_(1)
        for call in (model, model, model.blocks[2]):
            with pytest.raises(RuntimeError, match=r"blocks\.2' was changed in place, but it str"):
                call(x)
        assert same(model.blocks[1](x), net().blocks[1](x))
    with torch.inference_mode(), dgls_torch.stream(model, 1 << 30, source=path, **SMALL):
        assert same(model(x), expected)


def test_grad_mode_and_exceptions_are_no_changes(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file(net().state_dict(), path)
    model, x = net().requires_grad_(False), inputs()
    model.blocks[1].up.weight = model.blocks[4].up.weight
    expected = model(x)
    broken = [False]

    def fault(*_: Any) -> None:
        if broken[0]:
            raise ValueError

    model.blocks[3].up.register_forward_hook(fault)
    for options in ({"source": path}, {}):
        with dgls_torch.stream(model, 1 << 30, **SMALL, **options) as s:
            for _ in range(3):
                broken[0] = True
                with pytest.raises(ValueError, match=r"^$"):
                    model(x)
                broken[0] = False
                model.blocks[4](x)
                assert options or same(model(x), expected)
            assert s.report().h2d_bytes_total == s.plan.block_bytes, "reloaded"


def test_state_dict_of_a_streamed_model_is_the_models() -> None:
    model, x = net(), inputs()
    plain = copy.deepcopy(model.state_dict())
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **SMALL):
        for _ in range(2):
            model(x)
            state = model.state_dict()
            assert list(state) == list(plain)
            assert same(list(state.values()), list(plain.values()))
            assert [id(p) for _, p in model.named_parameters()] == [
                id(p) for p in model.parameters()
            ]
    Snapshot(model).check(model)

"""What stays on the device for as long as a stream lasts, and how it comes back.

Goal: all outside of the blocks is moved once and comes back as the same objects and memory,
together with what happened to it on the device.
Method: a device that is the CPU under another name, so that every move is a copy; on a machine with
a GPU the same through a stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import Pair, Snapshot, budgets, inputs, net, same
from torch import nn

import dgls_torch
from dgls_torch.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Callable

ELSEWHERE = torch.device("cpu", 0)


class Model(nn.Module):
    """Parameters and buffers of all kinds, outside of any block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.linear.weight
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("cache", torch.zeros(2, 8))
        self.register_buffer("nothing", None)
        made = Pair(torch.randint(0, 9, (8, 8), dtype=torch.int8), torch.rand(8, 1))
        self.wrapped = nn.Parameter(made, requires_grad=False)


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], Placement]:
    real = torch.Tensor.to

    def copy(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        return real(tensor, *args).clone() if args == (ELSEWHERE,) else real(tensor, *args)

    monkeypatch.setattr(torch.Tensor, "to", copy)

    def place(model: nn.Module) -> Placement:
        placement = Placement(ELSEWHERE, None)
        modules = list(model.named_modules())
        placement.place_parameters(modules)
        placement.place_buffers(modules)
        return placement

    return place


def test_everything_moves_and_comes_back(placed: Callable[[nn.Module], Placement]) -> None:
    model = Model()
    before = Snapshot(model)
    where = {name: p.data_ptr() for name, p in model.state_dict().items() if name != "wrapped"}
    placement = placed(model)
    moved = {name: p.data_ptr() for name, p in model.state_dict().items() if name != "wrapped"}
    assert not set(where.values()) & set(moved.values())
    assert model.tied.weight is model.linear.weight
    plain = [t for t in [*model.parameters(), *model.buffers()] if t is not model.wrapped]
    parts = [*plain, model.wrapped.payload, model.wrapped.scale]
    assert placement.bytes == sum(part.numel() * part.element_size() for part in parts)
    for _ in range(2):
        placement.restore()
        before.check(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changes_in_place_come_back_too(
    placed: Callable[[nn.Module], Placement], mode: Any
) -> None:
    model, twin = Model(), Model()
    where = {name: id(p) for name, p in model.named_parameters()}
    places = [model.linear.weight.data_ptr(), model.cache.data_ptr(), id(model.norm.running_mean)]
    placement = placed(model)
    for one in (model, twin):
        with mode():
            one.linear.weight.add_(1)
            one.cache.add_(2)
            one.norm(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)))
            one.wrapped.copy_(Pair(one.wrapped.payload, one.wrapped.scale * 2))
    placement.restore()
    assert where == {name: id(p) for name, p in model.named_parameters()}
    assert places == [
        *(model.linear.weight.data_ptr(), model.cache.data_ptr(), id(model.norm.running_mean)),
    ]
    assert same(list(model.buffers()), list(twin.buffers()))
    assert same(model.linear.weight, twin.linear.weight)
    assert same(model.wrapped.dense(), twin.wrapped.dense())


def test_what_was_put_in_the_place_of_a_buffer_stays(
    placed: Callable[[nn.Module], Placement],
) -> None:
    model = Model()
    placement = placed(model)
    model.cache = torch.full((3, 8), 7.0)
    placement.restore()
    assert same(model.cache, torch.full((3, 8), 7.0))


@pytest.mark.parametrize("attach", [torch.no_grad, torch.inference_mode])
def test_normal_tensors_wherever_stream_is_called(
    placed: Callable[[nn.Module], Placement], attach: Any
) -> None:
    model = Model()
    with attach():
        placement = placed(model)
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
    placement.restore()
    with torch.inference_mode():
        model = Model()
    placement = placed(model)
    assert all(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
    placement.restore()


@pytest.mark.needs_cuda
def test_on_a_gpu() -> None:
    model, twin, x = net(), net(), inputs()
    before = Snapshot(model)
    options = {"device": "cuda", "min_stream_bytes": 0, "poison": True}
    with torch.inference_mode(), dgls_torch.stream(model, 1 << 30, **options):
        assert model.first.weight.is_cuda
        assert torch.allclose(model(x.cuda()).cpu(), twin(x), atol=1e-5)
    before.check(model)
    with dgls_torch.stream(model, budgets(model, **options)[0], **options):
        for one in (model, twin):
            one.load_state_dict(net(seed=3).state_dict())
        with torch.inference_mode():
            assert torch.allclose(model(x.cuda()).cpu(), twin(x), atol=1e-5)
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))

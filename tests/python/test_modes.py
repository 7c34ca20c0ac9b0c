"""Grad mode, inference mode, autocast: what may run, and what is refused before it goes wrong.

Goal: under every mode the resident model's bits; trainable weights in grad mode are refused with
one sentence; a backward that needs weights that are gone is torch's own error, no wrong number.
Method: the same model in each mode in every budget; gradients asked for where they cannot be had.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from helpers import SMALL, Pair, Snapshot, budgets, check, inputs, net, same
from safetensors.torch import save_file
from torch import nn

import dgls_torch

REFUSED = "inference only, but grad mode is on"


def wrapped(seed: int = 0) -> nn.Module:
    """A model with a wrapper subclass in each block."""
    model = net(seed=seed)
    for block in model.blocks:
        payload = torch.randint(-9, 9, (32, 32), dtype=torch.int8)
        block.norm = nn.Linear(32, 32)
        block.norm.weight = nn.Parameter(Pair(payload, torch.rand(32, 1)), requires_grad=False)
    return model


class Inside(Pair):
    """A wrapper whose product is one of what it wraps, above autograd, which then saves that."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return func(args[0] * args[1].scale.sum(), args[1].payload, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def inside(seed: int = 0) -> nn.Module:
    """A model with nothing but such wrappers in its blocks."""
    model = net(seed=seed)
    for number in range(6):
        made = Inside(torch.randn(32, 32) / 6, torch.ones(1))
        model.blocks[number] = nn.Linear(32, 32, bias=False)
        model.blocks[number].weight = nn.Parameter(made, requires_grad=False)
    return model


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "inference, then not": lambda: contextlib.ExitStack(),
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("make", [net, wrapped], ids=["plain", "wrapped"])
def test_modes_without_grad(mode: Any, make: Any) -> None:
    check(make(), lambda m: m(inputs()), mode=mode)


@pytest.mark.parametrize("make", [net, wrapped, inside])
def test_frozen_weights_in_grad_mode(make: Any) -> None:
    check(frozen(make()), lambda m: m(inputs()), mode=contextlib.nullcontext, passes=4)


@pytest.mark.parametrize("mode", [torch.no_grad, contextlib.nullcontext])
@pytest.mark.parametrize("make", [net, wrapped], ids=["plain", "wrapped"])
def test_inference_tensors_in_other_modes(make: Any, mode: Any) -> None:
    with torch.inference_mode():
        model = frozen(make())
    check(model, lambda m: m(inputs()), mode=mode)


def test_attached_in_one_mode_and_run_in_another() -> None:
    model, x = frozen(net()), inputs()
    expected = model(x)
    before = Snapshot(model)
    modes = [torch.inference_mode, torch.no_grad, contextlib.nullcontext]
    for attach in modes:
        with attach():
            s = dgls_torch.stream(model, budgets(model)[0], **SMALL)
        for _ in range(3):
            for mode in modes:
                with mode():
                    assert same(model(x), expected)
            out = model(inputs().requires_grad_())
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
        with attach():
            s.detach()
        before.check(model)


def test_streaming_reloads_nothing_by_itself() -> None:
    model, x = frozen(net()), inputs()
    with dgls_torch.stream(model, 1 << 30, **SMALL) as s:
        for _ in range(2):
            model(x)
        moved = s.report().h2d_bytes_total
        for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
            with mode():
                model(x)
                model.blocks[2](x)
        assert s.report().h2d_bytes_total == moved


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("cache", [True, False])
def test_autocast(requires_grad: bool, cache: bool) -> None:
    model = net().requires_grad_(requires_grad)

    def call(m: nn.Module) -> Any:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            return m(inputs()), m(inputs(seed=2))

    for mode in (torch.no_grad, torch.inference_mode):
        check(model, call, mode=mode)


@pytest.mark.parametrize("make", [net, wrapped], ids=["plain", "wrapped"])
def test_trainable_weights_in_grad_mode_are_refused(make: Any) -> None:
    model, x = make(), inputs()
    expected = make()(x)
    before = Snapshot(model)
    with dgls_torch.stream(model, budgets(model)[0], **SMALL):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=REFUSED):
                model(x)
            with pytest.raises(RuntimeError, match=REFUSED) as caught:
                model.blocks[1](x)
            assert "'blocks.1'" in str(caught.value)
            with torch.no_grad():
                assert same(model(x), expected)
    before.check(model)


def test_the_root_refuses_before_anything_is_computed() -> None:
    for make in (net, wrapped):
        model, ran = make(), []
        model.first.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        model.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        with (
            dgls_torch.stream(model, budgets(model)[0], **SMALL),
            pytest.raises(RuntimeError, match=REFUSED),
        ):
            model(inputs())
        assert not ran


def test_meta_weights_in_grad_mode_are_refused_like_others(tmp_path: Any) -> None:
    save_file(net().state_dict(), tmp_path / "net.safetensors")
    with torch.device("meta"):
        model = net()
    with dgls_torch.stream(model, 1 << 30, source=tmp_path / "net.safetensors", **SMALL):
        with pytest.raises(RuntimeError, match=REFUSED):
            model(inputs())
        with pytest.raises(RuntimeError, match=REFUSED):
            model.blocks[0](inputs())


def test_a_trainable_head_on_streamed_blocks() -> None:
    def gradients(streamed: bool) -> list[torch.Tensor]:
        model = frozen(net())
        model.last.requires_grad_(True)
        attached = dgls_torch.stream(model, budgets(model)[0], **SMALL) if streamed else None
        model(inputs()).sum().backward()
        if attached is not None:
            attached.detach()
        return [p.grad for p in model.last.parameters()]

    assert same(gradients(True), gradients(False))


@pytest.mark.parametrize("source", ["tensors", "wrapped", "inside", "cpu", "meta"])
def test_backward_through_weights_that_are_gone_is_an_error(source: str, tmp_path: Any) -> None:
    make = {"wrapped": wrapped, "inside": inside}.get(source, net)
    options: dict[str, Any] = {}
    if source in ("cpu", "meta"):
        options["source"] = tmp_path / "net.safetensors"
        save_file(net().state_dict(), options["source"])
    with torch.device("meta" if source == "meta" else "cpu"):
        model = frozen(make())
    for count, size in enumerate(budgets(model, **options)):
        with [torch.enable_grad, torch.inference_mode][count % 2]():  # where it is attached
            s = dgls_torch.stream(model, size, **SMALL, **options)
        with s:
            for number in range(4):
                x = inputs().requires_grad_()
                out = model(x)
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    out.sum().backward()
                assert x.grad is None, f"pass {number}"


def test_backward_is_right_again_after_detach() -> None:
    model, x = frozen(net()), inputs().requires_grad_()
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    with dgls_torch.stream(model, budgets(model)[0], **SMALL):
        model(x)
    model(x).sum().backward()
    assert same(x.grad, expected)

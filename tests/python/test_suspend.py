"""A suspended stream: the model is its own again, and what is on the device stays there.

Goal: between suspend and resume nothing of the stream shows; afterwards residents need no copy.
Method: copies are counted; the model is compared with a snapshot, and changed meanwhile.
"""

from __future__ import annotations

import pytest
import torch
from helpers import SMALL, Snapshot, budgets, inputs, net, same
from torch import nn

import dgls_torch


def test_a_suspended_model_is_as_it_was_and_computes_the_same() -> None:
    model, x = net(), inputs()
    before = Snapshot(model)
    with torch.inference_mode():
        expected = model(x)
    for vram in budgets(model):
        with dgls_torch.stream(model, vram, **SMALL) as s, torch.inference_mode():
            assert same(model(x), expected)
            s.suspend()
            s.suspend()
            assert s.is_suspended
            before.check(model)
            uses = s.report().uses
            assert same(model(x), expected)
            assert s.report().uses == uses
            s.resume()
            s.resume()
            assert same(model(x), expected)
            assert s.report().uses == uses + len(model.blocks)
        before.check(model)


def test_residents_are_not_copied_again() -> None:
    model, x = net(), inputs()
    most = budgets(model)[-1]
    with dgls_torch.stream(model, most, **SMALL) as s, torch.inference_mode():
        model(x)
        copied = s.report().h2d_bytes_total
        assert copied == s.plan.block_bytes
        s.suspend()
        s.resume()
        model(x)
        assert s.report().h2d_bytes_total == copied


def test_replaced_weights_are_noticed() -> None:
    model, x = net(), inputs()
    s = dgls_torch.stream(model, budgets(model)[1], **SMALL)
    s.suspend()
    model.blocks[1].up.weight = nn.Parameter(torch.zeros_like(model.blocks[1].up.weight))
    assert not s.is_current()
    with pytest.raises(RuntimeError, match="replaced while its stream was suspended"):
        s.resume()
    s.detach()
    with torch.inference_mode():
        expected = model(x)
        with dgls_torch.stream(model, budgets(model)[1], **SMALL):
            assert same(model(x), expected)


def test_an_interrupted_block_gives_its_masters_back() -> None:
    model, x = net(), inputs()
    before = Snapshot(model)
    s = dgls_torch.stream(model, budgets(model)[0], **SMALL)
    remover = model.blocks[2].down.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        model(x)
    remover.remove()
    s.suspend()
    before.check(model)
    s.detach()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_suspended_stream_can_be_planned_anew_and_detached() -> None:
    model, x = net(), inputs()
    before = Snapshot(model)
    small, large = budgets(model)[0], budgets(model)[-1]
    with torch.inference_mode():
        expected = model(x)
        s = dgls_torch.stream(model, small, **SMALL)
        s.suspend()
        assert s.replan(large).vram_bytes == large
        before.check(model)
        s.resume()
        assert same(model(x), expected)
        s.suspend()
        s.detach()
    before.check(model)
    with pytest.raises(RuntimeError, match="detached"):
        s.resume()

"""Attach, replan and detach, in any order and with any failure in between.

Goal: every one of them leaves the model untouched, does nothing twice, and goes back when it fails.
Method: all of the model's state before and after, the threads of the process, injected failures.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import SMALL, Snapshot, budgets, copying, inputs, net, same, settle, threads
from torch import nn

import dgls_torch


def attach(model: nn.Module, vram: Any = 1 << 20, **options: Any) -> dgls_torch.Stream:
    return dgls_torch.stream(model, vram, **(SMALL | options))


def run(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(inputs())


def test_detach_is_idempotent_and_keeps_plan_and_report() -> None:
    model = net()
    before = Snapshot(model)
    s = attach(model)
    run(model)
    plan, report = s.plan, s.report()
    for _ in range(3):
        s.detach()
        before.check(model)
        assert s.plan == plan
        assert s.report() == report
    with pytest.raises(RuntimeError, match="detached; call stream"):
        s.replan()


def test_attach_detach_attach() -> None:
    model = net()
    expected, before = run(model), Snapshot(model)
    for size in budgets(model):
        s = attach(model, size)
        assert same(run(model), expected)
        s.detach()
        before.check(model)
        assert same(run(model), expected)


def test_a_second_stream_on_the_same_weights_is_refused() -> None:
    model = net()
    other = nn.Sequential(nn.Linear(32, 32), model.blocks[2], model.blocks[3])
    before = Snapshot(model), Snapshot(other)
    with attach(model) as s:
        for again in (model, nn.Sequential(model), other, model.blocks):
            with pytest.raises(RuntimeError, match="detach"):
                attach(again)
            assert same(run(model), run(net()))
    assert threads() == []
    for snapshot, one in zip(before, (model, other), strict=True):
        snapshot.check(one)
    with attach(other):
        run(other)
    with attach(model) as s:
        assert same(run(model), run(net()))
    assert s.report().passes == 1


def test_two_engines_side_by_side() -> None:
    models = [net(seed=seed) for seed in range(2)]
    expected = [run(model) for model in models]
    with attach(models[0], budgets(models[0])[0]), attach(models[1], budgets(models[1])[1]):
        for _ in range(3):
            for model, out in zip(models, expected, strict=True):
                assert same(run(model), out)
            for first, second in zip(models[0].blocks, models[1].blocks, strict=True):
                with torch.inference_mode():
                    first(inputs())
                    second(inputs())
        assert len(copying()) == 2
    assert threads() == []


def test_replan_up_and_down() -> None:
    model = net()
    expected, before = run(model), Snapshot(model)
    sizes = budgets(model)
    with attach(model, sizes[1]) as s:
        for size in [*sizes, *reversed(sizes), sizes[0], 1 << 40, "1GiB", sizes[1]]:
            plan = s.replan(size)
            assert s.plan == plan
            assert plan.vram_bytes == s.config.vram_bytes
            for _ in range(3):
                assert same(run(model), expected)
            assert plan.outside_bytes + plan.arena_bytes <= plan.vram_bytes
        assert len(copying()) == 1
    before.check(model)


@pytest.mark.parametrize("bad", ["least - 1", 1, "1KiB", "nonsense", -5, True, [1]])
def test_a_refused_replan_changes_nothing(bad: Any) -> None:
    model = net()
    expected = run(model)
    with attach(model, budgets(model)[2]) as s:
        run(model)
        plan, config = s.plan, s.config
        bad = plan.least_vram_bytes - 1 if bad == "least - 1" else bad
        with pytest.raises((ValueError, TypeError)):
            s.replan(bad)
        assert s.plan == plan
        assert s.config == config
        assert s.report().passes == 1
        assert same(run(model), expected)
        s.replan()
        assert s.plan == plan


def test_a_replan_that_fails_half_way_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from dgls_torch import native, resizing

    model = net()
    expected, before = run(model), Snapshot(model)
    make, failures = native.empty_arena, [0]

    def fail(size: int, device: torch.device) -> torch.Tensor:
        failures[0] -= 1
        if failures[0] >= 0:
            raise torch.OutOfMemoryError("injected")
        return make(size, device)

    sizes = budgets(model)
    monkeypatch.setattr(native, "empty_arena", fail)
    monkeypatch.setattr(resizing, "empty_arena", fail)
    with attach(model, sizes[2]) as s:
        run(model)
        plan = s.plan
        failures[0] = 1  # there is no room for both
        assert s.replan(sizes[1]).vram_bytes == s.config.vram_bytes == sizes[1]
        assert same(run(model), expected)
        s.replan(plan.vram_bytes)
        assert same(run(model), expected)
        failures[0] = 2  # nor for the new one alone
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            s.replan(1 << 30)
        assert (s.plan.arena_bytes, s.plan.vram_bytes) == (plan.arena_bytes, plan.vram_bytes)
        assert same(run(model), expected)
        failures[0] = 3  # not even the old one can be had again
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            s.replan(1 << 30)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="closed"):
            model(inputs())
    before.check(model)
    assert same(run(model), expected)


def test_what_stays_is_not_fetched_again() -> None:
    model = net(16)
    expected = run(model)
    with attach(model, budgets(model)[-2], adapt=False) as s:
        for _ in range(3):
            run(model)
        large = s.plan.vram_bytes
        for size in (large - s.plan.block_bytes // 16, large):
            stayed = sum(b.resident_bytes for b in s.plan.blocks)
            before = s.report().h2d_bytes_total
            plan = s.replan(size)
            assert same(run(model), expected)
            copied = s.report().h2d_bytes_total - before
            newly = max(0, sum(b.resident_bytes for b in plan.blocks) - stayed)
            # What is streamed twice at most: some of the next pass is on its way already.
            assert copied <= 2 * plan.streamed_bytes + newly
            assert 2 * copied < stayed
        # Without a budget all of it is: weights may have changed in a way that nobody notices.
        s.replan()
        assert same(run(model), expected)
        assert s.report().h2d_bytes_total >= s.plan.block_bytes


def test_replan_after_the_order_was_learned() -> None:
    model = net()
    order = [5, 1, 1, 3]
    with torch.inference_mode(), attach(model, budgets(model)[0]) as s:
        model(inputs(), order)
        before = s.report().mispredicted
        s.replan(budgets(net())[2])
        for _ in range(3):
            assert same(model(inputs(), order), net()(inputs(), order))
        assert s.report().mispredicted == before
        assert [b.name for b in s.plan.blocks][:3] == ["blocks.5", "blocks.1", "blocks.3"]


def test_replan_and_detach_inside_a_block() -> None:
    for act in ("replan", "detach"):
        model = net()
        expected, before = run(model), Snapshot(model)
        s = attach(model, budgets(model)[0])
        hook = model.blocks[2].up.register_forward_hook(
            lambda *_, s=s, act=act: getattr(s, act)() and None
        )
        for _ in range(2):
            assert same(run(model), expected)
        hook.remove()
        assert same(run(model), expected)
        s.detach()
        before.check(model)


def test_an_attach_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from dgls_torch import native
    from dgls_torch.pass_hooks import PassHooks

    model = net()
    before = Snapshot(model)
    for owner, name, good in [
        (native, "empty_arena", 0),
        (native._ops, "create", 0),
        (native._C, "make_hooks", 0),
        (native._C, "make_hooks", 4),
        (native._C, "set_views", 2),
        (PassHooks, "__init__", 0),
    ]:
        real, calls = getattr(owner, name), []

        def fail(*args: Any, real: Any = real, calls: Any = calls, good: int = good) -> Any:
            calls.append(1)
            if len(calls) > good:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, (lambda *_, **__: fail()) if name == "create" else fail)
            with pytest.raises(KeyboardInterrupt):
                attach(model)
        before.check(model)
        settle()
        assert threads() == []
    with attach(model):
        assert same(run(model), run(net()))

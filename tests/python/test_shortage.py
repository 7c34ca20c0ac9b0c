"""The device runs out of memory: while a stream is made, and in the middle of a pass.

Goal: where the planner chose the budget, set-up tries a smaller one once, and the pass after one
that ran out has more room, so that calling the model again works; an ordered budget stays as it was
ordered; either way the error says with numbers what holds the memory and what helps.
Method: a device that is said to be full where more than so many bytes are held.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import SMALL, Net, Snapshot, budgets, inputs, net, same, threads

import dgls_torch
from dgls_torch import layout as layout_module
from dgls_torch import native
from dgls_torch.shortage import Shortage


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(inputs())


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says what the planner finds free."""

    def free(size: int) -> None:
        monkeypatch.setattr(layout_module, "auto_vram_bytes", lambda *_, **__: size)

    return free


def full_above(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An allocator that has so many bytes; what was asked of it."""
    asked: list[int] = []
    make = native.empty_arena

    def limited(size: int, device: torch.device) -> torch.Tensor:
        asked.append(size)
        if size > most:
            raise torch.OutOfMemoryError(f"the plan takes {size} bytes, which are not free")
        return make(size, device)

    monkeypatch.setattr(native, "empty_arena", limited)
    return asked


def test_set_up_tries_a_smaller_budget_once(auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    sizes, expected = budgets(model), run(model)
    auto(sizes[-1])
    asked = full_above(sizes[-1] * 4 // 5, monkeypatch)
    with dgls_torch.stream(model, **SMALL) as s:
        assert len(asked) == 2
        assert asked[1] < asked[0]
        assert s.plan.vram_bytes < sizes[-1]
        for _ in range(2):
            assert same(run(model), expected)
        chosen = s.plan.vram_bytes
        with pytest.raises(torch.OutOfMemoryError):
            s.replan()  # what the planner finds free is as much as before
        assert s.plan.vram_bytes == chosen
        assert same(run(model), expected)


def test_set_up_that_fails_twice_says_so_with_numbers(
    auto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    sizes, before = budgets(model), Snapshot(model)
    auto(sizes[-1])
    asked = full_above(100, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError) as told:
        dgls_torch.stream(model, **SMALL)
    text = str(told.value)
    assert re.search(r"need [\d.]+ KiB on cpu at least; neither [\d.]+ KiB nor [\d.]+ KiB", text)
    assert "give a smaller vram" in text
    assert len(asked) == 2
    before.check(model)
    assert not threads()


def test_an_ordered_budget_is_not_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    size, before = budgets(model)[-1], Snapshot(model)
    asked = full_above(100, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match="which are not free"):
        dgls_torch.stream(model, size, **SMALL)
    assert len(asked) == 1
    before.check(model)


class Hungry(Net):
    """A model whose last layer needs what the weights must not hold."""

    stream: Any = None
    most = 0
    refusals = 0

    def forward(self, x: torch.Tensor, order: Any = None) -> torch.Tensor:
        x = super().forward(x, order)
        self.need()
        return x

    def need(self, *_: Any) -> None:
        if self.stream is not None and self.stream._engine.arena_bytes > self.most:
            self.refusals += 1
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 KiB. GPU 0 has a total capacity of "
                "23.99 GiB of which 1.00 KiB is free."
            )


def hungry() -> Hungry:
    torch.manual_seed(0)
    return Hungry().eval()


@pytest.mark.parametrize("in_a_block", [False, True])
def test_after_a_pass_that_ran_out_the_next_one_has_more_room(auto: Any, in_a_block: bool) -> None:
    model = hungry()
    sizes, expected, before = budgets(model), run(model), Snapshot(model)
    auto(sizes[-1])
    hook = model.blocks[3].register_forward_hook(model.need) if in_a_block else None
    with dgls_torch.stream(model, **SMALL) as s:
        model.stream, model.most = s, sizes[-1] // 2
        held: list[int] = []
        while len(held) < 10:
            try:
                assert same(run(model), expected)
                break
            except torch.OutOfMemoryError as error:
                text = str(error)
                for part in ("Tried to allocate 2.00 KiB", "hold", "call the model again"):
                    assert part in text
                held.append(s.plan.vram_bytes)  # not changed before the next pass
        assert held[0] == sizes[-1]
        assert 1 < len(held) < 10
        assert held == sorted(set(held), reverse=True)
        assert same(run(model), expected)
        assert s.plan.vram_bytes < sizes[-1]
        assert s.report().passes == 2
        model.stream = None
    if hook is not None:
        hook.remove()
    del model.__dict__["most"], model.__dict__["refusals"], model.__dict__["stream"]
    before.check(model)


def test_an_ordered_budget_stays_and_the_error_says_what_helps() -> None:
    model = hungry()
    sizes, expected = budgets(model), run(model)
    with dgls_torch.stream(model, sizes[-1], **SMALL) as s:
        model.stream, model.most = s, sizes[-1] // 2
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match=r"as ordered; replan\(\) with less"):
                run(model)
            assert s.plan.vram_bytes == sizes[-1]
        s.replan(sizes[1])
        assert same(run(model), expected)


def test_the_least_budget_cannot_give_more(auto: Any) -> None:
    model = hungry()
    auto(budgets(model)[0])
    with dgls_torch.stream(model, **SMALL) as s:
        model.stream, model.most = s, 100
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match="and no less will do"):
                run(model)


def test_other_exceptions_and_passes_that_return_nothing_change_nothing(auto: Any) -> None:
    class Nothing(Net):
        def forward(self, x: torch.Tensor, order: Any = None) -> None:  # type: ignore[override]
            super().forward(x, order)

    model = Nothing().eval()
    auto(budgets(model)[-1])
    with dgls_torch.stream(model, **SMALL) as s, torch.inference_mode():
        before = s.plan.vram_bytes
        for _ in range(3):
            assert model(inputs()) is None
        assert s.report().passes == 3
        with pytest.raises(ValueError, match="no such"):
            model(inputs(), order=iter_that_fails())
        model(inputs())
        assert (s.plan.vram_bytes, s.report().passes) == (before, 4)


def iter_that_fails() -> Any:
    yield 0
    raise ValueError("no such block")


def test_what_was_missing_counts() -> None:
    """More than a quarter where torch says that more was asked for, but never below the least."""

    class Sizes:
        outside_bytes, least_bytes, block_bytes = 1000, 2000, [1 << 20] * 20
        device = torch.device("cpu")

    config = dgls_torch.StreamConfig()
    for tried, expected in [
        ("Tried to allocate 8.00 MiB.", 1000 + (12 << 20)),
        ("Tried to allocate 20 bytes.", 1000 + (15 << 20)),
        ("Tried to allocate 80.5 GiB.", 2000),
        ("", 1000 + (15 << 20)),
    ]:
        shortage = Shortage()
        error = torch.OutOfMemoryError(tried)
        for vram in (1000 + (20 << 20), 1 << 40):  # the second is more than the blocks take
            shortage.note(error, Sizes, vram, config)  # type: ignore[arg-type]
            assert shortage.is_noted
            assert shortage.take(Sizes, vram) == expected  # type: ignore[arg-type]
            assert not shortage.is_noted
            assert shortage.take(Sizes, vram) is None  # type: ignore[arg-type]

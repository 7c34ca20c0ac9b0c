"""Several threads: engines side by side, and one model in two threads at once.

Goal: engines of different models do not disturb each other; one model in two threads gives the
right result or an error in one of them, never a wrong number.
Method: threads that run freely for many passes, and threads that are held in the middle of a block
until another one has done its worst; freed device memory poisoned, copies slowed down.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from typing import Any

import pytest
import torch
from helpers import SMALL, Block, Snapshot, budgets, in_threads, inputs, net, same, threads

import dgls_torch
from dgls_torch import native


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(inputs())


def test_two_engines_in_two_threads() -> None:
    models = [net(seed=seed) for seed in range(3)]
    expected = [run(model) for model in models]

    def body(index: int) -> None:
        model = models[index]
        for size in budgets(model):
            with dgls_torch.stream(model, size, **SMALL):
                for _ in range(8):
                    assert same(run(model), expected[index])

    assert in_threads(*[lambda i=i: body(i) for i in range(3)]) == []
    assert threads() == []


def test_a_model_that_moves_from_thread_to_thread() -> None:
    model = net()
    expected, before = run(model), Snapshot(model)
    with dgls_torch.stream(model, budgets(model)[0], **SMALL) as s:
        for _ in range(10):
            got: list[torch.Tensor] = []
            assert in_threads(lambda got=got: got.append(run(model))) == []
            assert same(got[0], expected)
        assert s.report().mispredicted == 0
        assert in_threads(s.detach) == []
    before.check(model)


@pytest.mark.parametrize("seed", range(4))
def test_one_model_in_two_threads_is_right_or_refused(seed: int) -> None:
    model = net(width=96)
    x = inputs(96)
    with torch.inference_mode():
        expected = model(x)
    before = Snapshot(model)
    chance = random.Random(seed)
    results = [0]

    def body() -> None:
        with torch.inference_mode():
            for _ in range(40):
                # Refused twice, before and after the block, torch makes a warning of the second.
                with contextlib.suppress(RuntimeError, UserWarning):
                    assert same(model(x), expected)
                    results[0] += 1

    options = {**SMALL, "copy_bytes_per_s": chance.choice([None, 1e9, 1e8])}
    with dgls_torch.stream(model, chance.choice(budgets(model)), **options):
        assert in_threads(body, body, body) == []
        assert results[0] > 0
        with torch.inference_mode():
            assert same(model(x), expected)
    before.check(model)


class Held(Block):
    """A block that waits in the middle when told to, and says that it does."""

    wait: tuple[threading.Event, threading.Event] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.norm(x))
        if self.wait is not None and threading.current_thread().name == "held":
            waits, go = self.wait
            waits.set()
            assert go.wait(30)
        return self.down(x)


def held_while(model: Any, index: int, act: Any) -> tuple[list[Any], list[BaseException]]:
    """Runs the model in a thread that is held in a block while ``act`` runs here."""
    waits, go = threading.Event(), threading.Event()
    model.blocks[index].wait = (waits, go)
    out: list[Any] = []
    raised: list[BaseException] = []

    def body() -> None:
        try:
            out.append(run(model))
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=body, name="held")
    thread.start()
    assert waits.wait(30)
    try:
        act()
    finally:
        go.set()
        thread.join()
    return out, raised


@pytest.mark.parametrize("index", [0, 3])
def test_the_thread_whose_block_was_taken_gets_the_error(index: int) -> None:
    model = net(block=Held)
    expected, before = run(model), Snapshot(model)
    for size in budgets(model):
        with dgls_torch.stream(model, size, **SMALL):
            seen: list[torch.Tensor] = []
            out, raised = held_while(model, index, lambda seen=seen: seen.append(run(model)))
            assert same(seen[0], expected)
            assert out == []
            assert f"'blocks.{index}' was still running" in str(raised[0])
            assert same(run(model), expected)
        del model.blocks[index].wait
        before.check(model)


def test_the_same_block_again_while_it_runs() -> None:
    """The second use binds the same parameters: the first must not take its end for its own."""
    model = net(block=Held)
    block, x = model.blocks[2], inputs()
    with torch.inference_mode():
        expected = block(x)
        for size in budgets(model):
            with dgls_torch.stream(model, size, **SMALL):
                waits, go = threading.Event(), threading.Event()
                seen: list[Any] = []

                def inner(*_: Any, waits: Any = waits, seen: Any = seen) -> None:
                    if threading.current_thread().name != "held":
                        return
                    waits.set()
                    assert go.wait(30)  # noqa: B023

                hook = block.down.register_forward_pre_hook(inner)
                errors: list[BaseException] = []

                def body(errors: Any = errors, seen: Any = seen) -> None:
                    try:
                        with torch.inference_mode():
                            seen.append(block(x))
                    except RuntimeError as error:
                        errors.append(error)

                thread = threading.Thread(target=body, name="held")
                thread.start()
                assert waits.wait(30)

                def let_go(*_: object, go: Any = go, thread: Any = thread) -> None:
                    go.set()
                    thread.join()

                stop = block.up.register_forward_hook(let_go)
                try:
                    again = block(x)
                except RuntimeError as error:
                    errors.append(error)
                else:
                    assert same(again, expected)
                stop.remove()
                hook.remove()
                assert all(same(value, expected) for value in seen)
                assert len(errors) == 1, "two uses at once, and nobody was told"
                assert "'blocks.2' was still running" in str(errors[0])
                assert same(block(x), expected)


@pytest.mark.parametrize("act", ["replan", "detach"])
def test_detach_and_replan_wait_for_a_block_in_another_thread(act: str) -> None:
    model = net(block=Held)
    expected, before = run(model), Snapshot(model)
    weight = model.blocks[2].down.weight
    master = weight.data_ptr()
    after = model.blocks[3].up.weight
    where = after.data_ptr(), []
    hook = model.blocks[3].up.register_forward_hook(lambda *_: where[1].append(after.data_ptr()))
    s = dgls_torch.stream(model, budgets(model)[0], **SMALL)
    done = threading.Thread(target=getattr(s, act))

    def start() -> None:
        done.start()
        done.join(0.1)
        assert weight.data_ptr() != master, "taken from under the running block"
        assert done.is_alive()
        while act == "detach" and s._engine is not None:
            time.sleep(0.01)
        done.join(0.05)  # it waits for this block now, and has stopped those that follow

    out, raised = held_while(model, 2, start)
    done.join()
    assert raised == []
    assert same(out[0], expected)
    if act == "detach":
        assert where[1] == [where[0]], "a block began after detach()"
    hook.remove()
    assert same(run(model), expected)
    s.detach()
    del model.blocks[2].wait
    before.check(model)


@pytest.mark.parametrize("act", ["replan", "detach"])
def test_detach_and_replan_wait_for_a_block_that_waits_for_its_weights(act: str) -> None:
    model = net()
    expected, before = run(model), Snapshot(model)
    s = dgls_torch.stream(model, budgets(model)[0], **SMALL, copy_bytes_per_s=2e5)
    out: list[torch.Tensor] = []

    def interfere() -> None:
        while s.report().uses == 0:
            time.sleep(0.001)
        time.sleep(0.02)  # the copies of a block take 0.1 s, its kernels nothing
        getattr(s, act)()

    assert in_threads(lambda: out.append(run(model)), interfere) == []
    assert same(out[0], expected)
    s.detach()
    before.check(model)
    assert same(run(model), expected)


def test_a_block_that_never_ends_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "_PATIENCE_MS", 50)
    model = net(block=Held)
    expected, before = run(model), Snapshot(model)
    s = dgls_torch.stream(model, budgets(model)[0], **SMALL)

    def act() -> None:
        with pytest.raises(RuntimeError, match="running in another thread"):
            s.replan()
        s.detach()

    held_while(model, 2, act)
    del model.blocks[2].wait
    before.check(model)
    assert same(run(model), expected)
    assert threads() == []


def test_a_thread_that_died_in_a_block_is_not_waited_for() -> None:
    model = net()
    expected, before = run(model), Snapshot(model)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    for act in ("replan", "detach"):
        s = dgls_torch.stream(model, budgets(model)[0], **SMALL)
        hook = model.blocks[2].up.register_forward_hook(die)
        assert len(in_threads(lambda: run(model))) == 1
        hook.remove()
        getattr(s, act)()
        assert same(run(model), expected)
        s.detach()
        before.check(model)


def test_a_model_that_is_detached_just_before_the_engine_is_entered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = net(), inputs()
    order = [5, 4, 3, 2, 1, 0]
    expected, before = net()(x, order), Snapshot(model)
    with torch.inference_mode():
        s = dgls_torch.stream(model, budgets(model)[1], **SMALL)
        model(x, order)  # the next pass takes up this order
        monkeypatch.setattr(s._engine, "rebuild", lambda: in_threads(s.detach))
        with pytest.raises(RuntimeError, match=r"^dgls: detached in another thread$"):
            model(x, order)
        before.check(model)
        assert same(model(x, order), expected)


def test_one_thread_at_a_time_takes_up_a_plan() -> None:
    """Else views of one plan could be bound for the next one."""
    model, x = net(), inputs()
    order = [5, 4, 3, 2, 1, 0]
    done: list[str] = []
    threads: list[threading.Thread] = []
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[1], **SMALL) as s:
        model(x, order)  # the next pass takes up this order
        engine: Any = s._engine
        bind = engine._bind_views

        def slowly() -> None:
            def second() -> None:
                engine.rebuild()
                done.append("second")

            threads.append(threading.Thread(target=second))
            threads[0].start()
            threads[0].join(0.2)
            bind()
            done.append("first")

        engine._bind_views = slowly
        expected = net()(x, order)
        assert same(model(x, order), expected)
        threads[0].join()
        assert (done, s.report().rebuilds) == (["first", "second"], 1)
        assert same(model(x, order), expected)


def test_a_pass_may_end_when_another_thread_has_just_closed_its_engine() -> None:
    """It was open when the hook looked: one in a dozen runs on a busy machine."""
    model = net()
    with dgls_torch.stream(model, 1 << 20, **SMALL) as s:
        engine = s._engine
        assert engine is not None
        engine.end_pass()
    assert not engine.is_open
    engine.end_pass()

"""Forks of a process that streams.

Goal: a fork is told in one sentence that the stream is not its own, whatever it calls; it can take
the stream off and use the model; it can have streams of its own; the parent never notices, and
workers that do not touch the stream do not either.
Method: `os.fork` at chosen and at random moments; the child writes what it found to a pipe. A child
that hangs is killed, and fails the test.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import SMALL, Net, Snapshot, budgets, inputs, net, same, threads, told
from torch.utils.data import DataLoader

import dgls_torch

if TYPE_CHECKING:
    from collections.abc import Callable

SENTENCE = "this process is a fork of the one that streams the model"

# Python 3.12 warns of forks in processes with threads: that is what this is about.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def in_a_fork(body: Callable[[], None], *, seconds: float = 60.0) -> str:
    """What the body raised in a child, or nothing."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            body()
        except BaseException:
            os.write(writes, traceback.format_exc()[-3000:].encode() or b"?")
        os._exit(0)
    os.close(writes)
    end = time.monotonic() + seconds
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "the child hangs"
        time.sleep(0.001)
    with open(reads, encoding="utf-8") as pipe:
        raised = pipe.read()
    return raised if ended[1] == 0 else f"{raised}the child ended with status {ended[1]}"


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(inputs())


def refused(call: Callable[[], object]) -> None:
    text = told(call)
    assert text is not None, "not refused"
    assert SENTENCE in text


def test_everything_is_refused_with_the_sentence() -> None:
    model = net()
    with dgls_torch.stream(model, budgets(model)[1], **SMALL) as s:
        expected = run(model)

        def child() -> None:
            for _ in range(2):
                refused(lambda: run(model))
                refused(lambda: model.blocks[2](inputs()))
                refused(s.report)
                refused(lambda: s.plan)
                refused(s.replan)
                refused(s.suspend)
                refused(lambda: torch.ops.dgls.stats(s._engine.number))

        assert in_a_fork(child) == ""
        assert same(run(model), expected)
        assert s.report().errors == 0


def test_detached_in_the_fork_the_model_is_the_forks() -> None:
    model = net()
    expected, before = run(model), Snapshot(model)
    with dgls_torch.stream(model, budgets(model)[0], **SMALL) as s:
        run(model)

        def child() -> None:
            s.detach()
            s.detach()
            before.check(model)
            assert same(run(model), expected)
            with dgls_torch.stream(model, budgets(net())[0], **SMALL) as own:
                assert same(run(model), expected)
                assert own.report().passes == 1

        assert in_a_fork(child) == ""
        assert threads() == ["dgls-copy"]
        assert same(run(model), expected)


def test_a_fork_in_the_middle_of_a_block() -> None:
    """The child goes on with the forward that its parent began, and must not compute with it."""
    model = net()
    expected, before = run(model), Snapshot(model)
    said = []

    def fork(*_: object) -> None:
        def child() -> None:
            # The rest of the forward, with another block's hooks, then the detach.
            refused(lambda: model.blocks[3](inputs()))
            s.detach()
            hook.remove()
            before.check(model)
            assert same(run(model), expected)

        said.append(in_a_fork(child))

    with dgls_torch.stream(model, budgets(model)[0], **SMALL) as s:
        hook = model.blocks[2].up.register_forward_hook(fork)
        assert same(run(model), expected)
        hook.remove()
        assert same(run(model), expected)
    assert said == [""]
    before.check(model)


def test_forks_while_another_thread_streams() -> None:
    """Its locks may be taken in the child for ever: the child must not wait for them."""
    model = net()
    expected = run(model)
    stop, wrong = threading.Event(), []

    def streams() -> None:
        while not stop.is_set():
            if not same(run(model), expected):
                wrong.append(1)

    with dgls_torch.stream(model, budgets(model)[0], copy_bytes_per_s=1e7, **SMALL) as s:
        thread = threading.Thread(target=streams)
        thread.start()
        try:

            def child() -> None:
                refused(lambda: run(model))
                s.detach()
                with dgls_torch.stream(net(), 1 << 20, **SMALL) as own:
                    assert own.plan.blocks

            said = [in_a_fork(child) for _ in range(25)]
        finally:
            stop.set()
            thread.join()
        assert said == [""] * 25
        assert not wrong
        assert same(run(model), expected)


class Numbers(torch.utils.data.Dataset[int]):
    """Data that knows no model."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return index


def test_workers_that_do_not_touch_the_stream_are_undisturbed() -> None:
    model = net()
    expected = run(model)
    with dgls_torch.stream(model, budgets(model)[0], **SMALL) as s:
        loader = DataLoader(Numbers(), num_workers=2, multiprocessing_context="fork")
        seen = []
        for batch in loader:
            assert same(run(model), expected)
            seen += batch.tolist()
        assert sorted(seen) == list(range(40))
        assert s.report().errors == 0


def test_a_fork_that_ends_like_a_script_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """It runs exit handlers, which detach what is attached."""
    model = net()
    with dgls_torch.stream(model, budgets(model)[0], **SMALL):
        expected = run(model)
        child = os.fork()
        if child == 0:
            import atexit

            atexit._run_exitfuncs()
            os._exit(int(any(p.is_meta for p in model.parameters())))
        assert os.waitpid(child, 0)[1] == 0
        assert same(run(model), expected)
    assert capfd.readouterr() == ("", "")


def test_a_model_that_is_dropped_in_the_fork() -> None:
    models: list[Net] = [net()]
    streams = [dgls_torch.stream(models[0], budgets(net())[0], **SMALL)]
    expected = run(models[0])

    def child() -> None:
        import gc

        streams.clear()
        models.clear()
        gc.collect()

    assert in_a_fork(child) == ""
    assert same(run(models[0]), expected)
    streams[0].detach()

"""The rounds of an engine's passes and the turns between them: their order, and what is timed.

Goal: what a rest leaves behind is not timed, of an engine as little as of the resident model.
Method: steps and clocks made for the purpose.
"""

from __future__ import annotations

import dataclasses
import io
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bench_jobs import EFFORT, job

from bench import measure, reference
from bench.beside import Turns
from bench.cells import Point
from bench.engines import ENGINES
from bench.measure import Effort

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.once


def test_rounds_lie_between_turns() -> None:
    seen: list[str] = []

    def step(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        seen.append("pass")
        return x + c

    x, c = torch.zeros(1), torch.ones(1)
    timing, _ = measure.steady(step, x, c, EFFORT, lambda: seen.append("turn"))
    a_round = ["pass"] * 3  # one to get going again, two that are timed
    assert seen == ["pass", "turn", *a_round, "turn", *a_round, "turn"]
    assert len(timing.passes) == 4
    seen.clear()
    assert len(measure.steady(step, x, c, EFFORT)[0].passes) == 3
    assert seen == ["pass"] * 4


def test_the_first_pass_of_a_round_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(_step: Any, _x: Any, _c: Any, passes: int) -> measure.Timing:
        return measure.Timing([float(number) for number in range(passes)], 0.25, 0.5)

    monkeypatch.setattr(measure, "timed", timed)
    x = torch.zeros(1)
    timing, _ = measure.steady(lambda x, c: x, x, x, EFFORT, lambda: None)
    assert timing == measure.Timing([1.0, 2.0, 1.0, 2.0], 0.25, 0.5)
    assert measure.steady(lambda x, c: x, x, x, EFFORT)[0].passes == [0.0, 1.0, 2.0]


def test_a_round_and_a_turn_begin_with_as_much_that_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def timed(_step: Any, _x: Any, _c: Any, passes: int) -> measure.Timing:
        seen.append(passes)
        return measure.Timing([0.25 + number for number in range(passes)], 0.25, 0.5)

    made = reference.Reference(job(tmp_path), ENGINES["resident"], io.StringIO())
    monkeypatch.setattr(measure, "timed", timed)
    effort, x = dataclasses.replace(EFFORT, warm=1, lead_s=0.6), torch.zeros(1)
    timing, _ = measure.steady(lambda x, c: x, x, x, effort, lambda: None)
    assert seen == [1, 5, 5]  # three of 0.25 s, and two that are timed
    assert timing.passes == [3.25, 4.25] * 2
    seen.clear()

    asked: Any = SimpleNamespace(
        is_on=True, failed=None, is_wanted=True, ask=lambda q, _: made.answer(json.dumps(q))
    )
    turns = Turns(asked, Point(3), effort, 0.25)
    turns.take()
    assert seen == [1, 4]
    assert turns.row()["beside_limit"]["rounds"][0]["passes_s"] == [2.25, 3.25]


def test_short_passes_have_one_more_before_those_of_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = reference.Reference(job(tmp_path), ENGINES["resident"], io.StringIO())
    for pass_s, first in ((0.05, 1), (0.2, 0)):
        times = [pass_s, pass_s + 1, pass_s + 2]
        monkeypatch.setattr(
            measure, "timed", lambda *args, of=times: measure.Timing(of[: args[3]], 0.25, 0.5)
        )
        assert made.turn(Point(3), 1, 2)["passes_s"] == times[first : first + 2]


def test_allocations_are_those_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"count": 0}

    def step(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        made["count"] += 5
        return x + c

    def rest() -> None:
        made["count"] += 1000  # what happens between rounds is no pass's

    monkeypatch.setattr(measure, "allocator_counts", lambda _: dict(made))
    _, counts = measure.steady(step, torch.zeros(1), torch.ones(1), EFFORT, rest)
    assert counts == {"count": 5.0}


def test_after_a_turn_that_failed_there_are_no_more() -> None:
    seen: list[str] = []

    def ask(*_: Any) -> dict[str, Any]:
        seen.append("turn")
        raise ValueError("no memory")

    asked: Any = SimpleNamespace(is_on=True, failed=None, is_wanted=True, ask=ask)
    turns = Turns(asked, Point(3), EFFORT, 0.0)
    turns.take()
    turns.take()
    assert seen == ["turn"]
    assert turns.row() == {"beside_failed": "no memory"}


def test_a_turn_may_take_longer_where_passes_do() -> None:
    seen: list[float] = []

    def ask(_question: Any, patience_s: float) -> dict[str, Any]:
        seen.append(patience_s)
        return {"link_bytes_per_s": 1.0, "passes_s": [1.0]}

    asked: Any = SimpleNamespace(is_on=True, failed=None, is_wanted=True, ask=ask)
    effort = Effort(beside=1, lead_s=3.0)
    for compute_s in (0.0, 2.0):
        Turns(asked, Point(3), effort, compute_s).take()
    assert seen == [15.0, 95.0]

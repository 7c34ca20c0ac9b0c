"""What a report makes of the times of single uses.

Goal: the time of a pass, the stalls and the efficiency are of the model, not of what a caller does
between two passes, and of whole passes alone.
Method: reports of made-up times, and a real stream whose pass is left half way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import dgls_torch
from dgls_torch.report import BlockPlan, Use
from dgls_torch.tables import block_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dgls_torch import Report

BLOCKS = 4


@pytest.fixture(scope="module")
def a_report() -> Report:
    return streamed()[1].report()


def streamed(**options: int) -> tuple[nn.Module, dgls_torch.Stream]:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(BLOCKS)))
    blocks = [str(i) for i in range(BLOCKS)]
    return model, dgls_torch.stream(model, vram="40kB", blocks=blocks, device="cpu", **options)


def of(
    report: Report, begins: Sequence[float], numbers: Sequence[int], scales: Sequence[float] = ()
) -> Report:
    """A report of passes that begin then: blocks of 1 s, one stalled for 0.5 s, 4.5 s in all.

    Each pass takes ``scales`` times as long.
    """
    uses = []
    for begin, number, scale in zip(begins, numbers, scales or [1.0] * len(begins), strict=True):
        now = begin
        for block in range(BLOCKS):
            stall = scale * 0.5 if block == 2 else 0.0
            copied = (now, now + 0.25)
            times = (now, now + stall, now + stall + scale)
            uses.append(Use(number, str(block), 100_000, 100_000, *copied, *times))
            now = times[-1]
    return replace(report, timeline=tuple(uses))


def test_a_pause_between_two_passes_is_not_in_the_time_of_a_pass(a_report: Report) -> None:
    # 0.1 s between passes, and a minute after the third, in which the caller rested
    report = of(a_report, [0.0, 4.6, 9.2, 73.7, 78.3], [0, 1, 2, 3, 4])
    assert report.pass_s == pytest.approx(4.6)
    assert report.stall_s == pytest.approx(0.5)
    assert report.bound_s == pytest.approx(4.1)
    assert report.efficiency == pytest.approx(4.1 / 4.6)
    # also where only one other pass is known
    report = of(a_report, [0.0, 4.6, 69.1, 73.7], [0, 1, 2, 3])
    assert report.pass_s == pytest.approx(4.6)


def test_what_always_lies_between_passes_is_in_it(a_report: Report) -> None:
    report = of(a_report, [0.0, 6.5, 13.0, 19.5], [0, 1, 2, 3])
    assert report.pass_s == pytest.approx(6.5)


def test_the_first_pass_and_those_without_a_successor_do_not_count(a_report: Report) -> None:
    assert of(a_report, [0.0, 5.0], [0, 1]).pass_s is None
    assert of(a_report, [0.0, 5.0], [0, 1]).efficiency is None
    assert of(a_report, [0.0, 50.0, 55.0], [0, 8, 9]).pass_s == pytest.approx(5.0)
    assert of(a_report, [], []).stall_s is None


def test_passes_of_other_work_before_do_not_count(a_report: Report) -> None:
    numbers = [8, 9, 16, 17, 20, 21, 22]
    begins = [0.0, 5.0, 50.0, 55.0, 100.0, 110.0, 120.0]
    report = of(a_report, begins, numbers, [1.0] * 4 + [2.0] * 3)
    assert report.pass_s == pytest.approx(10.0)
    assert report.stall_s == pytest.approx(1.0)
    report = of(a_report, begins, numbers, [2.0] * 4 + [1.0, 1.1, 1.0])
    assert report.stall_s == pytest.approx(0.525)


def test_a_slow_pass_alone_is_not_taken_for_other_work(a_report: Report) -> None:
    numbers, begins = [8, 9, 16, 17, 24, 25], [0.0, 10.0, 50.0, 60.0, 100.0, 110.0]
    report = of(a_report, begins, numbers, [1.0, 1.0, 1.0, 1.0, 2.0, 1.0])
    assert report.stall_s == pytest.approx((0.5 + 0.5 + 1.0) / 3)


def test_passes_that_followed_each_other_are_shown(a_report: Report) -> None:
    def shown(begins: Sequence[float], numbers: Sequence[int]) -> list[int]:
        return sorted({use.pass_number for use in of(a_report, begins, numbers).last_passes()})

    assert shown([0.0, 5.0, 10.0, 15.0], [0, 1, 2, 3]) == [2, 3]
    # the 25th pass is the last one: passes 18 to 23 were not timed
    assert shown([0.0, 5.0, 40.0, 45.0, 80.0], [8, 9, 16, 17, 24]) == [16, 17]
    # the caller rested a minute after the 17th
    assert shown([0.0, 5.0, 40.0, 105.0, 140.0], [8, 9, 16, 17, 24]) == [8, 9]
    assert shown([0.0, 65.0], [8, 9]) == [9]
    assert shown([0.0], [0]) == [0]
    assert shown([], []) == []


@pytest.mark.parametrize("kept", [1, 2])
def test_the_timeline_begins_with_a_whole_pass(kept: int) -> None:
    model, stream = streamed(trace_passes=kept)
    x = torch.zeros(1, 64)
    with stream, torch.inference_mode():
        for _ in range(3):
            model(x)
        model[1](model[0](x))
        timeline = stream.report().timeline
    numbers = [use.pass_number for use in timeline]
    assert numbers == sorted(numbers)
    assert [numbers.count(n) for n in sorted(set(numbers))] == [BLOCKS] * kept + [2]


def test_a_pass_alone_is_shown_from_where_it_began() -> None:
    model, stream = streamed(trace_passes=1)
    with stream, torch.inference_mode():
        model[1](torch.zeros(1, 64))  # out of turn
        assert [use.block for use in stream.report().timeline] == ["1"]


def test_many_layers_share_rows_by_their_names() -> None:
    def rows(blocks: int) -> list[str]:
        sizes = {"attn.0": 512, "mlp.2": 1024}
        plans = [
            BlockPlan(f"b.{k}.{n}", 256 * (k % 2), s - 256 * (k % 2))
            for k in range(blocks)
            for n, s in sizes.items()
        ]
        return [line.split()[0] for line in block_table(plans)[1:]]

    assert rows(2) == ["b.0.attn.0", "b.0.mlp.2", "b.1.attn.0", "b.1.mlp.2"]
    assert len(rows(10)) == 20
    assert rows(11) == ["b.*.attn.0", "b.*.mlp.2"]
    unlike = [BlockPlan(f"stage{k}", 0, 256 * (k + 1)) for k in range(25)]
    assert len(block_table(unlike)) == 26, "nothing is shared"


def test_nothing_is_kept_where_nothing_is_asked_for() -> None:
    model, stream = streamed(trace_passes=0)
    with stream, torch.inference_mode():
        for _ in range(3):
            model(torch.zeros(1, 64))
        assert stream.report().timeline == ()

"""How the benchmark of host memory reads a trace.

Goal: the share of a pass in which the link was busy counts overlapping copies once, and no time
between passes that were not timed.
Method: traces made by hand.
"""

from __future__ import annotations

import pytest

from dgls_torch.bench.host import busy_share
from dgls_torch.report import Use


def use(number: int, start: float, end: float, size: int = 1) -> Use:
    return Use(number, "block", size, size, start, end, start, end, end)


@pytest.mark.parametrize(
    ("timeline", "share"),
    [
        ([], 0.0),
        ([use(0, 0.0, 1.0)], 0.0),
        ([use(1, 0.0, 1.0), use(1, 1.0, 2.0)], 1.0),
        ([use(1, 0.0, 1.0), use(1, 3.0, 4.0)], 0.5),
        ([use(1, 0.0, 3.0), use(1, 1.0, 2.0), use(1, 2.0, 4.0)], 1.0),
        ([use(1, 0.0, 1.0), use(1, 1.0, 9.0, size=0)], 1.0),
        ([use(1, 0.0, 2.0), use(8, 100.0, 101.0), use(8, 101.5, 102.0)], 3.5 / 4.0),
    ],
)
def test_a_link_is_busy_while_a_copy_of_a_timed_pass_is_under_way(
    timeline: list[Use], share: float
) -> None:
    assert busy_share(timeline) == pytest.approx(share)

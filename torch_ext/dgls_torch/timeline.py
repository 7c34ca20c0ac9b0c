"""Draws a report's timed uses: one lane for copies, one for compute, stalls marked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgls_torch.report import Report, Use

_COPY, _COMPUTE, _STALL = "#4c72b0", "#55a868", "#c44e52"


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes the last timed passes of ``report`` to ``path``; the ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No pass has been timed yet.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the timeline needs matplotlib; install it with pip install dgls_torch[plot]"
        ) from error
    uses = report.last_passes()
    if not uses:
        raise ValueError("there is no timeline yet: run the model first, with trace_passes above 0")
    figure: Any = Figure(figsize=(14, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    origin = min(use.wait_s for use in uses)
    _draw(axes, uses, origin)
    axes.set_yticks([0, 1], ["copy", "compute"])
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlabel("milliseconds")
    axes.set_title(_title(report), fontsize=10, loc="left")
    axes.legend(loc="upper right", ncols=3, fontsize=8, frameon=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(os.fspath(path))


def _draw(axes: Any, uses: list[Use], origin: float) -> None:
    def bars(spans: list[tuple[float, float]], lane: int, color: str, label: str) -> None:
        scaled = [(1e3 * (a - origin), 1e3 * (b - a)) for a, b in spans if b > a]
        axes.broken_barh(
            scaled, (lane - 0.35, 0.7), color=color, edgecolor="white", linewidth=0.3, label=label
        )

    bars([(u.copy_start_s, u.copy_end_s) for u in uses if u.bytes], 0, _COPY, "copy")
    bars([(u.start_s, u.end_s) for u in uses], 1, _COMPUTE, "compute")
    bars([(u.wait_s, u.start_s) for u in uses], 1, _STALL, "stall")


def _title(report: Report) -> str:
    head = str(report.plan).splitlines()[0]
    efficiency = report.efficiency
    return head if efficiency is None else f"{head}; {100 * efficiency:.1f} % of the bound"

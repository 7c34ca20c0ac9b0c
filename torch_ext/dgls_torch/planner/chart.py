"""Draws how long a pass takes with how much memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dgls_torch.units import GIB, format_bytes, format_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dgls_torch.planner.forecast import Forecast
    from dgls_torch.planner.sweep import Point

_PASS, _BOUND, _COMPUTE, _CHOSEN = "#4c72b0", "#8c8c8c", "#55a868", "#c44e52"


def plot(
    forecast: Forecast,
    points: Sequence[Point],
    stall_free_vram_bytes: int | None,
    path: str | os.PathLike[str],
) -> None:
    """Writes the curve to ``path``; the ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: It knows no format of that ending.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the curve needs matplotlib; install it with pip install dgls_torch[plot]"
        ) from error
    figure: Any = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    budgets = [(forecast.outside_bytes + point.budget_bytes) / GIB for point in points]
    bounds = [point.solution.lower_bound_s for point in points]
    axes.plot(budgets, bounds, color=_BOUND, linestyle="--", label="bound of any schedule")
    periods = [point.solution.period_s for point in points]
    axes.plot(budgets, periods, color=_PASS, marker="o", markersize=4, label="planned pass")
    if forecast.compute_s:
        axes.axhline(forecast.compute_s, color=_COMPUTE, linewidth=1, label="compute alone")
    if stall_free_vram_bytes is not None:
        label = f"no stall from {format_bytes(stall_free_vram_bytes)} on"
        axes.axvline(stall_free_vram_bytes / GIB, color=_COMPUTE, linestyle=":", label=label)
    chosen = f"{format_bytes(forecast.vram_bytes)} as asked"
    at = ([forecast.vram_bytes / GIB], [forecast.period_s])
    axes.plot(*at, color=_CHOSEN, marker="D", linestyle="none", label=chosen)
    axes.set_xlabel("memory for the weights in GiB")
    axes.set_ylabel("seconds of a pass")
    axes.set_ylim(bottom=0)
    rate = format_rate(forecast.inputs["h2d_bytes_per_s"])
    axes.set_title(f"{len(forecast.blocks)} blocks at {rate}", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(os.fspath(path))

"""Plans ahead of time: what a budget would give, for a model, a weight file or bare numbers.

Nothing is attached, moved or read but headers. The planning itself is ``torch.ops.dgls.plan.json``,
whose form docs/plan-format.md describes.
"""

from __future__ import annotations

from dgls_torch.planner.forecast import Forecast
from dgls_torch.planner.form import Copy, DoesNotFit, Solution
from dgls_torch.planner.modules import plan

__all__ = ["Copy", "DoesNotFit", "Forecast", "Solution", "plan"]

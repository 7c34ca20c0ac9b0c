"""Runs PyTorch models whose weights do not fit on the device, by streaming them block by block.

with dgls_torch.stream(model, vram="8GiB") as s:
    out = model(x)
print(s.plan, s.report())
"""

from __future__ import annotations

from dgls_torch._extension import __version__, load

load()

from dgls_torch.config import StreamConfig  # noqa: E402
from dgls_torch.planner import Forecast, plan  # noqa: E402
from dgls_torch.report import Plan, Report  # noqa: E402
from dgls_torch.stream import Stream, StreamGroup, stream  # noqa: E402

__all__ = [
    "Forecast",
    "Plan",
    "Report",
    "Stream",
    "StreamConfig",
    "StreamGroup",
    "__version__",
    "plan",
    "stream",
]

"""dgls_torch, as a user would call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dgls_torch
from bench.engines import Attached

if TYPE_CHECKING:
    from bench.engines import Setup


def attach(setup: Setup, unit: str = "block") -> Attached:
    """Streams the stack; the budget and the unit are orders, everything else is the default.

    Page-locking is allowed for all weights, as every peer does.
    """
    on_cpu = setup.device.type == "cpu"
    stream = dgls_torch.stream(
        setup.stack,
        vram=setup.budget_bytes,
        blocks=[f"blocks.{i}" for i in range(len(setup.stack.order))],
        unit=unit,
        device=str(setup.device),
        pinned="auto" if on_cpu else sum(p.nbytes for p in setup.stack.parameters()),
        copy_bytes_per_s=setup.link_bytes_per_s if on_cpu else None,
    )

    def facts() -> dict[str, Any]:
        report = stream.report()
        return {
            "streamed_bytes": report.h2d_bytes,
            "predicted_s": stream.plan.predicted_s,
            "stall_s": report.stall_s,
            "copies_bytes_per_s": report.h2d_bytes_per_s,
            "own_pass_s": report.pass_s,
            "own_efficiency": report.efficiency,
            "adopted": report.adopted,
            "pinned_bytes": report.pinned_bytes,
            "errors": report.errors,
        }

    return Attached(setup.stack, stream.detach, facts, learns=True)

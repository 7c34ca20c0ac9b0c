"""dgls_torch, as a user would call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dgls_torch
from bench.engines import Attached

if TYPE_CHECKING:
    from bench.engines import Setup


def attach(setup: Setup, unit: str = "block", compress: str = "off") -> Attached:
    """Streams the stack; the budget, the unit and the encoding are orders, all else is the default.

    Page-locking is allowed for all weights, as every peer does, and for their encoded form.
    """
    on_cpu = setup.device.type == "cpu"
    weights = sum(p.nbytes for p in setup.stack.parameters())
    stream = dgls_torch.stream(
        setup.stack,
        vram=setup.budget_bytes,
        blocks=[f"blocks.{i}" for i in range(len(setup.stack.order))],
        unit=unit,
        compress=compress,
        device=str(setup.device),
        pinned="auto" if on_cpu else weights * (1 if compress == "off" else 2),
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
            "encoded_held_bytes": report.encoded_held_bytes,
        }

    return Attached(setup.stack, stream.detach, facts, learns=True)

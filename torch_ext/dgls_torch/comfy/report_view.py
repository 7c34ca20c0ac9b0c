"""A residency as text and as plain numbers, for the report node and its panel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dgls_torch.units import format_bytes

if TYPE_CHECKING:
    from dgls_torch import Plan, Report
    from dgls_torch.comfy.residency import Residency

_MOST_USES = 400


def report_text(name: str, residency: Residency) -> str:
    """What was planned and measured, as a table; or why nothing was."""
    stream = residency.latest
    if residency.passed_by is not None:
        return f"{name} is not streamed: {residency.passed_by}"
    if stream is None:
        return f"{name} is not streamed"
    report = stream.report()
    state = "" if residency.stream is not None else "\n(unloaded since; the last run is shown)"
    return f"{report.plan}\n{report}{state}"


def report_data(name: str, residency: Residency) -> dict[str, Any]:
    """The same as numbers: sizes in bytes, times in milliseconds from the first one shown."""
    data: dict[str, Any] = {"model": name, "reason": residency.passed_by}
    if residency.passed_by is not None or residency.latest is None:
        return data
    report = residency.latest.report()
    plan = report.plan
    return data | {
        "summary": _summary(plan, report),
        "device": plan.device,
        "vram_bytes": plan.vram_bytes,
        "outside_bytes": plan.outside_bytes,
        "arena_bytes": plan.arena_bytes,
        "ring_bytes": plan.ring_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "blocks": [[b.name, b.resident_bytes, b.streamed_bytes] for b in plan.blocks],
        "passes": report.passes,
        "uses": report.uses,
        "on_demand": report.on_demand,
        "mispredicted": report.mispredicted,
        "pass_ms": _milliseconds(report.pass_s),
        "stall_ms": _milliseconds(report.stall_s),
        "bytes_per_s": report.h2d_bytes_per_s,
        "efficiency": report.efficiency,
        "limit": report.limit,
        "timeline": _timeline(report),
    }


def _summary(plan: Plan, report: Report) -> str:
    kept = plan.arena_bytes - plan.ring_bytes
    parts = [
        f"{format_bytes(plan.outside_bytes - plan.decode_bytes + kept)} resident",
        f"{format_bytes(plan.streamed_bytes)} streamed in each pass",
    ]
    if report.encoded_bytes_total:
        share = report.encoded_bytes_total / report.decoded_bytes_total
        parts.append(f"encoded to {100 * share:.0f} % on the link")
    pass_s, stall_s = report.pass_s, report.stall_s
    if pass_s and stall_s is not None:
        parts.append(f"{100 * (1 - stall_s / pass_s):.0f} % of the time computing")
    return ", ".join(parts)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)


def _timeline(report: Report) -> list[list[Any]]:
    """The uses of the last passes: block, pass, bytes, then copy, wait, start and end times."""
    uses = report.last_passes()[-_MOST_USES:]
    if not uses:
        return []
    origin = min(use.wait_s for use in uses)

    def shown(seconds: float) -> float:
        return round(1e3 * (seconds - origin), 3)

    return [
        [
            *(use.block, use.pass_number, use.bytes),
            *(shown(use.copy_start_s), shown(use.copy_end_s)),
            *(shown(use.wait_s), shown(use.start_s), shown(use.end_s)),
        ]
        for use in uses
    ]

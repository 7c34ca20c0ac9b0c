"""The named runs: which beds, budgets, ratios and engines, in order of what matters most."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.cells import Bed
from bench.engines import ENGINES, OURS
from bench.stacks import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

RATIOS = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Copy over compute, at a budget of a quarter of the weights."""
ALL = tuple(name for name in ENGINES if name != "resident")
MAIN = (*OURS, "ring", "aimdo-linear", "diffusers-block", "cachedit", "mmgp")
FAST = (*OURS, "ring", "aimdo-linear", "aimdo-block", "diffusers-block")
"""Those that were fastest somewhere in the other plans."""
ON_HOST = ("dgls", "ring", "original")


@dataclass(frozen=True)
class Stage:
    """One bed with its budgets, points and engines."""

    bed: Bed
    shares: tuple[float, ...] = (0.25, 0.5)
    """Budgets, of the bytes of the weights; above 1 everything fits."""
    ratios: tuple[float, ...] = RATIOS
    engines: tuple[str, ...] = ALL
    only_ours: tuple[float, ...] = ()
    """More budgets, for dgls_torch alone."""
    effort: dict[str, Any] = field(default_factory=dict)

    def narrowed(
        self, shares: Sequence[float] | None, ratios: Sequence[float] | None
    ) -> Stage | None:
        """Only some budgets, and ratios, of it; all where ``None``. ``None`` if nothing is left."""

        def of(own: tuple[float, ...], wanted: Sequence[float] | None) -> tuple[float, ...]:
            return tuple(one for one in own if wanted is None or one in wanted)

        left = replace(
            self,
            shares=of(self.shares, shares),
            only_ours=of(self.only_ours, shares),
            ratios=of(self.ratios, ratios),
        )
        return left if left.ratios and left.shares + left.only_ours else None


def _bed(
    shape: str, dtype: str = "bf16", scale: float = 1.0, copiers: int = 0, depth: float = 1.0
) -> Bed:
    return Bed(Workload(shape, dtype, scale, depth), copiers)


_CI = Workload("flux", "bf16", 1 / 24, 0.25, text_tokens=2)
_BRIEF = {"warm": 3, "least": 3, "most": 4, "seconds": 0.3, "lead_s": 0.0}
_SHORT = {"warm": 4, "least": 3, "most": 6, "seconds": 0.6}
_SETTLED = {"settling_s": 12.0}
_SHORT_SETTLED = {"warm": 4, "least": 6, "most": 12, "beside": 3, "settling_s": 6.0}
_LONG_PASSES = {"warm": 8, "least": 6, "most": 6} | _SETTLED
_SLOW_PASSES = {"warm": 4, "least": 4, "most": 6, "beside": 3, "settling_s": 18.0}

PLANS: dict[str, Sequence[Stage]] = {
    # What fails on this machine? A small model, every engine once.
    "probe": (
        Stage(_bed("flux", scale=0.25), (0.5,), (2.0,), ALL, (1.05,), _BRIEF),
        Stage(_bed("flux", "fp8", scale=0.25), (0.5,), (2.0,), ALL, (), _BRIEF),
        Stage(_bed("wan", scale=0.25, copiers=1), (0.5,), (2.0,), ("dgls", "ring"), (), _BRIEF),
    ),
    # Every engine at every ratio, FLUX.1 at half its width.
    "half": (
        Stage(_bed("flux", scale=0.5), (0.25, 0.5), RATIOS, ALL, (0.15, 0.75, 1.05)),
        Stage(_bed("flux", scale=0.5), (0.15, 0.75), (4.0, 1.0, 0.25), MAIN),
    ),
    # The real FLUX.1: every engine where copies and compute take as long, the main ones elsewhere.
    "core": (
        Stage(_bed("flux"), (0.25,), (4.0, 1.0), ALL, (0.5, 1.05), _SETTLED),
        Stage(_bed("flux"), (0.5,), (4.0, 1.0), MAIN, (), _SETTLED),
        Stage(_bed("flux"), (0.25,), (0.25,), MAIN[:5], (0.15, 0.5, 0.75), _SETTLED),
        Stage(_bed("flux"), (0.75,), (4.0, 1.0), MAIN[:5], (0.15,), _SETTLED),
    ),
    # The other models and fp8, beside the peers that matter most. Where blocks are smaller than
    # these the host's launches decide, on a fast GPU, and not the device.
    "wide": tuple(
        Stage(
            _bed(shape, dtype, scale),
            (0.25, 0.5),
            (4.0, 1.0, 0.5),
            FAST,
            (0.15, 0.75),
            _SHORT_SETTLED,
        )
        for shape, dtype, scale in (
            ("wan", "bf16", 0.5),
            ("qwen", "bf16", 0.5),
            ("hunyuan", "bf16", 0.5),
            ("flux", "fp8", 1.0),
            ("wan", "fp8", 0.75),
            ("qwen", "fp8", 0.75),
            ("hunyuan", "fp8", 0.75),
        )
    ),
    # The largest of them at their real size.
    "full": tuple(
        Stage(_bed(shape), (0.25, 0.5), (4.0, 1.0), FAST, (0.15, 0.75), _LONG_PASSES)
        for shape in ("wan", "qwen", "hunyuan")
    ),
    # Slower links: a fifth and half of this machine's, as of PCIe 3.0 and 4.0 on one with 5.0. The
    # turns that processes take weigh a quarter as much with the real FLUX.1.
    "throttled": (
        *(
            Stage(_bed("flux", "bf16", 0.5, n), (0.25, 0.5), (4.0, 1.0, 0.5), FAST, (), _SHORT)
            for n in (4, 1)
        ),
        Stage(_bed("flux", copiers=4), (0.25, 0.5), (4.0, 1.0), FAST, (), _SLOW_PASSES),
    ),
    # Without a GPU: blocks take a set time, the CPU device's link has a set rate.
    "host": (
        Stage(
            Bed(Workload("flux", "bf16", 1 / 12, 0.5, text_tokens=2)),
            (0.25, 0.5),
            (4.0, 2.0, 1.0, 0.5),
            ON_HOST,
            (0.75, 1.05),
            {"lead_s": 0.0},
        ),
    ),
    # The same for tests: seconds.
    "ci": (Stage(Bed(_CI), (0.5,), (2.0,), ON_HOST, (1.05,), _BRIEF | {"rounds": 2}),),
}

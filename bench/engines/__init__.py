"""The engines by name: who they are, which packages they need, and how they are attached."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from bench.stacks import Stack


@dataclass(frozen=True)
class Setup:
    """What an engine is given. ``stack`` is on the CPU, its weights mapped."""

    stack: Stack
    budget_bytes: int
    """For weights and every buffer that holds weights."""
    device: torch.device
    link_bytes_per_s: float | None = None
    """The rate that the CPU's link is held to."""
    slots: int = 2


def _no_facts() -> dict[str, Any]:
    return {}


@dataclass
class Attached:
    """A stack that an engine runs."""

    step: Callable[[Tensor, Tensor], Tensor]
    close: Callable[[], None]
    facts: Callable[[], dict[str, Any]] = field(default=_no_facts)
    """What the engine says of itself, read after the passes that are timed."""
    learns: bool = False
    """Whether it goes on changing what it does by what it measures: it gets passes to settle."""


@dataclass(frozen=True)
class Engine:
    """One line of the table."""

    title: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    """Pins, as ``name==version``."""
    needs_cuda: bool = True
    before_torch: str | None = None
    """A function of `bench.engines.before_torch`."""

    def prepare(self) -> None:
        """Does what has to be done before torch is imported, then imports the engine."""
        if self.before_torch is not None:
            getattr(import_module("bench.engines.before_torch"), self.before_torch)()
        import_module(self.module)

    def attach(self, setup: Setup) -> Attached:
        """Hands the stack to the engine."""
        attached: Attached = import_module(self.module).attach(setup, **self.options)
        return attached

    def missing(self) -> str | None:
        """Says what is not installed as pinned, or None."""
        wrong = []
        for pin in self.packages:
            name, _, wanted = pin.partition("==")
            try:
                found = version(name)
            except PackageNotFoundError:
                found = "none"
            if found != wanted:
                wrong.append(f"needs {pin}, found {found}")
        return "; ".join(wrong) or None


_DIFFUSERS = ("diffusers==0.42.1",)
_AIMDO = ("comfy-aimdo==0.6.0",)


def _diffusers(kind: str, record: bool) -> Engine:
    text = f"diffusers group offload, {kind}" + (", record_stream" if record else "")
    options = {"kind": f"{kind}_level", "record_stream": record}
    return Engine(text, "bench.engines.diffusers_groups", options, _DIFFUSERS)


def _aimdo(kind: str, title: str) -> Engine:
    options = {"per_linear": kind == "linear"}
    return Engine(title, "bench.engines.aimdo", options, _AIMDO, before_torch="aimdo")


ENGINES = {
    "resident": Engine("resident", "bench.engines.resident", needs_cuda=False),
    "dgls": Engine("dgls_torch", "bench.engines.ours", needs_cuda=False),
    "dgls-layer": Engine(
        'dgls_torch, unit="layer"', "bench.engines.ours", {"unit": "layer"}, needs_cuda=False
    ),
    "dgls-compress": Engine(
        'dgls_torch, compress="auto"', "bench.engines.ours", {"compress": "auto"}, needs_cuda=False
    ),
    "dgls-compress-all": Engine(
        'dgls_torch, compress="on"', "bench.engines.ours", {"compress": "on"}, needs_cuda=False
    ),
    "ring": Engine("plain PyTorch, two buffers", "bench.engines.ring", needs_cuda=False),
    "original": Engine("the original DGLS's policy", "bench.engines.original", needs_cuda=False),
    "aimdo-linear": _aimdo("linear", "comfy-aimdo, per Linear (ComfyUI)"),
    "aimdo-block": _aimdo("block", "comfy-aimdo, block queue"),
    "diffusers-block": _diffusers("block", record=False),
    "diffusers-block-rs": _diffusers("block", record=True),
    "diffusers-leaf": _diffusers("leaf", record=False),
    "diffusers-leaf-rs": _diffusers("leaf", record=True),
    "cachedit": Engine(
        "cache-dit layerwise", "bench.engines.cachedit", packages=("cache-dit==1.5.3",)
    ),
    "mmgp": Engine(
        "mmgp", "bench.engines.mmgp_all", packages=("mmgp==3.8.2", "optimum-quanto==0.2.7")
    ),
    "ramtorch": Engine("RamTorch", "bench.engines.ram", packages=("ramtorch==1.11.0",)),
    "accelerate": Engine(
        "accelerate cpu_offload", "bench.engines.accelerated", packages=("accelerate==1.15.0",)
    ),
}
"""In the order of the tables."""

OURS = ("dgls", "dgls-layer", "dgls-compress", "dgls-compress-all")
"""No peers of one another."""
PEERS = tuple(name for name in ENGINES if name not in ("resident", *OURS))

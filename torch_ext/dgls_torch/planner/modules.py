"""`plan`: what `stream` would do with a model, without touching it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from dgls_torch.blocks import budget_shares, compute_device, models_of
from dgls_torch.config import StreamConfig
from dgls_torch.memory import auto_vram_bytes
from dgls_torch.planner.encoded import inputs_of
from dgls_torch.planner.forecast import Forecast, forecast
from dgls_torch.planner.sizes import sizes_of
from dgls_torch.units import MIB, parse_rate, parse_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dgls_torch.planner.sizes import ModelSizes

#: Seconds that the driver and the link take for a copy of any size.
LATENCY_S = 10e-6


@overload
def plan(
    model: nn.Module,
    vram: int | float | str | None = None,
    *,
    h2d_bytes_per_s: float | str | None = None,
    compute_s: float | Sequence[float] | None = None,
    copy_latency_s: float | str = LATENCY_S,
    outside_s: float | str = 0.0,
    granularity: int | str = "tensor",
    resident: Sequence[int] | None = None,
    prefetch: int | None = None,
    verify: bool = False,
    config: StreamConfig | None = None,
    **fields: Any,
) -> Forecast: ...


@overload
def plan(
    model: object,
    vram: int | float | str | None = None,
    *,
    h2d_bytes_per_s: float | str | None = None,
    compute_s: float | Sequence[float] | None = None,
    copy_latency_s: float | str = LATENCY_S,
    outside_s: float | str = 0.0,
    granularity: int | str = "tensor",
    resident: Sequence[int] | None = None,
    prefetch: int | None = None,
    verify: bool = False,
    config: StreamConfig | None = None,
    **fields: Any,
) -> Forecast | dict[str, Forecast]: ...


def plan(
    model: object,
    vram: int | float | str | None = None,
    *,
    h2d_bytes_per_s: float | str | None = None,
    compute_s: float | Sequence[float] | None = None,
    copy_latency_s: float | str = LATENCY_S,
    outside_s: float | str = 0.0,
    granularity: int | str = "tensor",
    resident: Sequence[int] | None = None,
    prefetch: int | None = None,
    verify: bool = False,
    config: StreamConfig | None = None,
    **fields: Any,
) -> Forecast | dict[str, Forecast]:
    """Plans a model as `dgls_torch.stream` would find it, without attaching or moving anything.

    Args:
        model: A module, on any device and on meta too, or a diffusers pipeline: its transformers
            and unets then share the budget, as they do when streamed.
        vram: Budget for the weights on the device: ``"auto"``, ``"8GiB"`` or bytes.
        h2d_bytes_per_s: Rate of the copies, as a number or ``"25GB/s"``; measured if not given.
        compute_s: Seconds of all blocks together, split among them by the elements of their
            matrices; or of each block in turn. Unknown if not given: copies alone are planned.
        copy_latency_s: What each copy takes beside its bytes, as a number of seconds or ``"10us"``.
        outside_s: Seconds of each pass outside of the blocks.
        granularity: ``"tensor"``, ``"block"``, or multiples of so many bytes.
        resident: The blocks that stay whole; all others are then streamed whole.
        prefetch: The most streamed blocks that are copied ahead of the running one.
        verify: Whether to solve for the optimum over all policies too.
        config: Everything else, as for `dgls_torch.stream`.
        **fields: Single fields of `StreamConfig`: ``blocks``, ``exclude``, ``source``, ``unit``,
            and ``compress``, as it would be on a GPU, where not ``"off"``.

    Returns:
        The plan; print it. One for each model of a pipeline with several.

    Raises:
        ValueError: The budget is too small (the message names the smallest that works), no blocks
            were found, or a number is out of its range.
        TypeError: An argument is of a wrong type or unknown.
    """
    fields |= {} if vram is None else {"vram": vram}
    config = (config or StreamConfig()).replace(**fields)
    options = {
        "outside_s": parse_seconds(outside_s, "outside_s"),
        "granularity": granularity,
        "resident": None if resident is None else list(resident),
        "prefetch": prefetch,
        "verify": verify or None,
    }
    latency_s = parse_seconds(copy_latency_s, "copy_latency_s")
    rate = _rate(h2d_bytes_per_s, config)
    models = models_of(model)
    found: dict[str, Forecast] = {}
    for (name, part), own in zip(models, budget_shares(models, config), strict=True):
        sizes = sizes_of(part, own)
        budget = own.vram_bytes or auto_vram_bytes(_device(own))
        seconds = _compute_s(compute_s, sizes)
        inputs, outside, encoded = inputs_of(
            sizes, budget, seconds, rate, latency_s, own.compress, **options
        )
        names = [block.name for block in sizes.blocks]
        found[name] = forecast(inputs, outside, names, encoded)
    return found if len(models) > 1 else found[models[0][0]]


def _device(config: StreamConfig) -> torch.device:
    return compute_device(None if config.device is None else str(config.device))


def _rate(value: float | str | None, config: StreamConfig) -> float:
    if value is not None:
        return parse_rate(value, "h2d_bytes_per_s")
    if config.copy_bytes_per_s is not None:
        return config.copy_bytes_per_s
    device = _device(config)
    return _measured(-1 if device.index is None else device.index)


@cache
def _measured(device: int) -> float:
    return float(torch.ops.dgls.measure_copy(device, 64 * MIB, 3, True))


def _compute_s(value: float | Sequence[float] | None, sizes: ModelSizes) -> list[float]:
    blocks = len(sizes.blocks)
    if value is None:
        return [0.0] * blocks
    if isinstance(value, (int, float, str)):
        return sizes.split_s(parse_seconds(value, "compute_s"))
    each = [parse_seconds(seconds, f"compute_s[{i}]") for i, seconds in enumerate(value)]
    if len(each) != blocks:
        raise ValueError(f"compute_s needs one number for each of {blocks} blocks, got {len(each)}")
    return each

"""Casts weights of a model, once and for good: for a model that no one else has.

Only operations of ComfyUI's are cast, since those cast their weights at use; normalisation and
batch-norm statistics keep their precision. 4-bit weights are stored in 4 bits: fp4 as ComfyUI's own
NVFP4 tensors, nf4 with bitsandbytes; nothing is quantised only to be dequantised again.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dgls_torch.comfy import nf4
from dgls_torch.comfy.cast_grammar import NF4, short_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dgls_torch.comfy.cast_grammar import Format

log = logging.getLogger("dgls_torch")
_LAYOUT = "TensorCoreNVFP4Layout"
_GROUP = 16  # NVFP4 has one scale for so many numbers
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


def cast_modules(
    modules: Iterable[nn.Module], pairs: Iterable[tuple[torch.dtype | None, Format]]
) -> str:
    """Casts weights and biases in place, by the first pair whose source is theirs.

    Args:
        modules: Modules, without their children. Those that are no operation of ComfyUI's, and
            normalisations, are left alone.
        pairs: From what (``None`` is any floating-point type) to what.

    Returns:
        What was cast, as one line.
    """
    done: Counter[str] = Counter()
    pairs = [(source, _supported(target)) for source, target in pairs]
    for module in modules:
        if not hasattr(module, "comfy_cast_weights") or _is_norm(module):
            continue
        for name in ("weight", "bias"):
            param = module._parameters.get(name)
            if param is None or not param.is_floating_point() or _is_wrapped(param):
                continue
            target = next((t for s, t in pairs if s in (None, param.dtype)), None)
            made = None if target is None else _cast(param, target)
            if made is None or target is None:
                continue
            done[f"{short_name(param.dtype)} to {short_name(target)}"] += 1
            # In the mode that ComfyUI is in: its quantised tensors cannot be detached in another.
            module._parameters[name] = nn.Parameter(made, requires_grad=False)
            module.comfy_cast_weights = True  # type: ignore[assignment]
            if isinstance(target, str):
                _know_quantized(module, target)
    return ", ".join(f"{count} tensors {what}" for what, count in done.items()) or "nothing"


def _cast(param: torch.Tensor, target: Format) -> torch.Tensor | None:
    """The weight in another format; ``None`` where it stays as it is."""
    with torch.no_grad():
        source = param.detach()
        if isinstance(target, torch.dtype):
            low = target in _EIGHT_BITS and param.ndim < 2
            return None if low or target == param.dtype else source.to(target)
        if param.ndim != 2 or any(size % _GROUP for size in param.shape):
            return None
        if target == NF4:
            return nf4.quantized(source) if param.numel() % nf4.BLOCK == 0 else None
        from comfy.quant_ops import QuantizedTensor

        return QuantizedTensor.from_float(source, _LAYOUT)  # type: ignore[no-any-return]


def _supported(target: Format) -> Format:
    """The format itself, or bf16 with a message where it cannot be stored or computed with."""
    try:
        probe = _cast(torch.ones(_GROUP, _GROUP, dtype=torch.bfloat16), target)
        assert probe is not None or target is torch.bfloat16
        if probe is not None:
            torch.nn.functional.linear(
                torch.ones(1, _GROUP, dtype=torch.bfloat16), probe.to(torch.bfloat16)
            )
    except (AssertionError, ImportError, AttributeError, RuntimeError, TypeError) as error:
        return _instead(target, str(error) or "it does not work here")
    return target


def _instead(target: Format, why: str) -> torch.dtype:
    log.warning("DGLS: casting to bf16 instead of %s: %s", short_name(target), why)
    return torch.bfloat16


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _is_wrapped(param: torch.Tensor) -> bool:
    return hasattr(param, "__tensor_flatten__")


def _know_quantized(module: Any, target: Format) -> None:
    """Tells ComfyUI how to read and write a quantised weight when it bakes a LoRA in."""

    def convert_weight(weight: Any, **_: Any) -> Any:
        return weight.dequantize() if hasattr(weight, "dequantize") else weight

    def set_weight(
        weight: torch.Tensor, return_weight: bool = False, seed: int | None = None, **_: Any
    ) -> torch.Tensor | None:
        made = _cast(weight, target)
        assert made is not None
        if return_weight:
            return made
        module._parameters["weight"] = nn.Parameter(made, requires_grad=False)
        return None

    module.convert_weight, module.set_weight = convert_weight, set_weight

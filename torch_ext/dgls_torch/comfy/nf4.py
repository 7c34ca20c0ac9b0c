"""NF4 weights as tensors that ComfyUI knows: 4 bits a number, one scale for each 64 of them.

bitsandbytes quantises and dequantises; without it there is no NF4. ComfyUI's own quantised tensor
holds the result, so its casts at use, its LoRAs and the engine treat it as any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

NAME = "DGLSNF4Layout"
#: Numbers that share a scale, as in the files and adapters that NF4 comes from.
BLOCK = 64
NEEDED = "NF4 needs the package bitsandbytes, which is not installed"
_registered: list[str] = []


def quantized(weight: torch.Tensor) -> torch.Tensor:
    """A matrix in NF4; its numbers have to be a whole number of blocks.

    Raises:
        ImportError: bitsandbytes is not there, or ComfyUI has no quantised tensors.
    """
    from comfy.quant_ops import QuantizedTensor

    if not _registered:
        _registered.append(_register())
    return QuantizedTensor.from_float(weight, NAME)  # type: ignore[no-any-return]


def _register() -> str:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError(NEEDED) from error
    from comfy_kitchen.tensor import BaseLayoutParams, QuantizedLayout, register_layout_class

    class NF4Layout(QuantizedLayout):  # type: ignore[misc]
        """Packed pairs of numbers, and the largest value of each block."""

        @dataclass(frozen=True)
        class Params(BaseLayoutParams):  # type: ignore[misc]
            """``scale`` is the largest value of each block."""

        @classmethod
        def quantize(cls, tensor: torch.Tensor, **_: Any) -> tuple[torch.Tensor, Any]:
            packed, state = functional.quantize_4bit(
                tensor.contiguous(), blocksize=BLOCK, quant_type="nf4"
            )
            shape = tuple(tensor.shape)
            return packed, cls.Params(scale=state.absmax, orig_dtype=tensor.dtype, orig_shape=shape)

        @classmethod
        def dequantize(cls, qdata: torch.Tensor, params: Any) -> torch.Tensor:
            state = functional.QuantState(
                absmax=params.scale,
                shape=torch.Size(params.orig_shape),
                code=functional.get_4bit_type("nf4", device=qdata.device),
                blocksize=BLOCK,
                quant_type="nf4",
                dtype=params.orig_dtype,
            )
            return functional.dequantize_4bit(qdata, state)  # type: ignore[no-any-return]

        @classmethod
        def get_plain_tensors(cls, qtensor: Any) -> tuple[torch.Tensor, ...]:
            return qtensor._qdata, qtensor._params.scale

        @classmethod
        def state_dict_tensors(cls, qdata: torch.Tensor, params: Any) -> dict[str, torch.Tensor]:
            return {"": qdata, "_scale": params.scale}

    register_layout_class(NAME, NF4Layout)
    return NAME

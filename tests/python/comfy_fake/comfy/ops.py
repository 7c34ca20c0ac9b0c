"""Layers that cast their weight to the input at use, and apply functions to it on the way."""

from __future__ import annotations

import torch


def cast_bias_weight(s, input=None):
    """The weight and bias of a layer for one use."""

    def ready(param, functions):
        if param is None:
            return None
        made = param.to(device=input.device, dtype=input.dtype)
        for function in functions:
            made = function(made)
        return made

    return ready(s.weight, s.weight_function), ready(s.bias, s.bias_function)


class CastWeightBiasOp:
    """What every layer of ComfyUI's has."""

    comfy_cast_weights = False
    weight_function: list = []  # noqa: RUF012
    bias_function: list = []  # noqa: RUF012


class disable_weight_init:
    """The namespace that networks take their layers from."""

    class Linear(torch.nn.Linear, CastWeightBiasOp):
        """A linear layer."""

        def reset_parameters(self):
            return None

        def forward(self, *args, **kwargs):
            if self.comfy_cast_weights or self.weight_function or self.bias_function:
                weight, bias = cast_bias_weight(self, args[0])
                return torch.nn.functional.linear(args[0], weight, bias)
            return super().forward(*args, **kwargs)

    class LayerNorm(torch.nn.LayerNorm, CastWeightBiasOp):
        """A normalisation."""

        def reset_parameters(self):
            return None

        def forward(self, *args, **kwargs):
            if self.comfy_cast_weights or self.weight_function or self.bias_function:
                weight, bias = cast_bias_weight(self, args[0])
                shape, eps = self.normalized_shape, self.eps
                return torch.nn.functional.layer_norm(args[0], shape, weight, bias, eps)
            return super().forward(*args, **kwargs)

"""The pieces both demo transformers share: rotary positions, time embedding, attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_DIM = 128
"""Width of one attention head in both families, at every model width."""


def sinusoid(time: Tensor, dim: int) -> Tensor:
    """Embeds ``time`` ([batch], 0 to 1000) as ``dim`` cosines and sines: [batch, dim], float32."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device)
    angles = time.float()[:, None] * torch.exp(steps * (-math.log(10000.0) / half))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope_angles(ids: Tensor, axes: tuple[int, ...], theta: float) -> tuple[Tensor, Tensor]:
    """Computes the rotation of every token from its position along each axis.

    Args:
        ids: Positions, [tokens, len(axes)].
        axes: Head dimensions given to each axis; they sum to the head dimension.
        theta: Base of the frequencies.

    Returns:
        Cosines and sines, each [tokens, 1, head_dim / 2], float32; they broadcast over heads.
    """
    parts = []
    for axis, dim in enumerate(axes):
        # The frequencies are taken in float64: theta**-x loses the last digits of large positions.
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        parts.append(ids[:, axis].double()[:, None] * theta**-exponent)
    angles = torch.cat(parts, dim=-1)[:, None, :]
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates neighbouring pairs of ``x`` ([batch, tokens, heads, head_dim]) by ``rope``."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attends: three [batch, tokens, heads, head_dim] become one [batch, tokens, width]."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def plain_norm(width: int) -> nn.LayerNorm:
    """Makes the layer norm without weights that stands before every modulated sub-layer."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def heads_of(width: int, what: str) -> int:
    """Counts the attention heads of a model ``width`` wide.

    Raises:
        ValueError: ``width`` is no positive multiple of 128.
    """
    if width <= 0 or width % HEAD_DIM:
        raise ValueError(f"{what} must be a positive multiple of {HEAD_DIM}, got {width}")
    return width // HEAD_DIM

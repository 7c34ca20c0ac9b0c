"""A FLUX.1-shaped image transformer: the real layers, sizes and weight names, in plain torch.

The names of the state dict are those of the published FLUX.1-dev checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import attend, heads_of, plain_norm, rope_angles, rotate, sinusoid

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Dimensions; the defaults are those of FLUX.1-dev (11.9 billion parameters)."""

    hidden: int = 3072
    """Width of the residual stream, a multiple of the head dimension 128."""
    double_depth: int = 19
    """Blocks with separate weights for image and text tokens."""
    single_depth: int = 38
    """Blocks with one set of weights for all tokens."""
    mlp_ratio: int = 4
    """Width of the MLP as a multiple of ``hidden``."""
    in_channels: int = 64
    """Values of one image token: 16 latent channels times a 2 by 2 patch."""
    context_dim: int = 4096
    """Width of the text tokens given to ``txt_in``."""
    vector_dim: int = 768
    """Width of the pooled text vector given to ``vector_in``."""
    axes: tuple[int, int, int] = (16, 56, 56)
    """Head dimensions rotated by each of the three position axes."""
    theta: float = 10000.0
    """Base of the rotary frequencies."""

    @property
    def heads(self) -> int:
        """Attention heads; each is 128 wide."""
        return heads_of(self.hidden, "hidden")

    def scaled(self, hidden: int) -> FluxConfig:
        """Makes a narrower or wider model of the same depth and structure.

        Raises:
            ValueError: ``hidden`` is no positive multiple of 128.
        """
        heads_of(hidden, "hidden")
        return replace(self, hidden=hidden)


class Embedder(nn.Module):
    """A two-layer MLP that lifts one conditioning vector to the model's width."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, in_dim] to [batch, hidden]."""
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


class Modulation(nn.Module):
    """Shifts, scales and gates computed from the conditioning vector."""

    def __init__(self, hidden: int, parts: int) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(hidden, parts * hidden)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """Maps [batch, hidden] to ``parts`` tensors [batch, 1, hidden]."""
        parts: tuple[Tensor, ...] = self.lin(F.silu(vec))[:, None, :].chunk(self.parts, dim=-1)
        return parts


class HeadNorm(nn.Module):
    """RMS norm over one head, with a learned scale."""

    def __init__(self, head_dim: int) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of ``x``."""
        return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)


class QKNorm(nn.Module):
    """The two norms of queries and keys."""

    def __init__(self, head_dim: int) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        self.query_norm = HeadNorm(head_dim)
        self.key_norm = HeadNorm(head_dim)

    def forward(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Splits [batch, tokens, 3 * width] into normed q, k and v by head."""
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    """The attention weights of one token stream; the block joins the two streams."""

    def __init__(self, config: FluxConfig) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.norm = QKNorm(config.hidden // config.heads)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects [batch, tokens, hidden] to q, k and v by head."""
        q, k, v = self.norm(self.qkv(x), self.heads)
        return q, k, v


def _mlp(config: FluxConfig) -> nn.Sequential:
    wide = config.mlp_ratio * config.hidden
    return nn.Sequential(
        nn.Linear(config.hidden, wide), nn.GELU(approximate="tanh"), nn.Linear(wide, config.hidden)
    )


class DoubleStreamBlock(nn.Module):
    """Image and text tokens with their own weights, joined in one attention."""

    def __init__(self, config: FluxConfig) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        self.img_mod = Modulation(config.hidden, 6)
        self.img_norm1 = plain_norm(config.hidden)
        self.img_attn = SelfAttention(config)
        self.img_norm2 = plain_norm(config.hidden)
        self.img_mlp = _mlp(config)
        self.txt_mod = Modulation(config.hidden, 6)
        self.txt_norm1 = plain_norm(config.hidden)
        self.txt_attn = SelfAttention(config)
        self.txt_norm2 = plain_norm(config.hidden)
        self.txt_mlp = _mlp(config)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Maps image and text tokens to themselves; both [batch, tokens, hidden]."""
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        img_qkv = self.img_attn((1 + img_mod[1]) * self.img_norm1(img) + img_mod[0])
        txt_qkv = self.txt_attn((1 + txt_mod[1]) * self.txt_norm1(txt) + txt_mod[0])
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(txt_qkv, img_qkv, strict=True))
        joined = attend(rotate(q, rope), rotate(k, rope), v)
        txt_out, img_out = joined.split((txt.shape[1], img.shape[1]), dim=1)

        img = img + img_mod[2] * self.img_attn.proj(img_out)
        txt = txt + txt_mod[2] * self.txt_attn.proj(txt_out)
        img = img + img_mod[5] * self.img_mlp((1 + img_mod[4]) * self.img_norm2(img) + img_mod[3])
        txt = txt + txt_mod[5] * self.txt_mlp((1 + txt_mod[4]) * self.txt_norm2(txt) + txt_mod[3])
        return img, txt


class SingleStreamBlock(nn.Module):
    """All tokens with one set of weights; attention and MLP run side by side."""

    def __init__(self, config: FluxConfig) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        hidden, wide = config.hidden, config.mlp_ratio * config.hidden
        self.heads = config.heads
        self.split = (3 * hidden, wide)
        self.linear1 = nn.Linear(hidden, 3 * hidden + wide)
        self.linear2 = nn.Linear(hidden + wide, hidden)
        self.norm = QKNorm(hidden // config.heads)
        self.pre_norm = plain_norm(hidden)
        self.modulation = Modulation(hidden, 3)

    def forward(self, x: Tensor, vec: Tensor, rope: Rope) -> Tensor:
        """Maps [batch, tokens, hidden] to itself."""
        shift, scale, gate = self.modulation(vec)
        qkv, wide = self.linear1((1 + scale) * self.pre_norm(x) + shift).split(self.split, dim=-1)
        q, k, v = self.norm(qkv, self.heads)
        joined = attend(rotate(q, rope), rotate(k, rope), v)
        out: Tensor = self.linear2(torch.cat((joined, F.gelu(wide, approximate="tanh")), dim=-1))
        x = x + gate * out
        return x


class LastLayer(nn.Module):
    """The modulated norm and projection back to image tokens."""

    def __init__(self, config: FluxConfig) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        self.norm_final = plain_norm(config.hidden)
        self.linear = nn.Linear(config.hidden, config.in_channels)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.hidden, 2 * config.hidden)
        )

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """Maps [batch, tokens, hidden] to [batch, tokens, in_channels]."""
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        out: Tensor = self.linear((1 + scale) * self.norm_final(x) + shift)
        return out


class Flux(nn.Module):
    """The whole transformer: embedders, double blocks, single blocks, last layer."""

    def __init__(self, config: FluxConfig) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.img_in = nn.Linear(config.in_channels, hidden)
        self.time_in = Embedder(256, hidden)
        self.vector_in = Embedder(config.vector_dim, hidden)
        self.guidance_in = Embedder(256, hidden)
        self.txt_in = nn.Linear(config.context_dim, hidden)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(config) for _ in range(config.double_depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.single_depth)
        )
        self.final_layer = LastLayer(config)

    def forward(
        self, img: Tensor, txt: Tensor, ids: Tensor, time: Tensor, pooled: Tensor, guidance: Tensor
    ) -> Tensor:
        """Predicts the velocity of the image tokens.

        Args:
            img: Image tokens, [batch, image tokens, in_channels].
            txt: Text tokens, [batch, text tokens, context_dim].
            ids: Positions of text then image tokens, [text + image tokens, 3].
            time: Noise level, [batch], 0 to 1.
            pooled: Pooled text vector, [batch, vector_dim].
            guidance: Guidance strength, [batch].

        Returns:
            [batch, image tokens, in_channels].
        """
        vec = self.time_in(sinusoid(1000 * time, 256).to(img.dtype))
        vec = vec + self.guidance_in(sinusoid(1000 * guidance, 256).to(img.dtype))
        vec = vec + self.vector_in(pooled)
        rope = rope_angles(ids, self.config.axes, self.config.theta)
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope)
        text_tokens = txt.shape[1]
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec, rope)
        velocity: Tensor = self.final_layer(x[:, text_tokens:], vec)
        return velocity

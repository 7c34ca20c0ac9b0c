"""A WAN 2.1 14B-shaped video transformer: the real layers, sizes and weight names, in plain torch.

The names of the state dict are those of the published Wan2.1-T2V-14B checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .layers import HEAD_DIM, attend, heads_of, plain_norm, rope_angles, rotate, sinusoid

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Dimensions; the defaults are those of WAN 2.1 T2V 14B (14.3 billion parameters)."""

    hidden: int = 5120
    """Width of the residual stream, a multiple of the head dimension 128."""
    ffn: int = 13824
    """Width of the feed-forward network."""
    depth: int = 40
    """Transformer blocks."""
    channels: int = 16
    """Channels of the video latent, in and out."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Frames, rows and columns of the latent that become one token."""
    text_dim: int = 4096
    """Width of the text tokens given to ``text_embedding``."""
    freq_dim: int = 256
    """Width of the time's sinusoid."""
    theta: float = 10000.0
    """Base of the rotary frequencies."""

    @property
    def heads(self) -> int:
        """Attention heads; each is 128 wide."""
        return heads_of(self.hidden, "hidden")

    @property
    def axes(self) -> tuple[int, int, int]:
        """Head dimensions rotated by frame, row and column: 44, 42 and 42."""
        side = 2 * (HEAD_DIM // 6)
        return (HEAD_DIM - 2 * side, side, side)

    def scaled(self, hidden: int) -> WanConfig:
        """Makes a narrower or wider model of the same depth and structure.

        The feed-forward width keeps its ratio of 2.7, rounded to a multiple of 16.

        Raises:
            ValueError: ``hidden`` is no positive multiple of 128.
        """
        heads_of(hidden, "hidden")
        ffn = 16 * round(self.ffn * hidden / self.hidden / 16)
        return replace(self, hidden=hidden, ffn=ffn)


class Attention(nn.Module):
    """Attention with RMS norms over the full width of queries and keys.

    Queries come from ``x``; keys and values from ``context``, which is ``x`` for self-attention.
    """

    def __init__(self, config: WanConfig) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        width = config.hidden
        self.heads = config.heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width, eps=1e-6)
        self.norm_k = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor, rope: Rope | None) -> Tensor:
        """Maps [batch, tokens, hidden] to itself; ``rope`` None leaves positions out."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        k = self.norm_k(self.k(context)).unflatten(-1, (self.heads, -1))
        v = self.v(context).unflatten(-1, (self.heads, -1))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out: Tensor = self.o(attend(q, k, v))
        return out


class WanBlock(nn.Module):
    """Self-attention, cross-attention to the text, and a feed-forward network."""

    def __init__(self, config: WanConfig) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        width = config.hidden
        self.norm1 = plain_norm(width)
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn = Attention(config)
        self.norm2 = plain_norm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, config.ffn),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn, width),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, width))

    def forward(self, x: Tensor, mod: Tensor, context: Tensor, rope: Rope) -> Tensor:
        """Maps video tokens to themselves.

        Args:
            x: Video tokens, [batch, tokens, hidden].
            mod: The time's six shifts, scales and gates, [batch, 6, hidden].
            context: Embedded text tokens, [batch, text tokens, hidden].
            rope: Rotations of the video tokens.

        Returns:
            [batch, tokens, hidden].
        """
        parts = (self.modulation + mod).chunk(6, dim=1)
        normed = self.norm1(x) * (1 + parts[1]) + parts[0]
        x = x + parts[2] * self.self_attn(normed, normed, rope)
        x = x + self.cross_attn(self.norm3(x), context, None)
        x = x + parts[5] * self.ffn(self.norm2(x) * (1 + parts[4]) + parts[3])
        return x


class Head(nn.Module):
    """The modulated norm and projection back to patches."""

    def __init__(self, config: WanConfig) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        frames, rows, columns = config.patch
        self.norm = plain_norm(config.hidden)
        self.head = nn.Linear(config.hidden, config.channels * frames * rows * columns)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.hidden))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Maps [batch, tokens, hidden] to [batch, tokens, values of a patch]."""
        shift, scale = (self.modulation + time[:, None, :]).chunk(2, dim=1)
        out: Tensor = self.head(self.norm(x) * (1 + scale) + shift)
        return out


class Wan(nn.Module):
    """The whole transformer: embeddings, blocks, head."""

    def __init__(self, config: WanConfig) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        self.config = config
        width = config.hidden
        self.patch_embedding = nn.Conv3d(
            config.channels, width, kernel_size=config.patch, stride=config.patch
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, width),
            nn.GELU(approximate="tanh"),
            nn.Linear(width, width),
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.depth))
        self.head = Head(config)

    def forward(self, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Predicts the velocity of the video latent.

        Args:
            latent: [batch, channels, frames, rows, columns].
            time: Noise level, [batch], 0 to 1.
            text: Text tokens, [batch, text tokens, text_dim].

        Returns:
            The shape of ``latent``.
        """
        x = self.patch_embedding(latent)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        rope = rope_angles(_positions(grid, x.device), self.config.axes, self.config.theta)
        embedded = self.time_embedding(sinusoid(1000 * time, self.config.freq_dim).to(x.dtype))
        mod = self.time_projection(embedded).unflatten(-1, (6, -1))
        context = self.text_embedding(text)
        for block in self.blocks:
            x = block(x, mod, context, rope)
        return self._unpatch(self.head(x, embedded), grid)

    def _unpatch(self, x: Tensor, grid: torch.Size) -> Tensor:
        x = x.unflatten(-1, (*self.config.patch, self.config.channels)).unflatten(1, grid)
        # [batch, F, H, W, f, h, w, channels] -> [batch, channels, F, f, H, h, W, w]
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _positions(grid: torch.Size, device: torch.device) -> Tensor:
    """Lists frame, row and column of every token: [tokens, 3]."""
    axes = [torch.arange(extent, device=device) for extent in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)

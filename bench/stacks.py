"""The measured models: stacks of transformer blocks with the layer shapes and counts of real ones.

A stack is ``inp``, ``blocks`` and ``out``; every part maps ``(x, c)`` to ``(x, c)``, so that any
engine can chain it. Text tokens stand first in ``x``. Positions (RoPE) are left out: they have no
weights. No name ends in a digit, since one engine takes such names for members of a list.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

Pair = tuple[Tensor, Tensor]

HEAD_DIM = 128
LATENT = 64
TEXT_TOKENS = 512
_WAN_RATIO = 2.7


class Block(nn.Module):
    """A block that can be held to a least time, for runs without a GPU."""

    pace_s = 0.0
    """A forward takes at least this many seconds; the processor is free meanwhile."""

    def forward(self, x: Tensor, c: Tensor) -> Pair:
        """Maps tokens [1, tokens, width] and conditioning to themselves."""
        if self.pace_s == 0.0:
            return self.compute(x, c), c
        until = time.perf_counter() + self.pace_s
        y = self.compute(x, c)
        time.sleep(max(0.0, until - time.perf_counter()))
        return y, c

    def compute(self, x: Tensor, c: Tensor) -> Tensor:
        """Maps tokens to themselves."""
        raise NotImplementedError


class CastLinear(nn.Linear):
    """A linear layer whose weight is stored in fp8 and cast where it is used, as ComfyUI does."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out] in the dtype of ``x``."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class HeadNorm(nn.Module):
    """RMS norm of heads, or of the whole width, with a learned scale."""

    def __init__(self, width: int) -> None:
        """Makes the scale."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)


def _norm(x: Tensor) -> Tensor:
    y: Tensor = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return y


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Stream(nn.Module):
    """The weights of one token stream of a double block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mod = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = HeadNorm(HEAD_DIM), HeadNorm(HEAD_DIM)
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def split(self, x: Tensor, mod: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(_norm(x) * (1 + mod[1]) + mod[0]).unflatten(-1, (3, -1, HEAD_DIM))
        q, k, v = heads.unbind(2)
        return self.norm_q(q), self.norm_k(k), v

    def join(self, x: Tensor, attended: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
        x = x + mod[2] * self.proj(attended)
        wide = F.gelu(self.up(_norm(x) * (1 + mod[4]) + mod[3]), approximate="tanh")
        out: Tensor = x + mod[5] * self.down(wide)
        return out


class DoubleBlock(Block):
    """FLUX's and HunyuanVideo's double block, and Qwen-Image's block: 340 M weights at 3072."""

    def __init__(self, width: int, text_tokens: int) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        self.text_tokens = text_tokens
        self.image, self.text = _Stream(width), _Stream(width)

    def compute(self, x: Tensor, c: Tensor) -> Tensor:
        """Joins both streams in one attention."""
        text, image = x[:, : self.text_tokens], x[:, self.text_tokens :]
        lifted = F.silu(c)
        text_mod = self.text.mod(lifted).chunk(6, dim=-1)
        image_mod = self.image.mod(lifted).chunk(6, dim=-1)
        text_heads = self.text.split(text, text_mod)
        image_heads = self.image.split(image, image_mod)
        pairs = zip(text_heads, image_heads, strict=True)
        attended = _attend(*(torch.cat(pair, dim=1) for pair in pairs))
        text = self.text.join(text, attended[:, : self.text_tokens], text_mod)
        image = self.image.join(image, attended[:, self.text_tokens :], image_mod)
        return torch.cat((text, image), dim=1)


class SingleBlock(Block):
    """FLUX's and HunyuanVideo's single block: 142 M weights at 3072."""

    def __init__(self, width: int, text_tokens: int) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        self.width = width
        self.mod = nn.Linear(width, 3 * width)
        self.wide_in = nn.Linear(width, 7 * width)
        self.norm_q, self.norm_k = HeadNorm(HEAD_DIM), HeadNorm(HEAD_DIM)
        self.wide_out = nn.Linear(5 * width, width)

    def compute(self, x: Tensor, c: Tensor) -> Tensor:
        """Attention and MLP side by side."""
        shift, scale, gate = self.mod(F.silu(c)).chunk(3, dim=-1)
        both = self.wide_in(_norm(x) * (1 + scale) + shift)
        qkv, wide = both.split((3 * self.width, 4 * self.width), dim=-1)
        q, k, v = qkv.unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)
        attended = _attend(self.norm_q(q), self.norm_k(k), v)
        joined = torch.cat((attended, F.gelu(wide, approximate="tanh")), dim=-1)
        out: Tensor = x + gate * self.wide_out(joined)
        return out


class _Attention(nn.Module):
    """WAN's attention: queries from the tokens, keys and values from a context."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_q, self.norm_k = HeadNorm(width), HeadNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.norm_q(self.q(x)).unflatten(-1, (-1, HEAD_DIM))
        k = self.norm_k(self.k(context)).unflatten(-1, (-1, HEAD_DIM))
        attended: Tensor = self.o(_attend(q, k, self.v(context).unflatten(-1, (-1, HEAD_DIM))))
        return attended


class WanBlock(Block):
    """WAN 2.1 14B's block: 351 M weights at 5120. ``c`` holds the time in its first six rows."""

    def __init__(self, width: int, text_tokens: int) -> None:
        """Makes the layers on the current device."""
        super().__init__()
        ffn = 16 * round(_WAN_RATIO * width / 16)
        self.modulation = nn.Parameter(torch.zeros(1, 6, width))
        self.self_attn, self.cross_attn = _Attention(width), _Attention(width)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def compute(self, x: Tensor, c: Tensor) -> Tensor:
        """Self-attention, cross-attention to the text, feed-forward."""
        mod = (self.modulation + c[:, :6]).chunk(6, dim=1)
        normed = _norm(x) * (1 + mod[1]) + mod[0]
        x = x + mod[2] * self.self_attn(normed, normed)
        x = x + self.cross_attn(self.norm_cross(x), c[:, 6:])
        wide = F.gelu(self.up(_norm(x) * (1 + mod[4]) + mod[3]), approximate="tanh")
        out: Tensor = x + mod[5] * self.down(wide)
        return out


class End(nn.Module):
    """The layer before the blocks, or the one after them."""

    def __init__(self, rows: int, columns: int) -> None:
        """Makes the layer on the current device."""
        super().__init__()
        self.linear = nn.Linear(columns, rows)

    def forward(self, x: Tensor, c: Tensor) -> Pair:
        """Changes the width of the tokens."""
        return self.linear(x), c


class Stack(nn.Module):
    """The whole model; ``order`` is no part of the registry, so that blocks can be hidden."""

    order: list[Block]

    def __init__(self, blocks: list[Block], width: int) -> None:
        """Makes the ends on the current device."""
        super().__init__()
        self.inp, self.out = End(width, LATENT), End(LATENT, width)
        self.blocks = nn.ModuleList(blocks)
        self.__dict__["order"] = list(blocks)

    def hide(self, indices: set[int], device: torch.device) -> None:
        """Puts blocks on the device for good, where an engine that offloads all will not look."""
        for index in indices:
            self.order[index].to(device)
        self.blocks = nn.ModuleList([b for i, b in enumerate(self.order) if i not in indices])

    def pace(self, seconds: float) -> None:
        """Holds every block to a least time."""
        for block in self.order:
            block.pace_s = seconds

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Maps latents [1, tokens, 64] to latents."""
        x, c = self.inp(x, c)
        for block in self.order:
            x, c = block(x, c)
        out: Tensor = self.out(x, c)[0]
        return out


@dataclass(frozen=True)
class Shape:
    """A family: its width at scale 1, and its blocks in order."""

    title: str
    width: int
    blocks: tuple[tuple[Callable[[int, int], Block], int], ...]
    conditioning_rows: int
    text_rows: int
    """Rows of text in ``c``; 0 where the text is among the tokens."""


SHAPES = {
    "flux": Shape("FLUX.1", 3072, ((DoubleBlock, 19), (SingleBlock, 38)), 1, 0),
    "wan": Shape("WAN 2.1 14B", 5120, ((WanBlock, 40),), 6, TEXT_TOKENS),
    "qwen": Shape("Qwen-Image", 3072, ((DoubleBlock, 60),), 1, 0),
    "hunyuan": Shape("HunyuanVideo", 3072, ((DoubleBlock, 20), (SingleBlock, 40)), 1, 0),
}


@dataclass(frozen=True)
class Workload:
    """One model to measure: a shape, a width, a dtype of the weights."""

    shape: str
    dtype: str = "bf16"
    scale: float = 1.0
    """Of the width; 1 is the real model."""
    depth: float = 1.0
    """Of the number of blocks; 1 is the real model."""
    text_tokens: int = TEXT_TOKENS

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: A field is unknown or out of range.
        """
        if self.shape not in SHAPES:
            raise ValueError(f"shape needs one of {', '.join(SHAPES)}, found {self.shape!r}")
        if self.dtype not in ("bf16", "fp8"):
            raise ValueError(f"dtype needs bf16 or fp8, found {self.dtype!r}")
        if not 0 < self.scale <= 1 or not 0 < self.depth <= 1:
            raise ValueError(f"scale and depth need 0 to 1, found {self.scale} and {self.depth}")

    @property
    def width(self) -> int:
        """A multiple of the head's width."""
        return HEAD_DIM * max(1, round(self.scale * SHAPES[self.shape].width / HEAD_DIM))

    @property
    def key(self) -> str:
        """Names it in results and files."""
        tail = "" if self.scale == 1 else f"-x{self.scale:g}"
        tail += "" if self.depth == 1 else f"-d{self.depth:g}"
        return f"{self.shape}-{self.dtype}{tail}"

    def title(self) -> str:
        """Names it for people."""
        text = f"{SHAPES[self.shape].title} {self.dtype}"
        if self.scale != 1:
            text += f", width {self.width}"
        return text if self.depth == 1 else f"{text}, {self.depth:g} of the blocks"

    def build(self) -> Stack:
        """Makes the stack on the meta device: shapes and dtypes, no values."""
        shape, width = SHAPES[self.shape], self.width
        with torch.device("meta"):
            blocks = [
                make(width, self.text_tokens)
                for make, count in shape.blocks
                for _ in range(max(2, round(self.depth * count)))
            ]
            stack = Stack(blocks, width).to(torch.bfloat16).eval().requires_grad_(False)
        if self.dtype == "fp8":
            for module in stack.blocks.modules():
                if isinstance(module, nn.Linear):
                    module.__class__ = CastLinear
                    module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
        return stack

    def inputs(self, tokens: int, device: torch.device) -> Pair:
        """Draws latents and conditioning, the same on every device."""
        shape, generator = SHAPES[self.shape], torch.Generator().manual_seed(tokens)
        x = torch.randn(1, tokens, LATENT, generator=generator)
        rows = shape.conditioning_rows + (self.text_tokens if shape.text_rows else 0)
        c = torch.randn(1, rows, self.width, generator=generator)
        return x.to(device, torch.bfloat16), c.to(device, torch.bfloat16)

    def least_tokens(self) -> int:
        """Fewer tokens would leave nothing beside the text."""
        room = max(1, self.text_tokens // 32)
        return room if SHAPES[self.shape].text_rows else self.text_tokens + room


def weight_bytes(module: nn.Module) -> int:
    """The bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())

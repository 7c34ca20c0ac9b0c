"""What the demo samples: each model at each size, its random inputs, and the Euler loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .flux import Flux, FluxConfig
from .wan import Wan, WanConfig

SIZES = ("tiny", "small", "medium", "full")

Step = Callable[[int], AbstractContextManager[None]]
"""Opens around step ``index`` of the loop."""


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One model at one size, with the shape of what it samples."""

    name: str
    size: str
    text_tokens: int
    shift: float
    """How far the noise levels lean to the noisy end; 1 spaces them evenly."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the latent, batch first."""

    @property
    @abstractmethod
    def hidden(self) -> int:
        """Width of the model."""

    @property
    @abstractmethod
    def workspace_bytes(self) -> int:
        """Estimate of what one forward needs beside the weights, on the safe side."""

    @abstractmethod
    def describe(self) -> str:
        """Says what is sampled, in words."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Makes the model on the current device, in the default dtype."""

    @abstractmethod
    def conditioning(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws the model's inputs beside the latent and the time, on the CPU."""

    def meta_model(self) -> nn.Module:
        """Makes the model in bfloat16 on the meta device: shapes and names, no values."""
        with torch.device("meta"):
            return self.build().to(torch.bfloat16).requires_grad_(False).eval()

    def euler(
        self, model: nn.Module, steps: int, device: torch.device, seed: int, step: Step
    ) -> Tensor:
        """Integrates the flow from noise to the final latent.

        Args:
            model: Predicts the velocity; on ``device``.
            steps: Euler steps.
            device: Where the loop runs.
            seed: Of the noise and the conditioning.
            step: Opens around each step.

        Returns:
            The final latent, float32, on the CPU.
        """
        # Drawn on the CPU, so that every device starts from the same numbers.
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(self.shape, generator=generator).to(device)
        inputs = {name: _place(x, device) for name, x in self.conditioning(generator).items()}
        levels = noise_levels(steps, self.shift)
        with torch.inference_mode():
            for index, (level, following) in enumerate(pairwise(levels)):
                with step(index):
                    time = torch.full((self.shape[0],), level, device=device)
                    velocity = model(latent.to(torch.bfloat16), time=time, **inputs)
                    latent = latent + (following - level) * velocity.float()
        return latent.cpu()


def noise_levels(steps: int, shift: float) -> list[float]:
    """Lists the ``steps + 1`` noise levels of a flow-matching schedule, from 1 down to 0."""
    even = [1 - index / steps for index in range(steps + 1)]
    return [shift * level / (1 + (shift - 1) * level) for level in even]


@dataclass(frozen=True, kw_only=True)
class FluxCase(Case):
    """An image: a grid of latent patches."""

    config: FluxConfig
    grid: tuple[int, int]
    """Rows and columns of image tokens; one token is 16 by 16 pixels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """One latent, [1, image tokens, 64]."""
        return (1, self.grid[0] * self.grid[1], self.config.in_channels)

    @property
    def hidden(self) -> int:
        """Width of the model."""
        return self.config.hidden

    @property
    def workspace_bytes(self) -> int:
        """About 30 values a token and unit of width, in bfloat16."""
        return 60 * self.config.hidden * (self.shape[1] + self.text_tokens)

    def describe(self) -> str:
        """Says what is sampled, in words."""
        rows, columns = self.grid
        tokens = f"{rows * columns} image + {self.text_tokens} text tokens"
        return f"{16 * columns} x {16 * rows} pixels, {tokens}"

    def build(self) -> nn.Module:
        """Makes the model on the current device, in the default dtype."""
        return Flux(self.config)

    def conditioning(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws text, pooled text and guidance; text sits at position 0, patches on their grid."""
        config, (rows, columns) = self.config, self.grid
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        patches = torch.stack((torch.zeros_like(row), row, column), dim=-1).flatten(0, 1)
        text_ids = torch.zeros(self.text_tokens, 3, dtype=torch.int64)
        return {
            "txt": torch.randn(1, self.text_tokens, config.context_dim, generator=generator),
            "ids": torch.cat((text_ids, patches)),
            "pooled": torch.randn(1, config.vector_dim, generator=generator),
            "guidance": torch.full((1,), 3.5),
        }


@dataclass(frozen=True, kw_only=True)
class WanCase(Case):
    """A video: a box of latent patches."""

    config: WanConfig
    grid: tuple[int, int, int]
    """Frames, rows and columns of video tokens; one token is 16 by 16 pixels of 4 frames."""

    @property
    def shape(self) -> tuple[int, ...]:
        """One latent, [1, channels, frames, rows, columns]."""
        extents = (n * p for n, p in zip(self.grid, self.config.patch, strict=True))
        return (1, self.config.channels, *extents)

    @property
    def hidden(self) -> int:
        """Width of the model."""
        return self.config.hidden

    @property
    def workspace_bytes(self) -> int:
        """About 24 values a token and unit of width, in bfloat16."""
        frames, rows, columns = self.grid
        return 48 * self.config.hidden * frames * rows * columns

    def describe(self) -> str:
        """Says what is sampled, in words."""
        frames, rows, columns = self.grid
        tokens = f"{frames * rows * columns} video + {self.text_tokens} text tokens"
        return f"{4 * frames - 3} frames of {16 * columns} x {16 * rows} pixels, {tokens}"

    def build(self) -> nn.Module:
        """Makes the model on the current device, in the default dtype."""
        return Wan(self.config)

    def conditioning(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws the text."""
        shape = (1, self.text_tokens, self.config.text_dim)
        return {"text": torch.randn(shape, generator=generator)}


def _place(x: Tensor, device: torch.device) -> Tensor:
    """Moves ``x``; wide inputs in the model's dtype, positions and levels as they are."""
    return x.to(device, torch.bfloat16 if x.dim() > 1 and x.is_floating_point() else x.dtype)


def _flux(size: str, hidden: int, grid: tuple[int, int], text_tokens: int) -> FluxCase:
    config = FluxConfig().scaled(hidden)
    return FluxCase(
        name="flux", size=size, config=config, grid=grid, text_tokens=text_tokens, shift=3.0
    )


def _wan(size: str, hidden: int, grid: tuple[int, int, int], text_tokens: int) -> WanCase:
    config = WanConfig().scaled(hidden)
    return WanCase(
        name="wan", size=size, config=config, grid=grid, text_tokens=text_tokens, shift=5.0
    )


# The small sizes were chosen on two Zen 4 cores (about 350 GFLOP/s in bfloat16).
_CASES: tuple[Case, ...] = (
    _flux("tiny", 128, (4, 4), 8),
    _flux("small", 768, (16, 16), 64),
    _flux("medium", 1536, (64, 64), 512),
    _flux("full", 3072, (64, 64), 512),
    _wan("tiny", 256, (2, 2, 2), 8),
    _wan("small", 1024, (3, 8, 10), 64),
    _wan("medium", 2304, (5, 30, 52), 512),
    _wan("full", 5120, (21, 30, 52), 512),
)

MODELS = tuple(dict.fromkeys(case.name for case in _CASES))


def find_case(name: str, size: str) -> Case:
    """Looks up a model, one of ``MODELS``, at a size, one of ``SIZES``."""
    return next(case for case in _CASES if (case.name, case.size) == (name, size))

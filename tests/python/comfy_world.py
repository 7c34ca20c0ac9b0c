"""Small networks with the class names and call forms of ComfyUI's own, and how they are sampled.

Goal: a test says which network and what is done with it, and not how ComfyUI goes about it.
Method: no test of its own; what is here runs with the fake and with a real ComfyUI.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.ops import disable_weight_init as ops
from comfy_path import IS_REAL
from torch import nn

from dgls_torch.comfy.attach import stream_model
from dgls_torch.comfy.residency import Residency, sizes_of
from dgls_torch.comfy.settings import Settings

WIDTH = 128  # a matrix of it is larger than what always stays resident
CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block; counts its runs and keeps the address of what it was given."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = ops.LayerNorm(width)
        self.up = ops.Linear(width, 2 * width)
        self.down = ops.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)
        self.runs, self.address = 0, 0

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        self.runs, self.address = self.runs + 1, x.data_ptr()
        return x + self.scale.to(x) * self.down(torch.tanh(self.up(self.norm(x))))


class KeywordBlock(Block):
    """A block that is called with keywords only."""

    def forward(self, *, hidden_states: torch.Tensor, temb: Any) -> Any:  # type: ignore[override]
        return super().forward(hidden_states) + temb[0], None


class Network(nn.Module):
    """What all of them have: a layer before and one after the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = ops.Linear(WIDTH, WIDTH), ops.Linear(WIDTH, WIDTH)

    def blocks_run(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.blocks_run(self.first(x)))


class Flux(Network):
    """Two lists of blocks."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList(Block() for _ in range(count))
        self.single_blocks = nn.ModuleList(Block() for _ in range(count))

    def blocks_run(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.double_blocks, *self.single_blocks]:
            x = block(x)
        return x


class GeneralDIT(Network):
    """Blocks in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"block{n}": Block() for n in range(4)})

    def blocks_run(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


class ACEStepTransformer2DModel(Network):
    """Blocks that take keywords only and return a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(KeywordBlock() for _ in range(4))

    def blocks_run(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.transformer_blocks:
            x, _ = block(hidden_states=x, temb=(torch.ones(WIDTH),))
        return x


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that its owner walks through and never calls."""


class UNetModel(Network):
    """A UNet: its sequences' forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        kinds = TimestepEmbedSequential
        self.input_blocks = nn.ModuleList(kinds(Block(), Block()) for _ in range(2))
        self.middle_block = kinds(Block())
        self.output_blocks = nn.ModuleList(kinds(Block()) for _ in range(2))

    def blocks_run(self, x: torch.Tensor) -> torch.Tensor:
        for sequence in [*self.input_blocks, self.middle_block, *self.output_blocks]:
            for layer in sequence:
                x = layer(x)
        return x


class HiDreamImageTransformer2DModel(Network):
    """Two lists, of which the original saw one."""

    def __init__(self) -> None:
        super().__init__()
        self.double_stream_blocks = nn.ModuleList(Block() for _ in range(2))
        self.single_stream_blocks = nn.ModuleList(Block() for _ in range(2))

    def blocks_run(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.double_stream_blocks, *self.single_stream_blocks]:
            x = block(x)
        return x


class Unheard(Network):
    """A network of no known class."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Block() for _ in range(4))

    def blocks_run(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.stages:
            x = block(x)
        return x


NETWORKS = [
    *(Flux, GeneralDIT, ACEStepTransformer2DModel, UNetModel),
    *(HiDreamImageTransformer2DModel, Unheard),
]


class BaseModel(nn.Module):
    """What a patcher holds."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = net
        self.device: Any = None
        self.manual_cast_dtype = None
        self.current_patcher: Any = None


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fills every parameter by its name, so that two models of one class are equal."""
    with torch.no_grad():
        for number, (_, param) in enumerate(module.named_parameters()):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            param.copy_(torch.randn(param.shape, generator=generator) / 16)
            param.requires_grad_(False)
    return module.eval()


def patcher(kind: Any = Flux, seed: int = 0) -> Any:
    """A plain patcher of a new model; it can be loaded again."""

    def load(disable_dynamic: bool = False) -> Any:
        made = ModelPatcher(BaseModel(seeded(kind(), seed)), CPU, CPU)
        made.cached_patcher_init = (load, ())
        return made

    return load()


def sample(model: Any, passes: int = 2, x: torch.Tensor | None = None) -> torch.Tensor:
    """One sampling run, as ComfyUI makes it: load, pre_run, some passes, cleanup."""
    if x is None:
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        mm.load_models_gpu([model])
        model.pre_run()
        try:
            for _ in range(passes):
                made = model.model.diffusion_model(x)
        finally:
            model.cleanup()
    return made


def free_all() -> None:
    """What /free does, and what follows an OutOfMemoryError."""
    mm.unload_all_models()


def residency(model: Any) -> Residency:
    return Residency.of(model.model)


def difference(model: Any, key: str, value: float) -> dict[str, Any]:
    """A LoRA that adds ``value`` to every number of one weight."""
    shape = model.model.state_dict()[key].shape
    tensor = torch.full(shape, value)
    return {key: ("diff", (tensor,)) if IS_REAL else tensor}


def bits(model: Any) -> dict[str, bytes]:
    state = model.model.state_dict()
    return {name: value.numpy().tobytes() for name, value in state.items()}


def settings(model: Any, share: float = 0.6, **fields: Any) -> Settings:
    sizes = sizes_of(model.model, Settings(unit=fields.get("unit", "block")))
    vram = max(sizes.least_bytes, int(share * sizes.total_bytes))
    return Settings(vram_bytes=vram, **fields)


def streamed(model: Any, share: float = 0.6, **fields: Any) -> Any:
    return stream_model(model, settings(model, share, **fields))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)

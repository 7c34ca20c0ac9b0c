"""Finds the blocks of ComfyUI's diffusion models: which containers hold them, class by class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from dgls_torch.blocks import find_blocks, is_layer

if TYPE_CHECKING:
    from collections.abc import Iterator

Named = tuple[str, nn.Module]

_BLOCKS = ("blocks",)
_LAYERS = ("layers",)
_TRANSFORMER = ("transformer_blocks",)
_DOUBLE_SINGLE = ("double_blocks", "single_blocks")
_UNET = ("input_blocks", "middle_block", "output_blocks")
_CASCADE = ("down_blocks", "up_blocks")
_REFINED = ("layers", "context_refiner", "noise_refiner")

# Containers of each network class of ComfyUI 0.33, as dotted paths below it. Those that the
# original DGLS concatenated come first and in its order, so that an index means the same block; the
# order of running is learned anyway. What runs outside of the sampled forward (an adapter of the
# prompt, an encoder) is left to ComfyUI. Paths that a variant lacks are passed over.
CONTAINERS: dict[str, tuple[str, ...]] = {
    "ACEStepTransformer2DModel": _TRANSFORMER,
    "AceStepConditionGenerationModel": ("decoder.layers",),
    "Anima": _BLOCKS,
    "AnimateWanModel": ("blocks", "face_adapter.fuser_blocks"),
    "AsymmDiTJoint": _BLOCKS,
    "AudioDiffusionTransformer": ("transformer.layers",),
    "BooguTransformer2DModel": (
        *("double_stream_layers", "single_stream_layers"),
        *("context_refiner", "noise_refiner", "ref_image_refiner"),
    ),
    "CameraWanModel": _BLOCKS,
    "CausalWanModel": _BLOCKS,
    "Chroma": _DOUBLE_SINGLE,
    "ChromaRadiance": (*_DOUBLE_SINGLE, "nerf_blocks"),
    "CogVideoXTransformer3DModel": _BLOCKS,
    "ErnieImageModel": _LAYERS,
    "Flux": _DOUBLE_SINGLE,
    "GeneralDIT": _BLOCKS,
    "HiDreamImageTransformer2DModel": ("double_stream_blocks", "single_stream_blocks"),
    "HiDreamO1Transformer": ("language_model.layers", "visual.blocks"),
    "HumoWanModel": _BLOCKS,
    "HunYuanDiT": _BLOCKS,
    "HunYuanDiTPlain": _BLOCKS,
    "Hunyuan3Dv2": _DOUBLE_SINGLE,
    "HunyuanVideo": (*_DOUBLE_SINGLE, "txt_in.individual_token_refiner.blocks"),
    "Ideogram4Transformer2DModel": _LAYERS,
    "JoyImageTransformer3DModel": ("double_blocks",),
    "Kandinsky5": ("text_transformer_blocks", "visual_transformer_blocks"),
    "LTXAVModel": _TRANSFORMER,
    "LTXVModel": _TRANSFORMER,
    "LatentSeqMMFlowModel": ("blocks", "noise_refiner", "context_refiner"),
    "LensTransformer2DModel": _TRANSFORMER,
    "MMDiT": ("double_layers", "single_layers"),
    "MageFlowTransformer2DModel": _TRANSFORMER,
    "MiniMaxH3Model": ("blocks", "token_refiner.blocks"),
    "MiniMaxMusic3DiT": ("diffusion_transformer.transformer.layers",),
    "MiniTrainDIT": _BLOCKS,
    "NaDiT": _BLOCKS,
    "NextDiT": (*_REFINED, "siglip_refiner"),
    "NextDiTPixelSpace": (*_REFINED, "siglip_refiner", "dec_net.res_blocks"),
    "OmniGen2Transformer2DModel": (*_REFINED, "ref_image_refiner"),
    "OpenAISignatureMMDITWrapper": ("joint_blocks",),
    "PidNet": ("patch_blocks", "pixel_blocks"),
    "PixArtMS": _BLOCKS,
    "PixDiT_T2I": ("patch_blocks", "pixel_blocks"),
    "QwenImageTransformer2DModel": _TRANSFORMER,
    "SCAIL2WanModel": _BLOCKS,
    "SCAILWanModel": _BLOCKS,
    "SingleStreamDiT": ("blocks", "txtfusion.layerwise_blocks", "txtfusion.refiner_blocks"),
    "StageB": _CASCADE,
    "StageC": _CASCADE,
    "Trellis2": tuple(
        f"{part}.blocks" for part in ("structure_model", "img2shape_512", "img2shape", "shape2txt")
    ),
    "UNetModel": _UNET,
    "VaceWanModel": ("blocks", "vace_blocks"),
    "WanDancerModel": ("blocks", "music_encoder", "music_injector.injector"),
    "WanModel": _BLOCKS,
    "WanModel_S2V": ("blocks", "audio_injector.injector"),
}

#: Networks whose blocks run in a way that hooks do not see, and why.
UNSUPPORTED = {
    "WanAnimate2Model": "its blocks are run through other methods than forward",
}

# Never called itself: ComfyUI walks through its members (forward_timestep_embed).
_WALKED = ("TimestepEmbedSequential",)


def unsupported(net: nn.Module) -> str | None:
    """Why a network cannot be streamed; ``None`` when it can."""
    for kind in type(net).__mro__:
        if kind.__name__ in UNSUPPORTED:
            return UNSUPPORTED[kind.__name__]
        if kind.__name__ in CONTAINERS:
            return None
    return None


def network_blocks(net: nn.Module) -> list[Named]:
    """The blocks of a diffusion network, in the order that indices count them.

    A class that is not known, nor any that it is made from, gets the engine's generic finder.

    Raises:
        ValueError: There are no blocks.
    """
    paths = _known(net)
    found = [block for path in paths for block in _members(net, path)]
    unique = {id(module): (name, module) for name, module in reversed(found)}
    blocks = [block for block in reversed(unique.values()) if _has_weights(block[1])]
    return blocks or find_blocks(net)


def is_operation(module: nn.Module) -> bool:
    """Whether a module is a layer, also one of ComfyUI's that torch has none for."""
    weight = module._parameters.get("weight")
    casts = hasattr(module, "comfy_cast_weights") and weight is not None and weight.dim() > 1
    return casts or is_layer(module)


def _known(net: nn.Module) -> tuple[str, ...]:
    for kind in type(net).__mro__:
        if kind.__name__ in CONTAINERS:
            return CONTAINERS[kind.__name__]
    return ()


def _members(net: nn.Module, path: str) -> Iterator[Named]:
    module: nn.Module | None = net
    for part in path.split("."):
        module = getattr(module, part, None)
    if isinstance(module, nn.Module):
        yield from _expanded(path, module)


def _expanded(name: str, module: nn.Module) -> Iterator[Named]:
    """A module that is called; for a container, however deep, what is in it."""
    walked = type(module).__name__ in _WALKED
    if not walked and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        yield name, module
        return
    for key, member in module.named_children():
        yield from _expanded(f"{name}.{key}", member)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None

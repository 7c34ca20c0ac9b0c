"""The nodes that load and stream: DGLS Model Loader, DGLS Swapping Loader, DGLS Stream."""

from __future__ import annotations

import logging
from typing import Any

import folder_paths
from comfy_api.latest import io

from dgls_torch.comfy import loading, tooltips
from dgls_torch.comfy.attach import NotStreamableError, stream_model
from dgls_torch.comfy.cast_grammar import parse_cast_target
from dgls_torch.comfy.casting import cast_modules
from dgls_torch.comfy.containers import network_blocks
from dgls_torch.comfy.layers import Layers, layer_names, parse_indices
from dgls_torch.comfy.residency import Residency
from dgls_torch.comfy.settings import LoraMode, Settings, parse_vram
from dgls_torch.config import COMPRESS, UNITS

log = logging.getLogger("dgls_torch")
CATEGORY = "loaders"
ALIASES = ["block swap", "offload", "low vram", "OOM", "dynamic swapping", "virtual vram"]
LayersType = io.Custom("LAYERS")
_MIB = 1 << 20
_COMPRESS = COMPRESS[:2]  # "on" also encodes what gains nothing by it


class DGLSModelLoader(io.ComfyNode):  # type: ignore[misc]
    """Loads a diffusion model so that it can be streamed, and lists its blocks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs, as the original's."""
        tips = tooltips.LOADER
        files = list(dict.fromkeys(folder_paths.get_filename_list("diffusion_models")))
        return io.Schema(
            node_id="DGLSModelLoader",
            display_name="DGLS Model Loader",
            category=CATEGORY,
            description="Loads a diffusion model and lists its blocks for DGLS Swapping Loader.",
            search_aliases=ALIASES,
            inputs=[
                io.Combo.Input("model_name", options=files, tooltip=tips["model_name"]),
                io.Combo.Input(
                    "model_type",
                    options=loading.MODEL_TYPES,
                    default="default",
                    tooltip=tips["model_type"],
                ),
                io.Combo.Input(
                    "cast_dtype",
                    options=loading.CAST_DTYPES,
                    default="default",
                    tooltip=tips["cast_dtype"],
                ),
                io.Combo.Input(
                    "full_cast",
                    options=loading.FULL_CASTS,
                    default="disabled",
                    tooltip=tips["full_cast"],
                ),
                io.Boolean.Input(
                    "clear_model_cache", default=False, tooltip=tips["clear_model_cache"]
                ),
                io.Boolean.Input("verbose", default=False, tooltip=tips["verbose"]),
                io.Boolean.Input(
                    "nuke_all_caches",
                    default=False,
                    optional=True,
                    tooltip=tips["nuke_all_caches"],
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model"),
                LayersType.Output("LAYERS", display_name="layers"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model_name: str,
        model_type: str,
        cast_dtype: str,
        full_cast: str,
        clear_model_cache: bool,
        verbose: bool,
        nuke_all_caches: bool = False,
    ) -> io.NodeOutput:
        """Loads the file; a failure names the input, the file and what is wrong with it."""
        if clear_model_cache or nuke_all_caches:
            loading.clear_memory()
        if nuke_all_caches:
            loading.forget_outputs()
        path = folder_paths.get_full_path("diffusion_models", model_name)
        allowed = "allowed is a diffusion model's file in models/diffusion_models or models/unet"
        if path is None:
            raise ValueError(f"model_name is {model_name!r}, and there is no such file; {allowed}")
        try:
            model = loading.load_model(path, model_type, cast_dtype, full_cast)
            layers = Layers(model.model.diffusion_model)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, _safetensors()) as error:
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"model_name is {model_name!r}, which cannot be loaded as a diffusion model: "
                f"{reason[0] if reason else type(error).__name__}; {allowed}"
            ) from error
        if verbose:
            log.info("DGLS: %s: %s with %d blocks", model_name, layers.network, len(layers))
        return io.NodeOutput(model, layers)


def _safetensors() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


class DynamicSwappingLoader(io.ComfyNode):  # type: ignore[misc]
    """Streams a model's blocks, with every input of the original."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs, as the original's; new inputs are optional and come last."""
        tips = tooltips.SWAPPER
        switches = ["cpu_threading", "cuda_streams", "cuda_graphs"]
        modes = [mode.value for mode in LoraMode]
        return io.Schema(
            node_id="DynamicSwappingLoader",
            display_name="DGLS Swapping Loader",
            category=CATEGORY,
            description="Dynamic Swapping Loader: streams the blocks of a model to the device.",
            search_aliases=["Dynamic Swapping Loader", *ALIASES],
            inputs=[
                io.Model.Input("model", tooltip=tips["model"]),
                LayersType.Input("layers", tooltip=tips["layers"]),
                io.Int.Input("prefetch", default=1, min=0, max=100, tooltip=tips["prefetch"]),
                *(io.Boolean.Input(n, default=False, tooltip=tips[n]) for n in switches),
                io.Int.Input(
                    "lora_size_mb", default=0, min=0, max=10000, tooltip=tips["lora_size_mb"]
                ),
                io.Boolean.Input("verbose", default=False, tooltip=tips["verbose"]),
                io.String.Input(
                    "gpu_layer_indices",
                    default="",
                    optional=True,
                    tooltip=tips["gpu_layer_indices"],
                ),
                io.String.Input(
                    "cast_target", default="", optional=True, tooltip=tips["cast_target"]
                ),
                io.String.Input("vram", default="auto", optional=True, tooltip=tips["vram"]),
                io.Combo.Input(
                    "lora", options=modes, default=modes[0], optional=True, tooltip=tips["lora"]
                ),
            ],
            outputs=[io.Model.Output("MODEL", display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        layers: Any,
        prefetch: int,
        cpu_threading: bool,
        cuda_streams: bool,
        cuda_graphs: bool,
        lora_size_mb: int,
        verbose: bool,
        gpu_layer_indices: str = "",
        cast_target: str = "",
        vram: str = "auto",
        lora: str = LoraMode.ON_THE_FLY.value,
    ) -> io.NodeOutput:
        """Clones the model for streaming; what cannot stream is passed through with a sentence."""
        switches = {"cpu_threading": cpu_threading, "cuda_streams": cuda_streams}
        for name in [n for n, on in (switches | {"cuda_graphs": cuda_graphs}).items() if on]:
            log.info("DGLS: %s: %s", name, tooltips.SWAPPER[name])
        vram_bytes, pairs = parse_vram(vram), parse_cast_target(cast_target)
        names = layer_names(model.model.diffusion_model, layers)
        resident = parse_indices(gpu_layer_indices, names)
        if resident is not None and len(resident) == len(names):
            return _passed(model, "gpu_layer_indices keeps every layer on the GPU")
        settings = Settings(
            vram_bytes=vram_bytes,
            resident=resident,
            slots=prefetch + 1,
            reserve_bytes=lora_size_mb * _MIB,
            lora=LoraMode(lora),
            verbose=verbose,
        )
        try:
            made = stream_model(model, settings, private=bool(pairs))
        except NotStreamableError as error:
            if pairs:
                raise
            return _passed(model, str(error))
        if pairs:
            kept = set(resident or ())
            blocks = [b for n, b in network_blocks(made.model.diffusion_model) if n not in kept]
            done = cast_modules((m for block in blocks for m in block.modules()), pairs)
            log.info("DGLS: cast_target: %s", done)
        return io.NodeOutput(made)


class DGLSStream(io.ComfyNode):  # type: ignore[misc]
    """Streams any model's blocks: one node, one knob."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """A MODEL in, a MODEL out, and how much memory it may take."""
        return io.Schema(
            node_id="DGLSStream",
            display_name="DGLS Stream",
            category=CATEGORY,
            description=(
                "Runs a model that is bigger than the GPU: its blocks are copied in just before "
                "they run. Put it after any loader, before or after LoRAs."
            ),
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip=tooltips.STREAM["model"]),
                io.String.Input(
                    "vram", default="auto", optional=True, tooltip=tooltips.STREAM["vram"]
                ),
                *(
                    io.Combo.Input(
                        name,
                        options=list(words),
                        default=words[0],
                        optional=True,
                        tooltip=tooltips.STREAM[name],
                    )
                    for name, words in (("unit", UNITS), ("compress", _COMPRESS))
                ),
            ],
            outputs=[io.Model.Output("MODEL", display_name="model")],
        )

    @classmethod
    def execute(
        cls, model: Any, vram: str = "auto", unit: str = "block", compress: str = "off"
    ) -> io.NodeOutput:
        """Clones the model for streaming; what cannot stream is passed through with a sentence."""
        settings = Settings(vram_bytes=parse_vram(vram), unit=unit, compress=compress)
        try:
            return io.NodeOutput(stream_model(model, settings))
        except NotStreamableError as error:
            return _passed(model, str(error))


def _passed(model: Any, reason: str) -> io.NodeOutput:
    log.warning("DGLS: the model is passed through as it is: %s", reason)
    residency = Residency.of(model.model)
    if residency.stream is None:  # else another branch of the workflow streams the same model
        residency.passed_by = reason
    return io.NodeOutput(model)

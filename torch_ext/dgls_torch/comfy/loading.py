"""Loads diffusion models for DGLS Model Loader, and clears what is in the way."""

from __future__ import annotations

import gc
import logging
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import torch

from dgls_torch.comfy.cast_grammar import parse_format
from dgls_torch.comfy.casting import cast_modules
from dgls_torch.comfy.containers import network_blocks

log = logging.getLogger("dgls_torch")
MODEL_TYPES = ["default", "hunyuan", "unet"]
CAST_DTYPES = [
    *("default", "disabled", "fp32", "fp16", "bf16"),
    *("fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"),
]
FULL_CASTS = ["disabled", "fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "nf4", "fp4"]


def load_model(
    path: str, model_type: str, cast_dtype: str, full_cast: str, disable_dynamic: bool = True
) -> Any:
    """Loads a file as a MODEL whose weights can be streamed.

    Args:
        path: The file.
        model_type: One of `MODEL_TYPES`.
        cast_dtype: One of `CAST_DTYPES`: the format that ComfyUI loads the weights in.
        full_cast: One of `FULL_CASTS`: the format that they are cast to after that.
        disable_dynamic: There for ComfyUI, which loads a model anew by this function. The weights
            are always private copies: streaming needs them in memory.

    Raises:
        Exception: Whatever ComfyUI raises for a file that it cannot read or does not know.
    """
    options = _model_options("default" if model_type == "unet" else cast_dtype)
    if model_type == "hunyuan":
        state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
        model = comfy.sd.load_diffusion_model_state_dict(
            state, model_options=options, metadata=metadata, disable_dynamic=True
        )
        if model is None:
            raise RuntimeError("its kind of model could not be detected")
    else:
        model = comfy.sd.load_diffusion_model(path, model_options=options, disable_dynamic=True)
    if full_cast != "disabled":
        _full_cast(model, full_cast)
    model.cached_patcher_init = (load_model, (path, model_type, cast_dtype, full_cast))
    return model


def _model_options(cast_dtype: str) -> dict[str, Any]:
    if cast_dtype in ("default", "disabled"):
        return {}
    options: dict[str, Any] = {"dtype": parse_format(cast_dtype.removesuffix("_fast"))}
    if cast_dtype.endswith("_fast"):
        options["fp8_optimizations"] = True
    return options


def _full_cast(model: Any, full_cast: str) -> None:
    net = model.model.diffusion_model
    target = parse_format(full_cast)
    wide = target in (torch.float32, torch.float16, torch.bfloat16)
    # Some networks compute in the type of a weight outside of their blocks: 8 bits are too few.
    parts = [net] if wide else [block for _, block in network_blocks(net)]
    done = cast_modules((m for part in parts for m in part.modules()), [(None, target)])
    model.size = 0  # ComfyUI measures it again
    log.info("DGLS: full_cast: %s", done)


def clear_memory() -> None:
    """Unloads every model and gives back what no one holds."""
    mm.unload_all_models()
    mm.cleanup_models_gc()
    gc.collect()
    mm.soft_empty_cache(True)


def forget_outputs() -> None:
    """Has ComfyUI drop all cached outputs of nodes when the running prompt has ended."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.prompt_queue.set_flag("free_memory", True)

"""Workflows in API format: a tiny model, perhaps LoRAs and DGLS nodes, one sampler, the latent."""

from __future__ import annotations

import itertools
import json
from typing import Any

Workflow = dict[str, Any]
_nonce = itertools.count(1)


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def lora(file: str, strength: float = 1.0) -> dict[str, Any]:
    return node("LoraLoaderModelOnly", lora_name=file, strength_model=strength)


def stream(vram: object, **inputs: str) -> dict[str, Any]:
    return node("DGLSStream", vram=str(vram), **inputs)


def sampled(
    entry: dict[str, Any],
    *chain: dict[str, Any],
    weight_dtype: str = "default",
    loader: dict[str, Any] | None = None,
    **sampler: Any,
) -> Workflow:
    """Loader, then ``chain``: nodes with a MODEL input that they pass on; then sampler and latent.

    Each call asks for the sampler to run anew.
    """
    plain = node("UNETLoader", unet_name=entry["file"], weight_dtype=weight_dtype)
    made: Workflow = {"loader": loader or plain}
    model: list[Any] = ["loader", 0]
    for number, part in enumerate(chain):
        inputs = {"model": model, **part["inputs"]}
        made[f"chain{number}"] = {"class_type": part["class_type"], "inputs": inputs}
        model = [f"chain{number}", 0]
    return made | tail(entry, model, **sampler)


def tail(entry: dict[str, Any], model: list[Any], **sampler: Any) -> Workflow:
    """What follows the model: conditioning, sampler, the saved latent, the report."""
    spec, nonce = json.dumps(entry["cond"]), next(_nonce)
    conditioned = {
        name: node("DGLSTestConditioning", spec=spec, seed=seed, nonce=nonce)
        for name, seed in (("positive", 11), ("negative", 12))
    }
    shape = ",".join(map(str, entry["latent"]))
    sample = node(
        "KSampler",
        model=model,
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        **(entry["sampler"] | sampler),
    )
    return {
        **conditioned,
        "latent": node("DGLSTestLatent", shape=shape),
        "sample": sample,
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="tiny"),
    }


def reported(workflow: Workflow) -> Workflow:
    """The workflow with a report of the model that it samples."""
    model = workflow["sample"]["inputs"]["model"]
    return workflow | {"report": node("DGLSReport", model=model, after=["sample", 0])}


def original(entry: dict[str, Any], **inputs: Any) -> Workflow:
    """The original's two nodes, with the inputs that it documents and in its words."""
    loader = node(
        "DGLSModelLoader",
        model_name=entry["file"],
        model_type="default",
        cast_dtype="default",
        full_cast="disabled",
        clear_model_cache=False,
        verbose=False,
        nuke_all_caches=False,
    )
    swap = node(
        "DynamicSwappingLoader",
        model=["loader", 0],
        layers=["loader", 1],
        prefetch=1,
        cpu_threading=False,
        cuda_streams=False,
        cuda_graphs=False,
        lora_size_mb=0,
        verbose=False,
        gpu_layer_indices="",
        cast_target="",
    )
    swap["inputs"] |= {k: v for k, v in inputs.items() if k in swap["inputs"] or k in NEW}
    loader["inputs"] |= {k: v for k, v in inputs.items() if k in loader["inputs"]}
    return {"loader": loader, "swap": swap} | tail(entry, ["swap", 0])


NEW = ("vram", "lora")

"""Writes tiny model files and LoRAs with seeded weights; run by ComfyUI's own Python.

``python models.py COMFYUI_DIR MODELS_DIR [NAME ...]``
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any

from specs import SPECS, WIDE

SAMPLER = {
    **{"steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"},
    **{"denoise": 1.0, "seed": 7},
}
_TABLES = re.compile(r"modulation$|table|pos_emb|positional|register|pad_token")


def _generator(name: str, seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(1000003 * seed + zlib.crc32(name.encode()))


def _network(spec: dict[str, Any]) -> Any:
    import comfy.ops
    import torch

    module, _, name = f"comfy.ldm.{spec['net']}".rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    known = inspect.signature(kind).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    build = {k: v for k, v in spec["build"].items() if open_ended or k in known}
    operations = comfy.ops.disable_weight_init
    return kind(**build, dtype=torch.float32, device="cpu", operations=operations)


def _weight(name: str, like: Any) -> Any:
    """Random numbers of a size that keeps activations finite."""
    import torch

    if not like.is_floating_point():
        return like.clone()
    noise = torch.randn(like.shape, generator=_generator(name, 1))
    if name.endswith("bias"):
        return 0.02 * noise
    if re.search(r"norm|scale|gamma", name) and like.ndim < 2:
        return 1 + 0.05 * noise
    if like.ndim < 2 or _TABLES.search(name):
        return 0.2 * noise
    return noise / like[0].numel() ** 0.5


def _scaled_fp8(weights: dict[str, Any], blocks: str) -> dict[str, Any]:
    """ComfyUI's scaled fp8: 8 bits and one scale for each matrix of the blocks."""
    import torch

    made = {}
    for name, value in weights.items():
        if not (re.match(blocks, name) and name.endswith(".weight") and value.ndim == 2):
            made[name] = value
            continue
        scale = value.float().abs().max() / 448
        made[name] = (value.float() / scale).to(torch.float8_e4m3fn)
        made[f"{name}_scale"] = scale
        kind = json.dumps({"format": "float8_e4m3fn"}).encode()
        made[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(
            list(kind), dtype=torch.uint8
        )
    return made


def _lora(weights: dict[str, Any], blocks: str) -> dict[str, Any]:
    """A LoRA of rank 4 for every second matrix of the blocks."""
    import torch

    made = {}
    matrices = [
        n
        for n, v in weights.items()
        if re.match(blocks, n) and n.endswith(".weight") and v.ndim == 2
    ]
    for name in matrices[::2]:
        rows, columns = weights[name].shape
        base = f"diffusion_model.{name.removesuffix('.weight')}"
        down = torch.randn(4, columns, generator=_generator(name, 2)) / columns**0.5
        made[f"{base}.lora_down.weight"] = down
        made[f"{base}.lora_up.weight"] = 0.1 * torch.randn(rows, 4, generator=_generator(name, 3))
        made[f"{base}.alpha"] = torch.tensor(4.0)
    return made


def _jsonable(value: Any) -> Any:
    return {"tuple": list(value)} if isinstance(value, tuple) else value


def _metadata(spec: dict[str, Any]) -> dict[str, str]:
    made = {"format": "pt"}
    if "config" in spec:
        made["config"] = json.dumps(spec["config"])
    if "match" in spec or "small" in spec:
        small = {name: _jsonable(spec["build"][name]) for name in spec.get("small", [])}
        made["dgls_test"] = json.dumps({"match": spec.get("match", {}), "build": small})
    return made


def write(name: str, models: Path) -> dict[str, Any]:
    """Writes one model in its variants and its LoRA; returns what a workflow has to know."""
    import torch
    from safetensors.torch import save_file

    spec = (SPECS | WIDE)[name]
    with torch.no_grad():
        weights = {k: _weight(k, v) for k, v in _network(spec).state_dict().items()}
    half = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in weights.items()}
    (models / "loras").mkdir(parents=True, exist_ok=True)
    (models / "diffusion_models").mkdir(parents=True, exist_ok=True)
    save_file(_lora(weights, spec["blocks"]), models / "loras" / f"{name}_lora.safetensors")
    variants = {name: half}
    if spec.get("fp8"):
        variants[f"{name}_fp8"] = _scaled_fp8(half, spec["blocks"])
    entries = {}
    for variant, tensors in variants.items():
        file = models / "diffusion_models" / f"{variant}.safetensors"
        renamed = {}
        for key, value in tensors.items():
            for pattern, replacement in spec.get("names", []):
                key = re.sub(pattern, replacement, key)
            renamed[spec.get("prefix", "") + key] = value.contiguous()
        save_file(renamed, file, metadata=_metadata(spec))
        entries[variant] = {
            **{"file": file.name, "lora": f"{name}_lora.safetensors", "latent": spec["latent"]},
            **{"cond": spec["cond"], "sampler": SAMPLER | spec.get("sampler", {})},
            **{"blocks": spec["blocks"], "floor": spec.get("floor", 0.0)},
            "numbers": sum(v.numel() for v in weights.values()),
            "bytes": sum(v.numel() * v.element_size() for v in tensors.values()),
        }
    return entries


def main() -> None:
    comfyui, models, *names = sys.argv[1:]
    sys.path.insert(0, comfyui)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = True
    manifest = {}
    for name in names or SPECS:
        manifest |= write(name, Path(models))
        print(name, flush=True)
    (Path(models) / "manifest.json").write_text(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    main()

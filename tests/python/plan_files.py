"""Weight files without weights: headers with the names, shapes and dtypes of models.

Goal: the plan command is tested on files of real sizes that take no disk.
Method: no test of its own; the data after a header is a hole.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F32": 4}
Shapes = dict[str, tuple[int, ...]]


def write(path: Path, shapes: Shapes, dtype: str = "BF16") -> Path:
    """A file as the safetensors package writes it: tensors sorted by name."""
    header: dict[str, object] = {}
    at = 0
    for name in sorted(shapes):
        size = ITEM_BYTES[dtype]
        for extent in shapes[name]:
            size *= extent
        entry = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        header[name], at = entry, at + size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


def shard(folder: Path, shapes: Shapes, files: int = 3) -> Path:
    """The same in several files and an index."""
    names = sorted(shapes)
    index = {name: f"model-{k % files}.safetensors" for k, name in enumerate(names)}
    for file in set(index.values()):
        write(folder / file, {name: shapes[name] for name in names if index[name] == file})
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    return path


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def merged(parts: Iterable[Shapes]) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def flux(prefix: str = "", double: int = 19, single: int = 38, width: int = 3072) -> Shapes:
    """FLUX.1 as published, or smaller."""
    shapes = merged(
        linear(f"{prefix}double_blocks.{block}.{stream}_{name}", outputs * width, inputs * width)
        for block in range(double)
        for stream in ("img", "txt")
        for name, outputs, inputs in [
            ("attn.qkv", 3, 1),
            ("attn.proj", 1, 1),
            ("mlp.0", 4, 1),
            ("mlp.2", 1, 4),
            ("mod.lin", 6, 1),
        ]
    )
    shapes |= merged(
        linear(f"{prefix}single_blocks.{block}.{name}", outputs * width, inputs * width)
        for block in range(single)
        for name, outputs, inputs in [
            ("linear1", 7, 1),
            ("linear2", 1, 5),
            ("modulation.lin", 3, 1),
        ]
    )
    shapes |= linear(f"{prefix}img_in", width, 64) | linear(f"{prefix}txt_in", width, 4096)
    return shapes | linear(f"{prefix}final_layer.linear", 64, width)


def diffusers_flux(double: int = 3, single: int = 4, width: int = 64) -> Shapes:
    """FLUX.1 with the names of diffusers, where the second kind is sorted before the first."""
    shapes = merged(
        linear(f"transformer_blocks.{block}.{name}", 4 * width, width)
        for block in range(double)
        for name in ("attn.to_q", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
    )
    shapes |= merged(
        linear(f"single_transformer_blocks.{block}.{name}", 3 * width, width)
        for block in range(single)
        for name in ("proj_mlp", "proj_out")
    )
    return shapes | linear("x_embedder", width, 16)


def unet(width: int = 32) -> Shapes:
    """A UNet as in ComfyUI's checkpoints: stages of two layers each, and a middle."""
    shapes: Shapes = linear("time_embed.0", 4 * width, width)
    for kind, count in (("input", 12), ("output", 12)):
        for block in range(count):
            shapes |= linear(f"{kind}_blocks.{block}.0.in_layers.2", 4 * width, 4 * width)
            shapes |= linear(f"{kind}_blocks.{block}.1.proj", 4 * width, 4 * width)
    return shapes | linear("middle_block.0.in_layers.2", 4 * width, 4 * width)

"""Makes a module without bytes of a weight file's names, so that one finder knows all blocks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dgls_torch.files import SafetensorsSource

# What ComfyUI's checkpoints put before the names of the model that is sampled. The other models in
# such a file, text encoders and a VAE, do not run in its passes.
PREFIX = "model.diffusion_model."

# Names nest by recursion here and in torch; real ones are below 15.
_DEPTH_MOST = 64
_INDEXED = re.compile(r"(\D*)(\d{1,9})")

# Files are sorted by name or by dtype, models run otherwise: by the first of these words in a name.
_FIRST = ("refiner", "in", "input", "down", "double", "encoder", "txt", "text")
_LAST = ("single", "up", "out", "output", "decoder", "visual", "nerf")


class Checkpoint(nn.Module):
    """A module of a file: its modules and parameters on meta, in order of use."""


class _Members(Checkpoint, nn.ModuleDict):
    """Modules of one name that differ by their index alone."""


class _Layer(Checkpoint, nn.Linear):
    """What a file tells of a linear or convolution layer or a multi-head attention."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def checkpoint(source: SafetensorsSource, *, layers: bool = False) -> tuple[Checkpoint, int]:
    """Returns the model of a file, and the bytes of other models in that file.

    With ``layers`` what holds a matrix by the name of a layer's is one, for `layers_of` to find.

    Raises:
        ValueError: There are no tensors, or names nest deeper than any model's.
    """
    names = [name for name in source.names if name.startswith(PREFIX)]
    prefix = PREFIX if names else ""
    names = names or source.names
    if not names:
        raise ValueError(f"{source.path.name} holds no tensors")
    tree: dict[str, object] = {}
    kept = 0
    for name in names:
        path = name[len(prefix) :].split(".")
        if len(path) > _DEPTH_MOST:
            raise ValueError(
                f"{source.path.name} needs names of at most {_DEPTH_MOST} parts, found one of "
                f"{len(path)}"
            )
        found = source.lookup(name)[1]
        kept += found.bytes
        _insert(tree, path, torch.empty(found.shape, dtype=found.dtype, device="meta"))
    return _made(tree, layers), source.bytes - kept


def _insert(tree: dict[str, object], path: list[str], tensor: torch.Tensor) -> None:
    for part in path[:-1]:
        # Parts that hold others end in a dot here: a file may have both "a" and "a.b".
        below = tree.setdefault(f"{part}.", {})
        assert isinstance(below, dict)
        tree = below
    tree[path[-1]] = tensor


def _made(tree: dict[str, object], layers: bool) -> Checkpoint:
    kind = _Layer if layers and _is_layer(tree) else _Members if _is_indexed(tree) else Checkpoint
    module = kind()
    # Written past nn.Module's own checks: a file may call a tensor "forward" or "".
    for key in _in_order_of_use(tree):
        value = tree[key]
        if isinstance(value, torch.Tensor):
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
        elif isinstance(value, dict):
            module._modules[key[:-1]] = _made(value, layers)
    return module


def _is_layer(tree: dict[str, object]) -> bool:
    tensors = [tree.get("weight"), tree.get("in_proj_weight")]
    return any(isinstance(tensor, torch.Tensor) and tensor.dim() > 1 for tensor in tensors)


def _is_indexed(tree: dict[str, object]) -> bool:
    """Whether all that is below differs by a number alone: ``0.``, ``1.``, or ``block0.``."""
    matches = [_INDEXED.fullmatch(key[:-1]) if key.endswith(".") else None for key in tree]
    return all(matches) and len({match[1] for match in matches if match}) == 1


def _in_order_of_use(keys: Iterable[str]) -> list[str]:
    """Numbers by value, blocks of two kinds as they run, all else as the file has it."""
    return sorted(keys, key=lambda key: (_rank(key), _number(key)))


def _number(key: str) -> int:
    match = _INDEXED.fullmatch(key.rstrip("."))
    return int(match[2]) if match else -1


def _rank(key: str) -> int:
    for word in key.rstrip(".").split("_"):
        if word in _FIRST or word in _LAST:
            return -1 if word in _FIRST else 1
    return 0

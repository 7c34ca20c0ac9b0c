"""Finds the blocks of a model: the members of its largest containers of repeated modules.

And the layers in them, where those are to be streamed one at a time.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dgls_torch.config import StreamConfig

Named = tuple[str, nn.Module]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
"""Attention uses the weights of its last layer without calling it, so it is taken as a whole."""


class NoBlocksError(ValueError):
    """A model has no repeated blocks."""


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters below a module, shared ones once; wrapper subclasses as declared."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def find_blocks(model: nn.Module) -> list[Named]:
    """Finds the blocks of any model, in order of registration.

    A container (ModuleList, ModuleDict, Sequential) counts when most of its members with weights
    are of one class and it holds at least 1/50 of the model: the layers of an embedder are not
    worth a copy. The outermost ones are taken, unless a member alone holds more than a
    quarter of the model, as the stages of a UNet do: then what is inside is taken, provided that
    this covers at least half of the weights.

    Raises:
        NoBlocksError: There is no such container.
    """
    total = weight_bytes(model)
    fine = list(_collect(model, "", total // 4, total // 50))
    coarse = list(_collect(model, "", total, total // 50))
    blocks = fine if 2 * sum(weight_bytes(m) for _, m in fine) >= total else coarse
    blocks = _unique(blocks)
    if not blocks:
        raise NoBlocksError(
            f"no repeated blocks were found in {type(model).__name__}: no ModuleList, ModuleDict "
            'or Sequential with two or more members of one class; name them with blocks=["..."]'
        )
    return blocks


def _collect(module: nn.Module, path: str, most: int, least: int) -> Iterator[Named]:
    """Members of at most ``most`` bytes each of containers of at least ``least`` bytes."""
    members = _members(module)
    prefix = f"{path}." if path else ""
    if members and weight_bytes(module) >= least and max(map(_bytes, members)) <= most:
        yield from ((f"{prefix}{key}", member) for key, member in members)
        return
    for name, child in module.named_children():
        yield from _collect(child, f"{prefix}{name}", most, least)


def _bytes(member: Named) -> int:
    return weight_bytes(member[1])


def _members(module: nn.Module) -> list[Named]:
    """The members of a container of repeated modules, else nothing."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return []
    members = [(k, m) for k, m in module.named_children() if next(m.parameters(), None) is not None]
    classes = Counter(type(member) for _, member in members)
    return members if classes and 2 * classes.most_common(1)[0][1] > max(2, len(members)) else []


def chosen_blocks(model: nn.Module, blocks: Iterable[str | nn.Module]) -> list[Named]:
    """The blocks that a caller names: modules or dotted names; a container stands for its members.

    Raises:
        ValueError: A name or module is not in the model, or holds no weights.
    """
    names = {id(module): name for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    found: list[Named] = []
    for block in blocks:
        if isinstance(block, str):
            if block not in modules:
                raise ValueError(f"blocks: {type(model).__name__} has no module '{block}'")
            name, module = block, modules[block]
        elif id(block) in names:
            name, module = names[id(block)], block
        else:
            raise ValueError(f"blocks: a {type(block).__name__} is not part of the model")
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            prefix = f"{name}." if name else ""
            found += [(f"{prefix}{key}", member) for key, member in module.named_children()]
        else:
            found.append((name, module))
    for name, module in found:
        if next(module.parameters(), None) is None:
            raise ValueError(f"blocks: '{name}' has no parameters")
    return _unique(found)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear or convolution layer or a multi-head attention."""
    return isinstance(module, _LAYERS)


def layers_of(blocks: list[Named], is_one: Callable[[nn.Module], bool] = is_layer) -> list[Named]:
    """The outermost modules in blocks that are layers, in their order.

    What else a block holds belongs to none of them.

    Raises:
        ValueError: There is no layer.
    """
    found = _unique([layer for name, block in blocks for layer in _layers(name, block, is_one)])
    if not found:
        kinds = ", ".join(sorted({type(block).__name__ for _, block in blocks}))
        raise ValueError(
            'unit="layer" needs blocks that hold layers (Linear, Conv, MultiheadAttention), found '
            f"none in {len(blocks)} of {kinds}"
        )
    return found


def _layers(path: str, module: nn.Module, is_one: Callable[[nn.Module], bool]) -> Iterator[Named]:
    if is_one(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _layers(f"{path}.{name}" if path else name, child, is_one)


def check_disjoint(blocks: list[Named]) -> None:
    """Refuses blocks that contain one another.

    Raises:
        ValueError: With both names.
    """
    owners: dict[int, str] = {}
    for name, block in blocks:
        for module in block.modules():
            other = owners.setdefault(id(module), name)
            if other != name:
                raise ValueError(f"blocks '{other}' and '{name}' overlap; name one of them")


def _unique(blocks: list[Named]) -> list[Named]:
    """A module that stands in two places is one block, used twice."""
    return list({id(module): (name, module) for name, module in reversed(blocks)}.values())[::-1]


def models_of(model: object) -> list[Named]:
    """The denoisers of a pipeline by attribute name, or the model itself.

    Raises:
        TypeError: It is neither a module nor a pipeline with a transformer or unet.
    """
    if isinstance(model, nn.Module):
        return [("", model)]
    names = ("transformer", "transformer_2", "unet", "prior")
    found = [(name, getattr(model, name, None)) for name in names]
    models = [(name, part) for name, part in found if isinstance(part, nn.Module)]
    if not models:
        raise TypeError(
            "stream() needs an nn.Module or a pipeline with a transformer or unet, got "
            f"{type(model).__name__}"
        )
    return models


def budget_shares(models: list[Named], config: StreamConfig) -> list[StreamConfig]:
    """The configuration of each of several models; a budget is split by their weights."""
    shares = [weight_bytes(model) for _, model in models]
    if config.vram_bytes is None or len(models) == 1:
        return [config] * len(models)
    return [config.replace(vram=config.vram_bytes * share // sum(shares)) for share in shares]


def compute_device(device: str | None) -> torch.device:
    """Where the model computes: CUDA's current device when there is one, unless told otherwise."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen

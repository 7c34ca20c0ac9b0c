"""`LAYERS`: the list of blocks that travels from DGLS Model Loader to DGLS Swapping Loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from dgls_torch.comfy.containers import network_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Layers(list[nn.Module]):
    """A list of blocks, as the original's, that also knows their names and their network's class.

    Names outlive the modules: a model that is loaded again has others of the same names.
    """

    def __init__(self, net: nn.Module) -> None:
        """Finds the blocks of ``net``.

        Raises:
            ValueError: It has none.
        """
        blocks = network_blocks(net)
        super().__init__(module for _, module in blocks)
        self.names = tuple(name for name, _ in blocks)
        self.network = type(net).__name__


def layer_names(net: nn.Module, layers: Iterable[Any]) -> tuple[str, ...]:
    """The names in ``net`` of the blocks that ``layers`` lists.

    Raises:
        ValueError: They are not blocks of this network; the message says of which.
    """
    have = dict(network_blocks(net))
    if isinstance(layers, Layers):
        missing = [name for name in layers.names if name not in have]
        if layers.network == type(net).__name__ and not missing:
            return layers.names
        raise ValueError(
            f"layers lists {len(layers)} blocks of a {layers.network}, and model is a "
            f"{type(net).__name__} with {len(have)}; connect model and layers of one loader"
        )
    by_id = {id(module): name for name, module in have.items()}
    layers = list(layers)
    strangers = sum(id(layer) not in by_id for layer in layers)
    if strangers:
        raise ValueError(
            f"layers lists {len(layers)} modules, of which {strangers} are no blocks of this "
            f"{type(net).__name__} with {len(have)}; connect model and layers of one loader"
        )
    return tuple(by_id[id(layer)] for layer in layers)


def parse_indices(text: str, names: Sequence[str]) -> tuple[str, ...] | None:
    """Reads ``gpu_layer_indices``: the names of the layers that stay on the GPU.

    ``None`` for empty text, which leaves the choice to the planner. Indices count from 0.

    Raises:
        ValueError: With the original's words: what is invalid, and the valid range.
    """
    if not text.strip():
        return None
    last = len(names) - 1
    found, invalid = [], []
    for part in text.split(","):
        item = part.strip()
        if not item:
            continue
        if item.isascii() and item.isdecimal() and int(item) <= last:
            found.append(int(item))
        else:
            invalid.append(item)
    if invalid:
        raise ValueError(
            f"Error parsing --gpu_layers: gpu_layer_indices is {text!r}. Invalid layer indices: "
            f"[{', '.join(invalid)}]. Must be 0-{last}"
        )
    return tuple(names[index] for index in sorted(set(found)))

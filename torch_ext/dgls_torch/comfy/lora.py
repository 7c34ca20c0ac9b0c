"""LoRA factors on the device: small, used with every block, and not copied at every use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

#: The largest share of a budget that LoRA factors may take; beyond it they stay on the host.
_SHARE = 8


@dataclass(frozen=True)
class Factors:
    """Patches whose factors are on a device, for one set of patches.

    Attributes:
        patches: As a patcher's, for the keys that were asked for.
        device_bytes: What of device memory they take.
        version: The patcher's ``patches_uuid``, for which they hold.
    """

    patches: dict[str, list[Any]]
    device_bytes: int
    version: object


def factors(
    patches: dict[str, list[Any]],
    keys: Iterable[str],
    device: torch.device,
    budget_bytes: int,
    version: object,
) -> Factors:
    """Moves the factors of the patches of ``keys`` to the device, if they fit a share of a budget.

    Only ComfyUI's weight adapters are moved: other patches may be as large as the weights.
    """
    found = {key: patches[key] for key in keys if key in patches}
    adapters = [patch[1] for list_ in found.values() for patch in list_ if _is_adapter(patch[1])]
    size = sum(_bytes(adapter.weights) for adapter in adapters if device.type != "cpu")
    if size > budget_bytes // _SHARE:
        return Factors(found, 0, version)
    moved = {
        key: [(patch[0], _moved(patch[1], device), *patch[2:]) for patch in list_]
        for key, list_ in found.items()
    }
    return Factors(moved, size, version)


def _is_adapter(value: Any) -> bool:
    return hasattr(value, "loaded_keys") and hasattr(value, "weights")


def _moved(value: Any, device: torch.device) -> Any:
    if not _is_adapter(value):
        return value
    return type(value)(value.loaded_keys, _to(value.weights, device))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device) for item in value)
    return value


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, (tuple, list)) else 0

"""Types of the extension module; see csrc/hooks.cpp."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Capsule = Any
Hook = Callable[..., None]

def make_hooks(
    engine: int,
    block: int,
    name: str,
    module: nn.Module,
    targets: list[tuple[object, str | None, torch.Tensor, list[torch.Tensor], bool, bool]],
    on_rebuild: Callable[[], None],
    increment_versions: Callable[[], None],
) -> tuple[Hook, Hook, Capsule]: ...
def set_views(capsule: Capsule, views: list[list[torch.Tensor] | None]) -> None: ...
def shut(capsule: Capsule) -> None: ...
def end_process() -> None: ...
def unhook(capsule: Capsule) -> None: ...
def runner(engine: int) -> int: ...
def is_foreign(engine: int) -> bool: ...
def take_back(engine: int) -> None: ...

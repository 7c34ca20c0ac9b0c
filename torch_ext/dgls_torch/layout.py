"""A model taken apart: its blocks, their weights as bytes, and all else, moved to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dgls_torch import encoding
from dgls_torch.blocks import (
    check_disjoint,
    chosen_blocks,
    compute_device,
    find_blocks,
    layers_of,
)
from dgls_torch.files import SafetensorsSource
from dgls_torch.memory import auto_vram_bytes
from dgls_torch.placement import Placement, outside_bytes
from dgls_torch.units import format_bytes
from dgls_torch.weights import Weight, block_weights, check_on_host, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch import nn

    from dgls_torch.config import StreamConfig
    from dgls_torch.native import Engine

_ALIGN = 256


class Anatomy:
    """The blocks of a model, their weights, and what is outside of them. Moves nothing.

    Attributes:
        blocks: The blocks by dotted name, in order of registration.
        weights: What of each block is moved as bytes.
        outside: The modules outside of the blocks; ``everything``: all modules.
        held: ``id`` of the parameters in blocks that stay on the device.
        outside_bytes: Bytes of all that stays on the device in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        config: StreamConfig,
        source: SafetensorsSource | None,
        check: Callable[[str, torch.Tensor], None] = check_on_host,
    ) -> None:
        """Finds the blocks; ``check`` is of each weight that is not in ``source``.

        Raises:
            ValueError: There are no blocks, they overlap, or weights are not where they should be.
        """
        blocks = (
            find_blocks(model) if config.blocks is None else chosen_blocks(model, config.blocks)
        )
        if config.unit == "layer":
            blocks = layers_of(blocks)
        self.blocks = [(name, block) for name, block in blocks if not config.excludes(name)]
        if not self.blocks:
            raise ValueError("exclude leaves no block to stream")
        check_disjoint(self.blocks)

        inside = {id(m) for _, block in self.blocks for m in block.modules()}
        self.everything = list(model.named_modules())
        self.outside = [(n, m) for n, m in self.everything if id(m) not in inside]
        kept = {id(p) for _, _, _, p in parameters_of(self.outside)}
        self.weights: list[list[Weight]] = []
        self.held: set[int] = set()
        for name, block in self.blocks:
            moved, stays = block_weights(name, block, kept, source, check)
            self.weights.append(moved)
            self.held |= {id(param) for param in stays}
        buffers = [module for _, module in self.everything]
        of_blocks = outside_bytes(self.everything, [], self.held - kept)
        self.outside_bytes = outside_bytes(self.outside, buffers) + of_blocks


class Layout:
    """Which bytes of a model go where. Holds no module, so that it keeps no model alive."""

    def __init__(self, model: nn.Module, config: StreamConfig) -> None:
        """Finds the blocks, checks the budget, and moves what is not streamed to the device.

        Raises:
            ValueError: As `dgls_torch.stream`; nothing has been moved then.
        """
        self.device = compute_device(None if config.device is None else str(config.device))
        self.source = None if config.source_path is None else SafetensorsSource(config.source_path)
        anatomy = Anatomy(model, config, self.source)
        self.names = [name for name, _ in anatomy.blocks]
        self.weights = anatomy.weights
        self.modules = [_weak(block) for _, block in anatomy.blocks]
        parts = [part for weights in self.weights for w in weights for part in w.parts]
        self.vram_bytes = self.budget(config, None)
        needed = anatomy.outside_bytes + sum(self._least_of_blocks(config.resident or ()))
        self.decode_bytes = encoding.buffer_bytes(
            config, self.device, parts, self.vram_bytes, needed
        )
        self.outside_bytes = anatomy.outside_bytes + self.decode_bytes
        self._check_budget()

        self._held = anatomy.held
        self._placement = Placement(self.device, self.source)
        self.place(model)

    def place(self, model: nn.Module) -> None:
        """Moves what is not streamed to the device; on a failure nothing is left there.

        Raises:
            torch.OutOfMemoryError: The device is full.
        """
        everything = list(model.named_modules())
        inside = {id(m) for weak in self.modules for m in _modules_of(weak)}
        outside = [(name, module) for name, module in everything if id(module) not in inside]
        try:
            self._placement.place_parameters(outside)
            self._placement.place_parameters(everything, self._held)
            self._placement.place_buffers(everything)
        except BaseException:
            self._placement.restore()
            raise

    def chosen(self, blocks: Iterable[int | str]) -> list[int]:
        """The indices of blocks that were named or numbered.

        Raises:
            ValueError: There is no such block.
        """
        found = []
        for block in blocks:
            if isinstance(block, str) and block in self.names:
                found.append(self.names.index(block))
            elif isinstance(block, int) and block < len(self.names):
                found.append(block)
            else:
                raise ValueError(
                    f"resident names block {block!r}, and there are blocks 0 to "
                    f"{len(self.names) - 1}, '{self.names[0]}' to '{self.names[-1]}'"
                )
        return found

    def check_chosen(self, blocks: Iterable[int | str], vram_bytes: int) -> None:
        """Refuses a budget that does not hold the blocks that are to stay and one of the others.

        Raises:
            ValueError: With both sizes.
        """
        stay, other = self._least_of_blocks(blocks)
        needed = self.outside_bytes + stay + other
        if vram_bytes < needed:
            raise ValueError(
                f"vram is {format_bytes(vram_bytes)} ({vram_bytes} bytes), which is too small: the "
                f"resident blocks take {format_bytes(stay)}, the weights outside of the blocks"
                f"{self._buffer} {format_bytes(self.outside_bytes)}, and the largest of the other "
                f"blocks {format_bytes(other)}; the smallest budget for this "
                f"choice is {format_bytes(needed)} ({needed} bytes)"
            )

    def _least_of_blocks(self, resident: Iterable[int | str]) -> tuple[int, int]:
        """Bytes of blocks that are to stay, and of the largest other one."""
        return least_of_blocks(self.block_bytes, self.chosen(resident))

    def is_current(self) -> bool:
        """Whether the blocks still hold the weights that the engine knows."""
        return all(weight.is_current() for weights in self.weights for weight in weights)

    def budget(self, config: StreamConfig, engine: Engine | None) -> int:
        """The device bytes for all weights that a configuration allows now."""
        if config.vram_bytes is not None:
            return config.vram_bytes
        held = 0 if engine is None else engine.arena_bytes + self.outside_bytes
        learned = None if engine is None else engine.activation_bytes()
        return auto_vram_bytes(self.device, learned, held_bytes=held)

    @property
    def least_bytes(self) -> int:
        """The smallest budget that works: all that is outside, and the largest block."""
        return self.outside_bytes + max(self.block_bytes)

    @property
    def block_bytes(self) -> list[int]:
        """Bytes of each block, every tensor rounded up as in the arena."""
        return [sum(aligned(p.bytes) for w in ws for p in w.parts) for ws in self.weights]

    def _check_budget(self, vram_bytes: int | None = None) -> None:
        vram = self.vram_bytes if vram_bytes is None else vram_bytes
        if vram >= self.least_bytes:
            return
        sizes = self.block_bytes
        largest = sizes.index(max(sizes))
        needed = f"{format_bytes(self.least_bytes)} ({self.least_bytes} bytes)"
        raise ValueError(
            f"vram is {format_bytes(vram)} ({vram} bytes), which is too small: the weights outside "
            f"of the blocks{self._buffer} take {format_bytes(self.outside_bytes)}, and the largest "
            f"block, '{self.names[largest]}', needs {format_bytes(sizes[largest])}; the smallest "
            f"budget that works is {needed}"
        )

    @property
    def _buffer(self) -> str:
        return " and the buffer to decode from" if self.decode_bytes else ""

    def check_budget(self, vram_bytes: int) -> None:
        """Refuses a budget that is too small, naming the block and the smallest that works."""
        self._check_budget(vram_bytes)

    def restore(self, *, bring: bool = True) -> None:
        """Brings everything outside of the blocks back; does nothing twice.

        Without ``bring`` the device is not asked for changes: in a fork it is not ours.
        """
        self._placement.restore(bring=bring)


def least_of_blocks(sizes: Sequence[int], resident: Iterable[int]) -> tuple[int, int]:
    """Bytes of the blocks that are to stay, of blocks of these sizes, and of the largest other."""
    chosen = set(resident)
    stay = sum(size for block, size in enumerate(sizes) if block in chosen)
    others = [size for block, size in enumerate(sizes) if block not in chosen]
    return stay, max(others, default=0)


def aligned(size: int) -> int:
    """Bytes that a tensor takes in the arena."""
    return -(-size // _ALIGN) * _ALIGN


def _weak(module: nn.Module) -> object:
    import weakref

    return weakref.ref(module)


def _modules_of(weak: object) -> list[nn.Module]:
    block: Any = weak() if callable(weak) else None
    return [] if block is None else list(block.modules())

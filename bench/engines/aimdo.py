"""comfy-aimdo's memory in ComfyUI's own two shapes: single layers, and the queue of one block.

Residents are a prefix (the watermark), by its design. Two offload streams take turns, each with a
cast buffer: the copy for one unit may start when the unit before the last has been computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bench.engines import Attached
from bench.stacks import weight_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.engines import Setup

_ALIGNMENT = 512


@dataclass(eq=False)
class _Unit:
    """What is copied at once: its parameters, packed, and its place in the device's memory."""

    parameters: list[nn.Parameter]
    place: Any = None
    flat: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    views: list[tuple[nn.Parameter, int, int, torch.Size]] = field(default_factory=list)
    signature: Any = None
    faulted: bool = False
    stream: torch.cuda.Stream | None = None

    def pack(self) -> None:
        sizes = [p.numel() * p.element_size() for p in self.parameters]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        self.flat = torch.empty(sum(padded), dtype=torch.uint8, pin_memory=True)
        at = 0
        for parameter, size, step in zip(self.parameters, sizes, padded, strict=True):
            self.flat[at : at + size].copy_(parameter.data.reshape(-1).view(torch.uint8))
            self.views.append((parameter, at, size, parameter.shape))
            parameter.data = torch.empty(0, dtype=parameter.dtype)
            at += step

    def bind(self, raw: torch.Tensor) -> None:
        for parameter, at, size, shape in self.views:
            parameter.data = raw[at : at + size].view(parameter.dtype).view(shape)


class _Memory:
    """The device's memory of all units, and the two offload streams."""

    def __init__(self, units: list[_Unit], budget: int, device: torch.device) -> None:
        from comfy_aimdo.model_vbar import ModelVBAR
        from comfy_aimdo.vram_buffer import VRAMBuffer

        self._device, index = device, device.index or 0
        for unit in units:
            unit.pack()
        total, largest = sum(u.flat.numel() for u in units), max(u.flat.numel() for u in units)
        self._pages = ModelVBAR(2 * total, index)
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]
        self._buffers = [VRAMBuffer(16 << 30, index) for _ in range(2)]
        self._turn = 0
        for unit in units:
            unit.place = self._pages.alloc(unit.flat.numel())
        self.watermark = max(0, budget - 2 * largest)
        self._pages.set_watermark(self.watermark)

    def fetch(self, unit: _Unit) -> torch.Tensor:
        """The unit's bytes on the device; its stream is set if a copy is under way."""
        from comfy_aimdo.model_vbar import vbar_fault, vbar_signature_compare
        from comfy_aimdo.torch import aimdo_to_tensor

        signature, unit.stream = vbar_fault(unit.place), None
        unit.faulted = signature is not None
        if unit.faulted:
            raw: torch.Tensor = aimdo_to_tensor(unit.place, self._device)
            if vbar_signature_compare(signature, unit.signature):
                return raw
            unit.signature = signature
        self._streams[self._turn].wait_stream(torch.cuda.current_stream(self._device))
        self._turn ^= 1
        unit.stream = self._streams[self._turn]
        if not unit.faulted:
            place = self._buffers[self._turn].get(unit.flat.numel())
            raw = aimdo_to_tensor(place, self._device)
        with torch.cuda.stream(unit.stream):
            raw.copy_(unit.flat, non_blocking=True)
        return raw

    def use(self, unit: _Unit, raw: torch.Tensor) -> None:
        """Makes compute wait for the copy, and binds."""
        if unit.stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(unit.stream)
        unit.bind(raw)

    def release(self, unit: _Unit) -> None:
        """After use."""
        from comfy_aimdo.model_vbar import vbar_unpin

        if unit.faulted:
            vbar_unpin(unit.place)

    def close(self) -> None:
        """Gives the memory back."""
        torch.cuda.synchronize(self._device)
        self._pages.close()
        self._buffers.clear()


def _by_layer(memory: _Memory, linear: nn.Module, unit: _Unit) -> Callable[..., torch.Tensor]:
    run = type(linear).forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        memory.use(unit, memory.fetch(unit))
        y: torch.Tensor = run(linear, x)
        memory.release(unit)
        return y

    return forward


class _Queue:
    """Fetches one block ahead; ends with the pass, as ComfyUI's does."""

    def __init__(self, memory: _Memory, blocks: list[nn.Module], units: list[_Unit]) -> None:
        self._memory, self._units = memory, units
        self._ahead: torch.Tensor | None = None
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=index: self._enter(i))
            block.register_forward_hook(lambda *_, i=index: self._leave(i))

    def _enter(self, index: int) -> None:
        unit = self._units[index]
        raw = self._memory.fetch(unit) if self._ahead is None else self._ahead
        self._memory.use(unit, raw)
        following = index + 1
        is_last = following == len(self._units)
        self._ahead = None if is_last else self._memory.fetch(self._units[following])

    def _leave(self, index: int) -> None:
        unit = self._units[index]
        if unit.stream is not None:
            # Without it the buffer would be overwritten early.
            unit.stream.wait_stream(torch.cuda.current_stream())
        self._memory.release(unit)


def attach(setup: Setup, per_linear: bool) -> Attached:
    """Sets the watermark to what the budget leaves beside two cast buffers."""
    from comfy_aimdo import control

    stack, device = setup.stack, setup.device
    index = device.index or 0
    if not control.devctxs and not control.init_device(index):
        raise RuntimeError("comfy-aimdo refused the device")
    stack.inp.to(device)
    stack.out.to(device)
    ends = weight_bytes(stack.inp) + weight_bytes(stack.out)
    if per_linear:
        layers = [m for m in stack.blocks.modules() if isinstance(m, nn.Linear)]
        owned = {id(p) for layer in layers for p in layer.parameters()}
        for parameter in stack.blocks.parameters():  # norms and the like: a few kilobytes
            if id(parameter) not in owned:
                parameter.data = parameter.data.to(device)
                ends += parameter.numel() * parameter.element_size()
        units = [_Unit(list(layer.parameters())) for layer in layers]
        memory = _Memory(units, setup.budget_bytes - ends, device)
        for layer, unit in zip(layers, units, strict=True):
            layer.forward = _by_layer(memory, layer, unit)  # type: ignore[method-assign]
    else:
        units = [_Unit(list(block.parameters())) for block in stack.order]
        memory = _Memory(units, setup.budget_bytes - ends, device)
        _Queue(memory, list(stack.order), units)
    return Attached(stack, memory.close, lambda: {"watermark_bytes": memory.watermark})

"""Moves what is not streamed to the device, and brings every bit of it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dgls_torch.weights import file_part, inner_tensors, parameters_of

if TYPE_CHECKING:
    from dgls_torch.files import SafetensorsSource


class Placement:
    """Parameters and buffers that stay on the device for as long as a stream lasts."""

    def __init__(self, device: torch.device, source: SafetensorsSource | None) -> None:
        """Moves nothing yet.

        Args:
            device: Where the model computes.
            source: Files for parameters and buffers on the meta device.
        """
        self._device = device
        self._source = source
        self._entries: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._data: list[tuple[nn.Parameter, torch.Tensor, int]] = []
        self._placed: dict[int, nn.Parameter] = {}
        self.bytes = 0

    def place_parameters(
        self, modules: list[tuple[str, nn.Module]], only: set[int] | None = None
    ) -> None:
        """Moves the parameters of ``modules``, or those of them whose ``id`` is in ``only``.

        Raises:
            ValueError: A parameter is on meta and in no file.
            torch.OutOfMemoryError: The device is full; `restore` brings back what was moved.
        """
        for name, owner, key, param in parameters_of(modules):
            if only is None or id(param) in only:
                self._place(name, owner, key, param)

    def place_buffers(self, modules: list[tuple[str, nn.Module]]) -> None:
        """Moves the buffers of ``modules``.

        Raises:
            ValueError: A buffer is on meta and in no file.
            torch.OutOfMemoryError: The device is full; `restore` brings back what was moved.
        """
        for prefix, module in modules:
            for key, buffer in list(module._buffers.items()):
                if buffer is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                self.bytes += _bytes(buffer)
                with torch.inference_mode(buffer.is_inference()):
                    if buffer.is_meta:
                        self._set(module._buffers, key, self._load(name, buffer))
                    elif buffer.device != self._device:
                        self._set(module._buffers, key, buffer.to(self._device))

    def restore(self, *, bring: bool = True) -> None:
        """Binds everything that was there before, last moved first; does nothing twice.

        What was changed in place on the device meanwhile, or put in its place, is brought along
        unless ``bring`` is false.
        """
        while self._data:
            param, data, version = self._data.pop()
            if bring and _changed(data, param, version):
                _copy(data, param.data)
            param.data = data
        while self._entries:
            owner, key, before, made = self._entries.pop()
            now: Any = owner.get(key)
            if not bring:
                pass
            elif now is not made and now is not None and not before.is_meta:
                before = now.to(before.device)
            elif now is made and not before.is_meta and _changed(before, made, 0):
                _copy(before, made)
            owner[key] = before
        self._placed.clear()
        self.bytes = 0

    def _place(self, name: str, owner: dict[str, Any], key: str, param: nn.Parameter) -> None:
        known = self._placed.get(id(param))
        if known is not None:
            if known is not param:
                self._set(owner, key, known)
            return
        self._placed[id(param)] = param
        self.bytes += _bytes(param)
        # A normal tensor wherever stream() is called from: backward may be asked for elsewhere.
        with torch.inference_mode(param.is_inference()):
            self._move(name, owner, key, param)

    def _move(self, name: str, owner: dict[str, Any], key: str, param: nn.Parameter) -> None:
        if param.is_meta:
            made = nn.Parameter(self._load(name, param), requires_grad=param.requires_grad)
        elif param.device == self._device:
            return
        elif is_traceable_wrapper_subclass(param):
            made = nn.Parameter(param.detach().to(self._device), requires_grad=False)
        else:
            self._data.append((param, param.data, _version(param)))
            param.data = param.data.to(self._device)
            return
        self._placed[id(param)] = made
        self._set(owner, key, made)

    def _set(self, owner: dict[str, Any], key: str, value: object) -> None:
        self._entries.append((owner, key, owner[key], value))
        owner[key] = value

    def _load(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._source is None or name not in self._source:
            raise ValueError(
                f"'{name}' is on the meta device and its bytes are in no file; load it, or pass "
                'source="model.safetensors" with a tensor of that name'
            )
        file_part(name, tensor, self._source)
        return self._source.load_tensor(name, self._device)


def _version(tensor: torch.Tensor) -> int:
    """Moves with every change in place, but for inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def _changed(before: torch.Tensor, now: torch.Tensor, version: int) -> bool:
    """Whether a tensor was written to since it had this version.

    Of parameters the version tells. Batch norm writes its statistics without moving it, and
    inference tensors have none: there the bytes are compared.
    """
    plain = now.layout is torch.strided and not is_traceable_wrapper_subclass(now)
    if plain and (now.is_inference() or not isinstance(now, nn.Parameter)):
        return not torch.equal(before, now.detach().to(before.device))
    return now.is_inference() or _version(now) != version


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad(), torch.inference_mode(target.is_inference()):
        target.copy_(source)


def _bytes(tensor: torch.Tensor) -> int:
    # A wrapper tells the size that it stands for, which may be eight times what it takes.
    return sum(t.numel() * t.element_size() for t in inner_tensors(tensor) or [tensor])


def outside_bytes(
    modules: list[tuple[str, nn.Module]], buffers: list[nn.Module], only: set[int] | None = None
) -> int:
    """Bytes that `Placement` would hold for these modules' parameters and those buffers."""
    found = [p for _, _, _, p in parameters_of(modules) if only is None or id(p) in only]
    params = {id(p): _bytes(p) for p in found}
    held = [b for module in buffers for b in module._buffers.values() if b is not None]
    return sum(params.values()) + sum(_bytes(b) for b in held)

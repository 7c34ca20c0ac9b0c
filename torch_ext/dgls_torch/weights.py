"""Walks tensors: what of a block is moved as bytes, what stays on the device, how each is bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dgls_torch.files import SafetensorsSource


@dataclass(frozen=True)
class Part:
    """A plain run of bytes: a whole parameter, or one inner tensor of a wrapper subclass.

    ``bytes`` reach from the first to the last element, gaps included, so that a view with the
    same strides on a copy of them is the same tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    bytes: int
    tensor: torch.Tensor | None
    file: tuple[int, int] | None = None

    def view(self, typed: torch.Tensor, offset: int) -> torch.Tensor:
        """The tensor as it lies from byte ``offset`` on in memory, which is given in its type."""
        return typed.as_strided(self.shape, self.stride, offset // self.dtype.itemsize)


@dataclass
class Weight:
    """One parameter of a block, and how it is bound.

    Either ``param.data`` is set, and the parameter stays the same object; or, where torch cannot
    do that (meta parameters, wrapper subclasses), the entry of the module's parameters is.
    """

    name: str
    param: nn.Parameter
    parts: list[Part]
    owners: list[tuple[dict[str, Any], str]]
    is_entry: bool
    rebuild: Callable[[list[torch.Tensor]], torch.Tensor]
    master: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Keeps what is bound outside of the block's forward."""
        self.master = self.param if self.is_entry else self.param.data

    def targets(
        self,
    ) -> list[tuple[object, str | None, torch.Tensor, list[torch.Tensor], bool, bool]]:
        """What the hooks set, and what they watch: see ``dgls_torch._C.make_hooks``."""
        inner = [p.tensor for p in self.parts if p.tensor is not None] if self.is_entry else []
        # An inference tensor has no version: changes of it in place go unnoticed.
        watched = [t for t in [self.param, *inner] if not t.is_inference()]
        is_filed = any(part.file is not None for part in self.parts)
        if self.is_entry:
            return [
                (owner, key, self.param, watched, is_filed, False) for owner, key in self.owners
            ]
        return [(self.param, None, self.master, watched, is_filed, self.is_plain)]

    @property
    def target_count(self) -> int:
        """How many targets it has."""
        return len(self.owners) if self.is_entry else 1

    @property
    def is_plain(self) -> bool:
        """Whether an op that takes the parameter is sure to be given that very tensor."""
        return not self.is_entry and type(self.param) is nn.Parameter

    def is_current(self) -> bool:
        """Whether the model still has this parameter, with the bytes that were there."""
        if any(owner.get(key) is not self.param for owner, key in self.owners):
            return False
        return self.is_entry or self.param.data_ptr() == self.master.data_ptr()

    def bound(self, views: list[torch.Tensor]) -> torch.Tensor:
        """What is bound while the block runs, made of one view for each part."""
        made = self.rebuild(views)
        return nn.Parameter(made, requires_grad=False) if self.is_entry else made


def part_names(weights: list[list[Weight]], parts: list[Part]) -> str:
    """The name of the parameter of each part, one a line; parts of one parameter share it."""
    of_part = {id(p): w.name for ws in weights for w in ws for p in w.parts}
    return "\n".join(of_part[id(part)].replace("\n", " ") for part in parts)


def parameters_of(
    modules: Iterable[tuple[str, nn.Module]],
) -> Iterator[tuple[str, dict[str, Any], str, nn.Parameter]]:
    """Every parameter with its dotted name, the dict that holds it, and its key there."""
    for prefix, module in modules:
        for key, param in module._parameters.items():
            if param is not None:
                yield (f"{prefix}.{key}" if prefix else key), module._parameters, key, param


def plain_part(tensor: torch.Tensor) -> Part | None:
    """A tensor as bytes; ``None`` for what has no simple bytes: sparse, quantized, conjugated."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    if not plain or tensor.numel() == 0 or tensor.is_conj() or tensor.is_neg():
        return None
    # A subclass may tell another shape than the one its bytes have.
    tensor = tensor.as_subclass(torch.Tensor)
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size()
    return Part(tensor.dtype, tuple(tensor.shape), tensor.stride(), size, tensor)


def check_on_host(name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor whose bytes are not in host memory, where they are streamed from.

    Raises:
        ValueError: It is on meta, or on a device.
    """
    if tensor.is_meta:
        raise ValueError(
            f"'{name}' is on the meta device and its bytes are in no file; pass "
            'source="model.safetensors" with a tensor of that name, or load the weights'
        )
    if tensor.device.type != "cpu":
        raise ValueError(
            f"'{name}' is on {tensor.device}; the weights of streamed blocks must be on the CPU: "
            'leave out .to("cuda"), the rest of the model is moved by stream()'
        )


def block_weights(
    prefix: str,
    block: nn.Module,
    kept: set[int],
    source: SafetensorsSource | None,
    check: Callable[[str, torch.Tensor], None] = check_on_host,
) -> tuple[list[Weight], list[nn.Parameter]]:
    """The parameters of a block that are moved as bytes, and those that must stay on the device.

    Args:
        prefix: Dotted name of the block.
        block: The block.
        kept: ``id`` of parameters that are used outside of blocks as well.
        source: Files that hold the weights, if they do not come from the tensors.
        check: What each tensor that is not in ``source`` has to pass.

    Raises:
        ValueError: A parameter is unlike the file's, or fails the check.
    """
    named = [(f"{prefix}.{n}" if n else prefix, m) for n, m in block.named_modules()]
    weights: dict[int, Weight] = {}
    resident: dict[int, nn.Parameter] = {}
    for name, owner, key, param in parameters_of(named):
        if id(param) in weights:
            weights[id(param)].owners.append((owner, key))
        elif id(param) in kept or id(param) in resident:
            resident[id(param)] = param
        else:
            weight = _weight(name, owner, key, param, source, check)
            if weight is None:
                resident[id(param)] = param
            else:
                weights[id(param)] = weight
    return list(weights.values()), list(resident.values())


def _weight(
    name: str,
    owner: dict[str, Any],
    key: str,
    param: nn.Parameter,
    source: SafetensorsSource | None,
    check: Callable[[str, torch.Tensor], None],
) -> Weight | None:
    only = _only
    if is_traceable_wrapper_subclass(param):
        inner, rebuild = _inner(param)
        check(name, inner[0] if inner else param)
        inner, rebuild = _shared(inner, rebuild)
        parts = [plain_part(tensor) for tensor in inner]
        if not parts or None in parts:
            return None
        found = [part for part in parts if part is not None]
        return Weight(name, param, found, [(owner, key)], True, rebuild)
    if source is not None and name in source:
        part = file_part(name, param, source)
        return Weight(name, param, [part], [(owner, key)], param.is_meta, only) if part else None
    check(name, param)
    part = plain_part(param.data)
    return Weight(name, param, [part], [(owner, key)], False, only) if part else None


def _shared(
    inner: list[torch.Tensor], rebuild: Callable[[list[torch.Tensor]], torch.Tensor]
) -> tuple[list[torch.Tensor], Callable[[list[torch.Tensor]], torch.Tensor]]:
    """The inner tensors that a twin shares memory with, and how to make one of those alone.

    Some wrappers copy a part, such as a scale, whenever they are wrapped or detached; a twin made
    of views would keep what was in the arena at that moment. It gets the master's value instead.
    """
    made = inner_tensors(nn.Parameter(rebuild(inner), requires_grad=False))
    is_shared = [a.data_ptr() == b.data_ptr() for a, b in zip(inner, made, strict=True)]

    def fill(views: list[torch.Tensor]) -> torch.Tensor:
        given = iter(views)
        device = views[0].device
        pairs = zip(inner, is_shared, strict=True)
        return rebuild([next(given) if shared else t.to(device) for t, shared in pairs])

    return [t for t, shared in zip(inner, is_shared, strict=True) if shared], fill


def _only(views: list[torch.Tensor]) -> torch.Tensor:
    return views[0]


def file_part(name: str, param: torch.Tensor, source: SafetensorsSource) -> Part | None:
    """Where a parameter lies in the files; ``None`` when it has no bytes.

    Raises:
        ValueError: Its shape or dtype is another one there.
    """
    number, found = source.lookup(name)
    if found.shape != tuple(param.shape) or found.dtype != param.dtype:
        raise ValueError(
            f"'{name}' is {param.dtype} {tuple(param.shape)} in the model but {found.dtype} "
            f"{found.shape} in {source.files[number].path.name}; make the model with the file's "
            "shapes and dtype, for example model.to(torch.bfloat16)"
        )
    if found.bytes == 0:
        return None
    stride = torch.empty(found.shape, device="meta").stride()
    return Part(found.dtype, found.shape, stride, found.bytes, None, (number, found.offset))


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors inside a wrapper; none in a plain one."""
    return _inner(tensor)[0] if is_traceable_wrapper_subclass(tensor) else []


def _inner(
    tensor: Any,
) -> tuple[list[torch.Tensor], Callable[[list[torch.Tensor]], torch.Tensor]]:
    """The plain tensors inside a wrapper, however deep, and how to wrap others in their place."""
    names, context = tensor.__tensor_flatten__()
    inner: list[torch.Tensor] = []
    makers: list[tuple[str, int, Callable[[list[torch.Tensor]], torch.Tensor]]] = []
    for name in names:
        value = getattr(tensor, name)
        below, make = _inner(value) if is_traceable_wrapper_subclass(value) else ([value], _only)
        inner += below
        makers.append((name, len(below), make))

    def rebuild(views: list[torch.Tensor]) -> torch.Tensor:
        made: dict[str, torch.Tensor] = {}
        at = 0
        for name, count, make in makers:
            made[name] = make(views[at : at + count])
            at += count
        kind: Any = type(tensor)
        # The parameter's own class, without the attributes that mark it as a parameter.
        wrapped = kind.__tensor_unflatten__(made, context, tensor.size(), tensor.stride())
        return wrapped  # type: ignore[no-any-return]

    return inner, rebuild

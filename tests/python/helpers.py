"""Models and tensors to stream, and what every test asks of a streamed model.

Goal: a test says which model and which use; that results are the resident model's, bit for bit, and
that nothing is left behind is checked here, the same way for all.
Method: no test of its own; every budget from the smallest to all-fits, freed memory poisoned.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only

import dgls_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

aten = torch.ops.aten
SMALL: dict[str, Any] = {"device": "cpu", "min_stream_bytes": 0, "poison": True}


class Pair(torch.Tensor):
    """A weight as payload times scale, like quantized tensors; the payload may be a Pair itself."""

    @staticmethod
    def __new__(cls, payload: torch.Tensor, scale: torch.Tensor) -> Pair:
        return torch.Tensor._make_wrapper_subclass(
            cls, payload.shape, strides=payload.stride(), dtype=torch.float32, device=payload.device
        )

    def __init__(self, payload: torch.Tensor, scale: torch.Tensor) -> None:
        self.payload, self.scale = payload, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["payload", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], *_: object) -> Pair:
        return cls(inner["payload"], inner["scale"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.clone.default, aten._to_copy.default):
            kwargs.pop("dtype", None)
            return cls(*(func(getattr(args[0], n), **kwargs) for n in ("payload", "scale")))
        if func is aten.copy_.default and isinstance(args[0], Pair):
            args[0].payload.copy_(args[1].payload)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        dense = tree_map_only(Pair, lambda pair: pair.dense(), (args, kwargs))
        return func(*dense[0], **dense[1])

    def dense(self) -> torch.Tensor:
        payload = self.payload.dense() if isinstance(self.payload, Pair) else self.payload
        return payload.to(torch.float32) * self.scale


class Plain(torch.Tensor):
    """A subclass that holds its bytes itself and lies about its shape, as packed formats do."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((1, *super().shape))


class Block(nn.Module):
    """A residual block with weights of several sizes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks between two layers that are no blocks; ``order`` says which run, and when."""

    def __init__(self, count: int = 6, width: int = 32, block: Any = Block) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(count))
        self.last = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, order: Iterable[int] | None = None) -> torch.Tensor:
        x = self.first(x)
        for index in range(len(self.blocks)) if order is None else order:
            x = self.blocks[index](x)
        return self.last(x)


def net(count: int = 6, width: int = 32, seed: int = 0, block: Any = Block) -> Net:
    torch.manual_seed(seed)
    return Net(count, width, block).eval()


def inputs(width: int = 32, rows: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def same(a: Any, b: Any) -> bool:
    """Whether two nested results are the same, bit for bit."""
    (left, shape), (right, other) = tree_flatten(a), tree_flatten(b)
    return shape == other and all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's values as bytes; a wrapper's are those of what it wraps."""
    if hasattr(tensor, "__tensor_flatten__"):
        return b"".join(bits(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if tensor.is_meta or tensor.numel() == 0 or tensor.layout != torch.strided:
        return b""
    plain = tensor.detach().as_subclass(torch.Tensor).resolve_conj().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


HOOK_DICTS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
]


class Snapshot:
    """All that a stream has to leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.state = self._take(model)
        # Alive, so that no id is given to another object.
        self._objects = [*model.parameters(), *model.buffers()]

    @staticmethod
    def _take(model: nn.Module) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for kind in ("_parameters", "_buffers"):
            for path, module in model.named_modules():
                for name, tensor in getattr(module, kind).items():
                    if tensor is None:
                        continue
                    wraps = hasattr(tensor, "__tensor_flatten__")
                    sparse = tensor.layout != torch.strided
                    where = 0 if wraps or sparse or tensor.is_meta else tensor.data_ptr()
                    state[f"{path}.{name}"] = (
                        *(id(tensor), type(tensor), where, bits(tensor), tensor.dtype),
                        *(tensor.requires_grad, tensor.is_inference(), tensor.device),
                        *(tuple(tensor.size()), () if sparse else tensor.stride()),
                    )
        for path, module in model.named_modules():
            hooks = {name: list(getattr(module, name).items()) for name in HOOK_DICTS}
            state[f"{path} hooks"] = hooks
            state[f"{path} names"] = sorted(vars(module))
        return state

    def check(self, model: nn.Module) -> None:
        now = self._take(model)
        changed = [name for name in self.state | now if self.state.get(name) != now.get(name)]
        assert not changed, f"not restored: {changed}"


def budgets(model: nn.Module, **options: Any) -> list[int]:
    """The smallest budget, some between, and one in which everything fits."""
    with dgls_torch.stream(model, 1 << 40, **(SMALL | options)) as s:
        least, most = s.plan.least_vram_bytes, s.plan.outside_bytes + s.plan.arena_bytes
    step = max(1, (most - least) // 4)
    return sorted({least, least + 1, least + step, least + 2 * step, most - 1, most} - {least - 1})


def check(
    model: nn.Module,
    call: Callable[[nn.Module], Any],
    *,
    passes: int = 3,
    vram: Iterable[int] | None = None,
    mode: Any = torch.inference_mode,
    **options: Any,
) -> list[dgls_torch.Report]:
    """Streams a model in every budget; the results and the model must be the resident one's."""
    with mode():
        expected = call(model)
    before = Snapshot(model)
    reports = []
    for size in budgets(model, **options) if vram is None else vram:
        with dgls_torch.stream(model, size, **(SMALL | options)) as s:
            for number in range(passes):
                with mode():
                    got = call(model)
                assert same(got, expected), f"pass {number} with {size} bytes:\n{s.plan}"
        before.check(model)
        reports.append(s.report())
    with mode():
        assert same(call(model), expected)
    return reports


_FLAGS = 6
"""Of what stands after the name in /proc/PID/stat."""
_IS_EXITING = 4


def threads() -> list[str]:
    """The names of our threads in this process, but for those that end: who joins one is woken
    before the system has forgotten it."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            stat = (task / "stat").read_text()
        except OSError:  # it has just ended
            continue
        name, rest = stat[stat.index("(") + 1 :].rsplit(") ", 1)
        if name.startswith("dgls") and not int(rest.split()[_FLAGS]) & _IS_EXITING:
            names.append(name)
    return names


def copying() -> list[str]:
    """The names of our threads that copy; a search for a better plan may be under way besides."""
    return [name for name in threads() if name != "dgls-plan"]


def told(call: Callable[[], object]) -> str | None:
    """What the call's RuntimeError says; nothing if there was none."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None


def settle() -> None:
    for _ in range(3):
        gc.collect()


def in_threads(*bodies: Callable[[], None]) -> list[BaseException]:
    """Runs the bodies at the same time and returns what they raised."""
    raised: list[BaseException] = []

    def run(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            raised.append(error)

    running = [threading.Thread(target=run, args=(body,)) for body in bodies]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return raised

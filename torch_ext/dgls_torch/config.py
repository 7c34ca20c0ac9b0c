"""Decides what a stream may be told, and refuses everything else with a clear sentence."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from dgls_torch.units import KIB, MIB, parse_budget, parse_bytes

if TYPE_CHECKING:
    import torch

UNITS = ("block", "layer")
"""What can be streamed at a time; the first by default."""

COMPRESS = ("off", "auto", "on")
"""Whether weights go over the link encoded; the first by default."""

_DEVICE = re.compile(r"(cuda)(?::(0|[1-9][0-9]{0,3}))?|(cpu)(?::0)?")
_STAGING_LEAST = 4 * KIB
_TRACE_MOST = 1024
_PREFETCH_MOST = 1000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """Everything that can be set about a stream; the defaults are meant to be right.

    Sizes are numbers of bytes or text such as ``"8GiB"`` (see `dgls_torch.units.parse_bytes`).
    ``"auto"`` and ``None`` mean that the planner chooses; every other value is an order. Values
    are stored in one form, so that two equal configurations compare equal: sizes as ``int``,
    devices and paths as ``str``, ``blocks`` and ``exclude`` as tuples.

    Attributes:
        vram: The device memory for the weights: resident blocks and the ring together.
            Unit: bytes. Range: ``"auto"``, or 1 to 2**63 - 1.
            Default: ``"auto"``, what is free less room for activations.
            Change it: to leave memory for another program, or to repeat a measurement.
        device: Where the model runs.
            Unit: a device. Range: ``None``, ``"cpu"``, ``"cuda"``, ``"cuda:<index>"`` or the same
            as a ``torch.device``. Default: ``None``, CUDA when there is any, else the CPU.
            Change it: to use another GPU than the current one, or to try a plan without one.
        blocks: The modules that are streamed one at a time.
            Unit: dotted names or modules. Range: ``None``, or at least one and none twice.
            Default: ``None``, found by their repeated class.
            Change it: when the plan shows that the blocks of an unusual model were not found.
        unit: What is streamed at a time: a block, or each layer of the blocks by itself. What else
            the blocks hold then stays on the device, as norms.
            Unit: a word. Range: ``"block"`` or ``"layer"``. Default: ``"block"``.
            Change it: to ``"layer"`` where copies decide. The ring then holds layers, so that more
            stays on the device, and the smallest budget is that of a layer. Each layer costs the
            host what a block does else, and code must not use a layer's weights outside of it.
        exclude: Blocks that are not streamed: they stay on the device, like all that is no block.
            Unit: dotted-name patterns (``fnmatch``); see `excludes`. Range: any number of them.
            Default: none.
            Change it: when blocks run inside each other, or in a way that hooks cannot follow.
        source: Where the weights are read from.
            Unit: a path, or the word ``"tensors"``. Range: ``"tensors"``, or a ``.safetensors``
            file, its index, or a folder that holds one of them.
            Default: ``"tensors"``, the tensors the model holds.
            Change it: when the weights do not fit the RAM; the model may then be on ``meta``.
        pinned: The most host memory that is page-locked in place.
            Unit: bytes. Range: ``"auto"``, or 0 to 2**63 - 1; 0 locks nothing but ``staging``.
            Default: ``"auto"``, half of what is available; nothing on WSL.
            Change it: down when other programs lack memory, up when the doctor shows room.
        ram: The host memory that the stream may hold itself: the staging chunks, and copies of what
            the files of ``source`` hold, each read once. What has no room is read in every pass.
            Weights that the model holds as tensors are the caller's and do not count.
            Unit: bytes. Range: ``"auto"``, or 4 KiB to 2**63 - 1; at 4 KiB nothing is copied.
            Default: ``"auto"``, on a GPU as many copies as ``pinned`` allows to page-lock, on the
            CPU none: the system's page cache does as well, and gives way.
            Change it: down where memory is short; up to keep a slow disk out of every pass.
        staging: The page-locked chunks, all together, that feed what is not locked in place; no
            more are made than can be read ahead of the ring.
            Unit: bytes. Range: 4 KiB to 2**63 - 1. Default: 64 MiB.
            Change it: down where page-locked memory is very scarce; up hardly ever helps.
        compress: Whether bf16 and fp8 (``float8_e4m3fn``) weights go over the link in a lossless
            encoded form, which the device decodes: the same bits arrive. It is about 1.45 times
            smaller for bf16, 1.1 to 1.3 times for fp8. They are encoded beside the first passes,
            which copy them as they are. It takes 32 to 128 MiB of ``vram``, and of host memory
            about two thirds of what is streamed, for fp8 three quarters and more, page-locked: half
            of what is available at most, and no more than ``pinned`` allows beside what is locked
            in place.
            Unit: a word. Range: ``"off"``, ``"auto"``, which takes as many of them as hide the
            copies behind the compute, by the times of passes, if ``adapt`` is set, or ``"on"``.
            Default: ``"off"``.
            Change it: to ``"auto"`` where copies decide and the host has memory to spare. Weights
            must then not be changed in a way that torch does not count, as through NumPy.
        min_stream_bytes: Tensors smaller than this stay resident.
            Unit: bytes. Range: 0 to 2**63 - 1; 0 streams all. Default: 64 KiB.
            Change it: up when a report shows many small copies, down for models of tiny tensors.
        resident: The blocks that stay on the device as a whole; all others are streamed whole.
            Unit: block indices or dotted names. Range: ``None``, or any number of blocks, each
            once. Default: ``None``, the planner keeps some tensors of every block, which is faster.
            Change it: to repeat a choice of another program.
        prefetch: How many blocks are copied ahead of the running one, at most.
            Unit: blocks. Range: ``None``, or 0 to 1000; 0 copies a block when the one before has
            ended. Default: ``None``, as many as pay.
            Change it: to repeat a choice of another program.
        adapt: Whether times are measured in every pass and a better plan is taken up between two.
            Unit: yes or no. Range: a bool. Default: ``True``.
            Change it: for CUDA graphs, which need the same addresses in every pass.
        trace_passes: How many of the last passes are kept for the timeline.
            Unit: passes. Range: 0 to 1024; 0 keeps none. Default: 8.
            Change it: up to look at a whole run, to 0 to save the last few kilobytes.
        poison: Whether device memory is filled with 0xFF as soon as it is free again.
            Unit: yes or no. Range: a bool. Default: ``False``.
            Change it: to find code that uses a weight outside its block's forward; it is slow.
        verify: Whether the bytes of each block are compared with their host source when they have
            arrived, before the block runs. A difference raises an error that names the tensor, and
            the block is fetched again.
            Unit: yes or no. Range: a bool. Default: ``False``.
            Change it: to find broken memory, links or files, and for bug reports; it is very slow.
        copy_bytes_per_s: The rate that copies of the CPU device are held to.
            Unit: bytes per second. Range: ``None``, or above 0 and finite.
            Default: ``None``, as fast as memory allows.
            Change it: to see on a machine without a GPU how a plan fares on a slow link.
    """

    vram: int | float | str = "auto"
    device: str | torch.device | None = None
    blocks: Iterable[Any] | None = None
    unit: str = UNITS[0]
    exclude: Iterable[str] = ()
    source: str | os.PathLike[str] = "tensors"
    pinned: int | float | str = "auto"
    ram: int | float | str = "auto"
    staging: int | float | str = 64 * MIB
    compress: str = COMPRESS[0]
    min_stream_bytes: int = 64 * KIB
    resident: Iterable[int | str] | None = None
    prefetch: int | None = None
    adapt: bool = True
    trace_passes: int = 8
    poison: bool = False
    verify: bool = False
    copy_bytes_per_s: float | None = None

    # The generated __init__ would refuse an unknown field without saying which ones exist.
    def __new__(cls, *_: object, **fields: object) -> StreamConfig:  # noqa: D102
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise TypeError(_unknown_field(name, known))
        return object.__new__(cls)

    def __post_init__(self) -> None:
        """Checks each field and stores it in its one form."""
        checked = {
            "vram": _size_or_auto(self.vram, "vram", least=1),
            "device": _device(self.device),
            "blocks": _blocks(self.blocks),
            "unit": _word(self.unit, "unit", UNITS),
            "exclude": _patterns(self.exclude),
            "source": _source(self.source),
            "pinned": _size_or_auto(self.pinned, "pinned", least=0),
            "ram": _size_or_auto(self.ram, "ram", least=_STAGING_LEAST),
            "staging": parse_bytes(self.staging, "staging", least=_STAGING_LEAST),
            "compress": _word(self.compress, "compress", COMPRESS),
            "min_stream_bytes": parse_bytes(self.min_stream_bytes, "min_stream_bytes", least=0),
            "resident": _resident(self.resident),
            "prefetch": _prefetch(self.prefetch),
            "adapt": _bool(self.adapt, "adapt"),
            "trace_passes": _trace_passes(self.trace_passes),
            "poison": _bool(self.poison, "poison"),
            "verify": _bool(self.verify, "verify"),
            "copy_bytes_per_s": _rate(self.copy_bytes_per_s, "copy_bytes_per_s"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def replace(self, **fields: Any) -> StreamConfig:
        """Returns a copy with some fields changed, checked like a new one.

        Raises:
            TypeError: A field is unknown or of a wrong type.
            ValueError: A value is out of its range.
        """
        return dataclasses.replace(self, **fields)

    @property
    def vram_bytes(self) -> int | None:
        """The device budget in bytes; ``None`` when the planner chooses."""
        return self.vram if isinstance(self.vram, int) else None

    @property
    def pinned_bytes(self) -> int | None:
        """The page-lock budget in bytes; ``None`` when the planner chooses."""
        return self.pinned if isinstance(self.pinned, int) else None

    @property
    def ram_bytes(self) -> int | None:
        """The budget for copies and chunks in bytes; ``None`` when the planner chooses."""
        return self.ram if isinstance(self.ram, int) else None

    @property
    def staging_bytes(self) -> int:
        """The size of all staging chunks together, in bytes."""
        return parse_bytes(self.staging, "staging", least=_STAGING_LEAST)

    @property
    def source_path(self) -> str | None:
        """The path the weights are read from; ``None`` when it is the model's own tensors."""
        return None if self.source == "tensors" else os.fspath(self.source)

    def excludes(self, name: str) -> bool:
        """Tells whether a pattern of ``exclude`` matches a dotted name or anything above it.

        ``"vae"`` and ``"v*"`` so exclude ``vae.decoder.conv_in.weight`` too. ``*`` also crosses
        dots, and case counts.
        """
        parts = name.split(".")
        above = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return any(fnmatchcase(part, pattern) for pattern in self.exclude for part in above)


def _unknown_field(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"StreamConfig has no field {name!r}{hint} its fields are {', '.join(known)}"


def _wrong_type(what: str, needed: str, value: object) -> TypeError:
    return TypeError(f"{what} needs {needed}, found {type(value).__name__}")


def _size_or_auto(value: object, what: str, least: int) -> int | str:
    size = parse_budget(value, what, least=least)
    return "auto" if size is None else size


def _device(value: object) -> str | None:
    if value is None:
        return None
    # Known by its class's name, so that checking a text does not import torch.
    if f"{type(value).__module__}.{type(value).__name__}" == "torch.device":
        value = str(value)
    needed = 'None, "cpu", "cuda", "cuda:<index>" or such a torch.device'
    if not isinstance(value, str):
        raise _wrong_type("device", needed, value)
    match = _DEVICE.fullmatch(value.strip().lower())
    if match is None:
        raise ValueError(f"device needs {needed}, found {value!r}")
    cuda, index, cpu = match.groups()
    return cpu or (cuda if index is None else f"{cuda}:{index}")


def _items(value: object, what: str, needed: str) -> tuple[Any, ...]:
    # Text and mappings are iterable, but their letters and keys are never what was meant.
    if isinstance(value, (str, bytes, Mapping)) or hasattr(value, "keys"):
        raise _wrong_type(what, needed, value)
    if not isinstance(value, Iterable):
        raise _wrong_type(what, needed, value)
    return tuple(value)


def _blocks(value: object) -> tuple[Any, ...] | None:
    if value is None:
        return None
    needed = "None or a sequence of dotted names or modules"
    blocks = _items(value, "blocks", needed)
    if not blocks:
        raise ValueError("blocks needs at least one name or module, or None to find them")
    for index, block in enumerate(blocks):
        what = f"blocks[{index}]"
        if isinstance(block, str):
            _dotted(block, what)
        elif not _is_module(block):
            raise _wrong_type(what, "a dotted name or a module", block)
        if any(block is other or block == other for other in blocks[:index]):
            shown = repr(block) if isinstance(block, str) else type(block).__name__
            raise ValueError(f"{what} needs to be named once, found {shown} twice")
    return blocks


def _word(value: object, what: str, words: tuple[str, ...]) -> str:
    quoted = [f'"{word}"' for word in words]
    needed = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
    if not isinstance(value, str):
        raise _wrong_type(what, needed, value)
    if value not in words:
        raise ValueError(f"{what} needs {needed}, found {value!r}")
    return value


def _is_module(value: object) -> bool:
    import torch

    return isinstance(value, torch.nn.Module)


def _dotted(name: str, what: str) -> None:
    if not all(part and part.strip() == part for part in name.split(".")):
        raise ValueError(f'{what} needs a dotted name such as "layers.0", found {name!r}')
    if set(name) & set("*?["):
        raise ValueError(f"{what} needs one dotted name and no pattern, found {name!r}")


def _patterns(value: object) -> tuple[str, ...]:
    patterns = _items(value, "exclude", 'a sequence of patterns such as ("vae", "head.*")')
    for index, pattern in enumerate(patterns):
        if not isinstance(pattern, str):
            raise _wrong_type(f"exclude[{index}]", "a pattern as text", pattern)
        if not pattern or pattern.strip() != pattern:
            raise ValueError(
                f'exclude[{index}] needs a pattern such as "vae" or "head.*", found {pattern!r}'
            )
    return patterns


def _source(value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise _wrong_type("source", '"tensors" or the path of a safetensors file', value)
    path = os.fspath(value)
    if not isinstance(path, str):
        raise _wrong_type("source", "a path as text", path)
    if not path.strip() or "\0" in path:
        raise ValueError(f'source needs "tensors" or the path of a file, found {path!r}')
    return path


def _resident(value: object) -> tuple[int | str, ...] | None:
    if value is None:
        return None
    needed = "None or a sequence of block indices or dotted names"
    blocks = _items(value, "resident", needed)
    for index, block in enumerate(blocks):
        what = f"resident[{index}]"
        if isinstance(block, str):
            _dotted(block, what)
        elif isinstance(block, bool) or not isinstance(block, int):
            raise _wrong_type(what, "a block index or a dotted name", block)
        elif block < 0:
            raise ValueError(f"{what} needs a block index from 0 on, found {block}")
        if block in blocks[:index]:
            raise ValueError(f"{what} needs to be named once, found {block!r} twice")
    return blocks


def _prefetch(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type("prefetch", "None or an int", value)
    if not 0 <= value <= _PREFETCH_MOST:
        raise ValueError(f"prefetch needs 0 to {_PREFETCH_MOST} blocks, found {value}")
    return value


def _trace_passes(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type("trace_passes", "an int", value)
    if not 0 <= value <= _TRACE_MOST:
        raise ValueError(f"trace_passes needs 0 to {_TRACE_MOST} passes, found {value}")
    return value


def _bool(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(what, "True or False", value)
    return value


def _rate(value: object, what: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong_type(what, "None or a number of bytes per second", value)
    try:
        rate = float(value)
    except OverflowError:
        rate = math.inf
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"{what} needs a finite rate above 0 bytes/s, found {rate}")
    return rate

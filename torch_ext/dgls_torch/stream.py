"""`stream`: attaches an engine to a model, and takes it off again without a trace."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from dgls_torch import _C
from dgls_torch.blocks import budget_shares, models_of
from dgls_torch.config import StreamConfig
from dgls_torch.interrupts import uninterrupted
from dgls_torch.layout import Layout
from dgls_torch.native import Engine
from dgls_torch.pass_hooks import PassHooks
from dgls_torch.resizing import resize
from dgls_torch.shortage import Shortage, engine_that_fits

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from dgls_torch.report import Plan, Report

_live: weakref.WeakSet[Stream] = weakref.WeakSet()


@overload
def stream(
    model: nn.Module,
    vram: int | float | str | None = None,
    *,
    blocks: Iterable[str | nn.Module] | None = None,
    exclude: Iterable[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    config: StreamConfig | None = None,
    **fields: Any,
) -> Stream: ...


@overload
def stream(
    model: object,
    vram: int | float | str | None = None,
    *,
    blocks: Iterable[str | nn.Module] | None = None,
    exclude: Iterable[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    config: StreamConfig | None = None,
    **fields: Any,
) -> Stream | StreamGroup: ...


def stream(
    model: object,
    vram: int | float | str | None = None,
    *,
    blocks: Iterable[str | nn.Module] | None = None,
    exclude: Iterable[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    config: StreamConfig | None = None,
    **fields: Any,
) -> Stream | StreamGroup:
    """Streams a model's blocks through the device during ``forward``, within a memory budget.

    The blocks' weights stay where they are on the host; each is copied to the device just before
    its block runs, while the block before it computes, and as many as fit stay there. Everything
    else is moved to the device. Nothing is copied before the first forward.

    Args:
        model: A module, or a diffusers pipeline: its transformers and unets then share the budget.
        vram: Budget for the weights on the device: ``"auto"``, ``"8GiB"`` or bytes.
        blocks: The blocks, as dotted names or modules; found if not given.
        exclude: Patterns of blocks that stay on the device.
        source: ``"tensors"``, or safetensors files; the model may then be on the meta device.
        config: Everything else; the arguments before it override its fields.
        **fields: Single fields of `StreamConfig`.

    Returns:
        The handle; as a context manager it detaches at the end. The model keeps it alive.

    Raises:
        ValueError: The budget is too small (the message names the block and the smallest budget
            that works), no blocks were found, or weights are not where they should be.
        TypeError: An argument is of a wrong type or unknown.
        torch.OutOfMemoryError: The weights do not fit on the device, after a second try with less
            where the planner chooses.
        RuntimeError: The model is streamed already, or the device refuses.
    """
    given = {"vram": vram, "blocks": blocks, "exclude": exclude, "source": source}
    fields |= {name: value for name, value in given.items() if value is not None}
    config = (config or StreamConfig()).replace(**fields)
    models = models_of(model)
    if len(models) == 1:
        return Stream(models[0][1], config)
    return StreamGroup([(name, part) for name, part in models], config)


class Stream:
    """One streamed model. Made by `stream`; every method may be called at any time, repeatedly."""

    def __init__(self, model: nn.Module, config: StreamConfig) -> None:
        """Attaches to ``model``; see `stream`. On any failure the model is as it was."""
        if PassHooks.of(model) is not None:
            raise RuntimeError(
                f"this {type(model).__name__} is streamed already; call detach() on its handle"
            )
        self.config = config
        self._model = weakref.ref(model)
        self._parts = _Parts()
        self._hooks: PassHooks | None = None
        self._last: tuple[Plan, Report] | None = None
        self._finalizer = weakref.finalize(model, _forget, weakref.ref(self), self._parts)
        self._finalizer.atexit = False
        self._shortage = Shortage()
        try:
            with uninterrupted():
                layout = self._parts.layout = Layout(model, config)
                self._parts.engine = engine_that_fits(layout, config, self._on_rebuild())
                self._hooks = PassHooks(model, self)
                _live.add(self)
        except BaseException:
            self.detach()
            raise

    def _on_rebuild(self) -> Any:
        # Held by the hooks, so it must not keep the stream, and with it the weights, alive.
        weak = weakref.ref(self)

        def rebuild() -> None:
            stream = weak()
            if stream is not None and stream._engine is not None:
                stream._engine.rebuild()

        return rebuild

    @property
    def _layout(self) -> Layout | None:
        return self._parts.layout

    @property
    def _engine(self) -> Engine | None:
        return self._parts.engine

    @property
    def plan(self) -> Plan:
        """What lives where; the last plan after `detach`."""
        return self._engine.plan() if self._engine is not None else self._kept()[0]

    def report(self) -> Report:
        """What was measured so far; the last report after `detach`. Never waits for the device."""
        return self._kept()[1] if self._engine is None else self._shortage.told(self._engine)

    def _kept(self) -> tuple[Plan, Report]:
        if self._last is None:
            raise RuntimeError("this stream was never attached")
        return self._last

    @uninterrupted()
    def replan(self, vram: int | float | str | None = None) -> Plan:
        """Plans anew for a budget, or for the present one and what was learned meanwhile.

        Blocks until the device is done with the old plan. For another budget resident weights
        that stay are moved on the device, if there is room for both arenas for a moment; else, and
        without ``vram``, the first pass afterwards fetches them again. Without ``vram`` counts and
        times start anew, too. If the new budget is refused, the old plan stays in force.

        Raises:
            ValueError: The budget is too small; the message names the smallest that works.
            RuntimeError: The stream is detached, or a block is running.
        """
        old, layout = self._attached()
        config = self.config if vram is None else self.config.replace(vram=vram)
        old.check_idle()
        budget = layout.budget(config, old)
        layout.check_budget(budget)
        if vram is None:
            self._renew(old, layout, budget)
        else:
            resize(old, budget)
        self.config = config
        return self.plan

    def _renew(self, old: Engine, layout: Layout, budget: int) -> None:
        """Starts over: weights may have changed in a way that nobody noticed."""
        order, rebuild, hooked = old.order(), self._on_rebuild(), not self.is_suspended
        old.close()  # there may be no room for both
        try:
            self._parts.engine = Engine(
                layout, self.config, rebuild, order, budget, is_hooked=hooked
            )
        except BaseException:
            self._parts.engine = Engine(
                layout, self.config, rebuild, order, old.vram_bytes, is_hooked=hooked
            )
            raise

    def _note(self, error: BaseException) -> None:
        """A pass ended by an exception."""
        engine, layout = self._engine, self._layout
        if isinstance(error, torch.OutOfMemoryError) and engine is not None and layout is not None:
            self._shortage.note(error, layout, engine.vram_bytes, self.config)

    @uninterrupted()
    def _make_room(self) -> None:
        """The pass before ran out of device memory: this one gets more beside the weights."""
        engine, layout = self._attached()
        smaller = self._shortage.take(layout, engine.vram_bytes)
        if smaller is not None:
            engine.check_idle()
            layout.check_budget(smaller)
            resize(engine, smaller)

    @property
    def is_suspended(self) -> bool:
        """Whether the model runs without the stream for now; see `suspend`."""
        return self._hooks is None

    @uninterrupted()
    def suspend(self) -> None:
        """Takes the hooks off and restores the model, but keeps plan, arena and page-locks.

        The model may then be used by others, and `resume` finds the resident weights where they
        were. Its weights must not be changed in place meanwhile. Does nothing twice.

        Raises:
            RuntimeError: The stream is detached, or a block is running in another thread.
        """
        engine, layout = self._attached()
        hooks, self._hooks = self._hooks, None
        if hooks is None:
            return
        try:
            engine.unhook()
        except BaseException:
            self._hooks = hooks
            raise
        hooks.remove()
        layout.restore()

    @uninterrupted()
    def resume(self) -> None:
        """Puts the hooks on again after `suspend`. Does nothing twice.

        Raises:
            RuntimeError: The stream is detached, or the model is gone or has other weights now.
        """
        engine, layout = self._attached()
        model = self._model()
        if self._hooks is not None:
            return
        if model is None or not layout.is_current():
            raise RuntimeError(
                "weights of the model were replaced while its stream was suspended; detach() it "
                "and call stream() again"
            )
        layout.place(model)
        try:
            engine.hook()
            self._hooks = PassHooks(model, self)
        except BaseException:
            engine.unhook()
            layout.restore()
            raise

    def is_current(self) -> bool:
        """Whether the model still has the weights that are streamed, so that `resume` works."""
        return self._layout is not None and self._layout.is_current()

    def _attached(self) -> tuple[Engine, Layout]:
        if self._engine is None or self._layout is None:
            raise RuntimeError("this stream is detached; call stream() again")
        return self._engine, self._layout

    @uninterrupted()
    def detach(self) -> None:
        """Takes the hooks off and restores every parameter and buffer. Waits for the device."""
        hooks, self._hooks = self._hooks, None
        _live.discard(self)
        self._finalizer.detach()
        try:
            if self._engine is not None:
                with contextlib.suppress(RuntimeError):
                    self._last = (self._engine.plan(), self.report())
            if hooks is not None:
                hooks.remove()
        finally:
            self._parts.release()

    def __enter__(self) -> Stream:
        """Returns the stream, which is attached already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detaches."""
        self.detach()

    def __reduce__(self) -> Any:
        """Refuses to be pickled: a stream is about this process's memory."""
        raise TypeError("a Stream cannot be pickled; call detach() first and pickle the model")


class _Parts:
    """What a stream has of its model. Holds no module: a finalizer of the model holds it."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.engine: Engine | None = None

    @uninterrupted()
    def release(self) -> None:
        """Closes the engine and restores everything; does nothing twice."""
        engine, self.engine = self.engine, None
        layout, self.layout = self.layout, None
        is_ours = engine is None or not engine.is_foreign
        try:
            if engine is not None:
                engine.close()
        finally:
            if layout is not None:
                layout.restore(bring=is_ours)


class StreamGroup:
    """The streams of a pipeline with several denoisers; the budget is split by their weights."""

    def __init__(self, models: list[tuple[str, nn.Module]], config: StreamConfig) -> None:
        """Attaches to each model; if one fails, the ones before it are detached."""
        self.streams: dict[str, Stream] = {}
        try:
            for (name, model), own in zip(models, budget_shares(models, config), strict=True):
                self.streams[name] = Stream(model, own)
        except BaseException:
            self.detach()
            raise

    @property
    def plan(self) -> dict[str, Plan]:
        """The plan of each model."""
        return {name: s.plan for name, s in self.streams.items()}

    def report(self) -> dict[str, Report]:
        """The report of each model."""
        return {name: s.report() for name, s in self.streams.items()}

    def replan(self, vram: int | float | str | None = None) -> dict[str, Plan]:
        """Plans each model anew; see `Stream.replan`. A size is split as at the start."""
        config = None if vram is None else StreamConfig(vram=vram)
        total = sum(s.plan.vram_bytes for s in self.streams.values())
        for s in self.streams.values():
            share = s.plan.vram_bytes
            whole = None if config is None else config.vram_bytes
            s.replan(vram if whole is None else whole * share // total)
        return self.plan

    @uninterrupted()
    def detach(self) -> None:
        """Detaches every model."""
        for s in self.streams.values():
            s.detach()

    def __enter__(self) -> StreamGroup:
        """Returns the group, which is attached already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detaches."""
        self.detach()


def _forget(weak: weakref.ref[Stream], parts: _Parts) -> None:
    """The model is gone, though some of its blocks may be in use elsewhere."""
    stream = weak()
    # In a cycle of garbage with its model the stream went first.
    if stream is not None:
        stream.detach()
    else:
        parts.release()


@atexit.register
def _detach_all() -> None:
    _C.end_process()
    for stream in list(_live):
        with contextlib.suppress(Exception):
            stream.detach()


def device_name(device: torch.device) -> str:
    """A device for people: ``cuda:0 (NVIDIA ...)`` or ``cpu``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)

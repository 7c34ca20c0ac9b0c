"""The engine of one stream: the native handle, the arena, the block hooks and their views."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import torch

from dgls_torch import _C, encoding, untraced
from dgls_torch.arena import empty_arena
from dgls_torch.guard import Guard
from dgls_torch.host_budget import HostBudget, budget_of
from dgls_torch.interrupts import uninterrupted
from dgls_torch.report import BlockPlan, HostUse, Plan, Report, Use
from dgls_torch.views import Views
from dgls_torch.weights import part_names

if TYPE_CHECKING:
    from dgls_torch.config import StreamConfig
    from dgls_torch.layout import Layout
    from dgls_torch.weights import Weight

_ops = torch.ops.dgls
_RECORD = 9
_PATIENCE_MS = 5000
# Blocks of all streams: one that two streams bind would be refused in the middle of a pass.
_hooked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class Engine:
    """A native engine with everything whose memory it uses."""

    def __init__(
        self,
        layout: Layout,
        config: StreamConfig,
        on_rebuild: Any,
        order: list[int] | None = None,
        vram_bytes: int | None = None,
        *,
        is_hooked: bool = True,
    ) -> None:
        """Plans, allocates the arena and hooks the blocks; on a failure nothing is left.

        With ``is_hooked`` false the blocks are left alone until `hook`.

        Raises:
            ValueError: The budget is too small.
            torch.OutOfMemoryError: The arena does not fit.
            RuntimeError: The device refuses.
        """
        self._layout, self._config = layout, config
        self._on_rebuild = untraced.rarely(on_rebuild)
        self._base_bytes = 0
        self.vram_bytes = layout.vram_bytes if vram_bytes is None else vram_bytes
        layout.check_budget(self.vram_bytes)
        if config.resident is not None:
            layout.check_chosen(config.resident, self.vram_bytes)
        order = list(range(len(layout.names))) if order is None else order
        # Tensors in memory come first, then those in files: the order of the native tensor list.
        parts = [(b, p) for b, ws in enumerate(layout.weights) for w in ws for p in w.parts]
        memory = [(b, p) for b, p in parts if p.file is None]
        filed = [(b, p) for b, p in parts if p.file is not None]
        sequence = [*memory, *filed]
        self._blocks = [b for b, _ in sequence]
        self._sizes = [p.bytes for _, p in sequence]
        self._budget = self.vram_bytes - layout.outside_bytes
        moved = [p for _, p in sequence]
        host = budget_of(config, layout.device, moved)
        # Before the peak is watched: it is no part of the activations.
        encoded = encoding.options(config, layout.device, moved, host, layout.decode_bytes)
        self._arena = empty_arena(min(self._budget, sum(layout.block_bytes)), layout.device)
        self._watch_peak()
        files = [] if layout.source is None else [str(f.path) for f in layout.source.files]
        self._number: int | None = _ops.create(
            self._arena,
            [p.tensor for _, p in memory],
            [p.file[0] for _, p in filed if p.file],
            [p.file[1] for _, p in filed if p.file],
            [p.bytes for _, p in filed],
            files,
            self._blocks,
            order,
            self._budget,
            min_stream_bytes=config.min_stream_bytes,
            pinned_bytes=host.pinned_bytes,
            ram_bytes=host.copies_bytes,
            page_cache_bytes=host.page_cache_bytes,
            staging_bytes=host.staging_bytes,
            # One more than is asked for: while a pass is timed, the oldest is no whole one.
            trace_uses=(config.trace_passes + 1) * len(order) if config.trace_passes else 0,
            copy_bytes_per_s=int(config.copy_bytes_per_s or 0),
            poison=config.poison,
            adapt=config.adapt,
            manual=config.resident is not None,
            resident_blocks=layout.chosen(config.resident or ()),
            window=-1 if config.prefetch is None else config.prefetch,
            verify=config.verify,
            names=part_names(layout.weights, moved),
            **encoded,
            # For tests: another driver than the arena's, and waits taken out.
            driver=os.environ.get("DGLS_TEST_DRIVER", "auto"),
            faults=int(os.environ.get("DGLS_TEST_FAULTS", "0")),
        )
        if encoded:
            encoding.promise(self.number, moved, host)
        self._guard = _guard_of(self.number, host)
        self._rebuilding = threading.Lock()
        self._is_stale = False
        self._capsules: list[Any] = []
        self._hooks: list[tuple[Any, Any]] = []
        self._removers: list[Any] = []
        self._hooked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._made: list[list[torch.Tensor]] = []
        self._views = Views(layout.weights)
        try:
            if layout.source is not None:
                layout.source.check_unchanged()  # the engine has them open now: no other can come
            self._make_hooks()
            self._bind_views()
            if is_hooked:
                self.hook()
        except BaseException:
            self.close()
            raise

    @property
    def number(self) -> int:
        """The native engine's number.

        Raises:
            RuntimeError: The engine is closed.
        """
        if self._number is None:
            raise RuntimeError("the engine is closed")
        return self._number

    @property
    def is_open(self) -> bool:
        """Whether it was not closed yet."""
        return self._number is not None

    @property
    def is_foreign(self) -> bool:
        """Whether this process is a fork of the one that made the engine."""
        return self._number is not None and _C.is_foreign(self._number)

    @property
    def arena_bytes(self) -> int:
        """Device bytes held."""
        return self._arena.numel() if self._number is not None else 0

    def hook(self) -> None:
        """Puts the hooks on the blocks; does nothing twice."""
        if self._removers:
            return
        for weak, (before, after) in zip(self._layout.modules, self._hooks, strict=True):
            module: Any = weak()  # type: ignore[operator]
            # First before and last after, so that hooks of others see the weights bound.
            self._removers.append(module.register_forward_pre_hook(before, prepend=True))
            self._removers.append(module.register_forward_hook(after, always_call=True))

    def unhook(self) -> None:
        """Binds the masters and takes the hooks off; what is on the device stays there.

        Raises:
            RuntimeError: A block runs in another thread, or waits for its weights there.
        """
        self.check_idle()
        while self._removers:
            self._removers.pop().remove()

    def _make_hooks(self) -> None:
        for index, (name, weak) in enumerate(
            zip(self._layout.names, self._layout.modules, strict=True)
        ):
            module: Any = weak()  # type: ignore[operator]
            if module in _hooked:
                raise RuntimeError(f"block '{name}' is part of another stream; detach() that first")
            weights = self._layout.weights[index]
            targets = [t for w in weights for t in w.targets()]
            made: list[torch.Tensor] = []
            increment = _increment(weights, made)
            plain = [w for w in weights if w.is_plain]
            self._hand_over([w.param for w in plain] + [w.master for w in plain])
            before, after, capsule = _C.make_hooks(
                self.number, index, name, module, targets, self._on_rebuild, increment
            )
            _hooked.add(module)
            self._hooked.add(module)
            self._made.append(made)
            self._capsules.append(capsule)
            self._hooks.append(untraced.hooks(before, after))

    def _hand_over(self, tensors: list[torch.Tensor]) -> None:
        """Gives the hooks tensors as torch's C functions take them; only an op can do that."""
        with torch.no_grad():
            _ops._hand_over(self.number, tensors)

    def _uses(self) -> list[tuple[int, list[int]]]:
        """For each position of the program, its block and the offset of each of its tensors."""
        flat = _ops.layout(self.number)
        uses, at = [], 0
        while at < len(flat):
            count = flat[at + 1]
            uses.append((flat[at], flat[at + 2 : at + 2 + count]))
            at += 2 + count
        return uses

    def _bind_views(self) -> None:
        """Makes the tensors that the hooks bind, so that the hot path makes none."""
        places, stand_ins = self._views.make(self._arena, self._uses())
        for made, new in zip(self._made, stand_ins, strict=True):
            made[:] = new
        for capsule, views in zip(self._capsules, places, strict=True):
            made = [view for at in views if at is not None for view in at]
            self._hand_over([view for view in made if type(view) is torch.Tensor])
            _C.set_views(capsule, views)

    def rebuild(self) -> None:
        """Takes up what was learned, within the same memory: another order, or a better plan.

        One thread at a time: views of one plan must not be bound for the next one, nor be told
        apart from it by a count that another thread is about to take back.
        """
        with uninterrupted(), self._rebuilding:
            if _ops.wants_rebuild(self.number):
                self._is_stale = True  # until the views are made, whatever comes between
                _ops.rebuild(self.number, self._arena, self._budget)
            if self._is_stale:
                self._bind_views()
                self._is_stale = False

    def check_idle(self) -> None:
        """Ends a use that an exception left unfinished.

        Raises:
            RuntimeError: A block runs in another thread, or waits for its weights there.
        """
        if self._runs_elsewhere():
            raise RuntimeError("a block is running in another thread; wait until it has ended")
        _C.take_back(self.number)

    def _runs_elsewhere(self) -> bool:
        """Whether another thread still runs a block, or is about to; waits, but not for ever."""
        for _ in range(_PATIENCE_MS):
            thread = _C.runner(self.number)
            # A thread that has ended left its block with an exception that torch calls no hook for.
            if thread in (0, threading.get_ident()) or thread not in sys._current_frames():
                return False
            time.sleep(0.001)
        return True

    def order(self) -> list[int]:
        """The blocks in order of use, as far as it is known."""
        if _ops.wants_rebuild(self.number):
            self.rebuild()
        return list(_ops.order(self.number))

    def begin_pass(self) -> None:
        """The model's forward begins."""
        _C.take_back(self.number)
        _ops.begin_pass(self.number)

    def end_pass(self) -> None:
        """The model's forward has ended. Does nothing once another thread has closed the engine."""
        try:
            _ops.end_pass(self.number)
        except RuntimeError:
            if self.is_open:
                raise

    def activation_bytes(self) -> int | None:
        """Most that the model used beside its weights since the engine was made; CUDA only."""
        if self._layout.device.type != "cuda" or _ops.stats(self.number)[5] == 0:
            return None
        peak = torch.cuda.max_memory_allocated(self._layout.device)
        return max(0, peak - self._base_bytes)

    def _watch_peak(self) -> None:
        if self._layout.device.type == "cuda":
            self._base_bytes = torch.cuda.memory_allocated(self._layout.device)
            torch.cuda.reset_peak_memory_stats(self._layout.device)

    def close(self) -> None:
        """Binds the masters, takes the hooks off, waits for the device, gives the arena back.

        In a fork the engine itself stays as it is: it belongs to the other process.
        """
        self._guard.stop()
        for capsule in self._capsules:
            _C.shut(capsule)
        if self._number is not None and not self.is_foreign:
            self._runs_elsewhere()  # its kernels read the arena
        number, self._number = self._number, None
        try:
            for capsule in self._capsules:
                _C.unhook(capsule)
        finally:
            for remover in self._removers:
                remover.remove()
            for module in list(self._hooked):
                _hooked.discard(module)
            self._capsules, self._removers, self._hooks = [], [], []
            if number is not None:
                encoding.forget(number)
                _ops.destroy(number)
            self._arena = torch.empty(0, dtype=torch.uint8)

    def plan(self) -> Plan:
        """The plan in force."""
        layout = self._layout
        resident, facts = _ops.plan_in_force(self.number)
        _, streamed, ring, arena, _, _, period_ns, bound_ns = facts
        kept, moved = [0] * len(layout.names), [0] * len(layout.names)
        for block, size, stays in zip(self._blocks, self._sizes, resident, strict=True):
            (kept if stays else moved)[block] += size
        order = list(dict.fromkeys([*_ops.order(self.number), *range(len(layout.names))]))
        return Plan(
            device=str(layout.device),
            vram_bytes=self.vram_bytes,
            outside_bytes=layout.outside_bytes,
            arena_bytes=arena,
            ring_bytes=ring,
            predicted_s=None if period_ns < 0 else period_ns * 1e-9,
            predicted_bound_s=None if bound_ns < 0 else bound_ns * 1e-9,
            streamed_bytes=streamed,
            least_vram_bytes=layout.least_bytes,
            blocks=tuple(BlockPlan(layout.names[b], kept[b], moved[b]) for b in order),
            decode_bytes=layout.decode_bytes,
        )

    def report(self) -> Report:
        """What was measured so far."""
        stats = _ops.stats(self.number)
        uses, on_demand, mispredicted, rebuilds, errors, passes, moved, copies = stats[:8]
        return Report(
            plan=self.plan(),
            passes=passes,
            uses=uses,
            on_demand=on_demand,
            mispredicted=mispredicted,
            rebuilds=rebuilds,
            adopted=stats[11],
            errors=errors,
            h2d_bytes_total=moved,
            copies=copies,
            pinned_bytes=stats[8],
            pin_failures=stats[9],
            staging_bytes=stats[10],
            host=HostUse.of(_ops.host(self.number)),
            verified_bytes=stats[12],
            mismatches=stats[13],
            encoded_bytes_total=stats[14],
            decoded_bytes_total=stats[15],
            encoded_held_bytes=stats[16],
            timeline=tuple(self._timeline()),
            last_errors=tuple(_ops.errors(self.number).splitlines()),
            config=self._config,
        )

    def _timeline(self) -> list[Use]:
        flat = _ops.trace(self.number)
        records = [flat[at : at + _RECORD] for at in range(0, len(flat), _RECORD)]
        in_pass = max(1, len(_ops.order(self.number)))
        # From the first number on that is the first of a pass.
        whole = [r for r in records if r[0] >= -(-flat[0] // in_pass) * in_pass]
        uses = []
        for number, block, size, stretch, *times in whole or records:
            seconds = [time * 1e-9 for time in times]
            uses.append(Use(number // in_pass, self._layout.names[block], size, stretch, *seconds))
        return uses


def _increment(weights: list[Weight], made: list[torch.Tensor]) -> Any:
    """Moves the versions of all that backward may have saved of a block's weights.

    That is its parameters and what stands in for them: ``made``, which `Engine` fills.
    """
    increment = torch.autograd.graph.increment_version
    params = [w.param for w in weights if not w.is_entry]
    return untraced.rarely(lambda: increment([*params, *made]))


def _guard_of(number: int, host: HostBudget) -> Guard:
    guard = Guard(lambda lacking: _ops.give_back(number, lacking))
    if host.pinned_bytes or host.copies_bytes or host.encoded_bytes:
        guard.start()
    return guard

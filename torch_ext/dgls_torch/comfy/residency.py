"""What the engine holds of one ComfyUI model: an attribute of the model, so it ends with it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

import dgls_torch
from dgls_torch.blocks import layers_of
from dgls_torch.comfy.containers import is_operation, network_blocks
from dgls_torch.comfy.pins import Pins
from dgls_torch.comfy.sizes import measure

if TYPE_CHECKING:
    from torch import nn

    from dgls_torch import Plan
    from dgls_torch.comfy.settings import Settings
    from dgls_torch.comfy.sizes import Sizes

log = logging.getLogger("dgls_torch")
_ATTRIBUTE = "dgls_residency"
#: A change of budget by less than this part of a model is not worth another plan.
_STEPS = 16


class Residency:
    """The stream of one BaseModel and who answers for it.

    Several patchers, clones of each other, share one BaseModel; the one that loaded it last is
    the owner. Holds no module and no patcher, so that it keeps neither alive.

    Attributes:
        stream: The stream, suspended but while its owner samples; ``None`` without one.
        owner: ``id`` of the patcher that loaded the model; it clears this before it dies.
        expected: Whether the next detach is only the first half of loading the model again.
        streams: Whether the last loading left the blocks to the engine.
        passed_by: Why the last loading did without a stream; ``None`` when it did not.
        latest: The last stream, for its report; it may be detached.
        pins: What of it ComfyUI counts as page-locked.
    """

    def __init__(self) -> None:
        """Nothing is held yet."""
        self.stream: dgls_torch.Stream | None = None
        self.owner: int | None = None
        self.expected = False
        self.streams = False
        self.passed_by: str | None = "the model was not sampled yet"
        self.latest: dgls_torch.Stream | None = None
        self.pins = Pins()
        self._made: tuple[tuple[str, ...], str] = ((), "")  # names and compress of the stream

    @staticmethod
    def of(model: nn.Module) -> Residency:
        """The residency of a BaseModel, made at first use."""
        found = model.__dict__.get(_ATTRIBUTE)
        if found is None:
            found = model.__dict__[_ATTRIBUTE] = Residency()
        assert isinstance(found, Residency)
        return found

    def __deepcopy__(self, _: Any) -> Residency:
        """A copy of the model is not streamed."""
        return Residency()

    @property
    def held_bytes(self) -> int:
        """Device bytes that the engine holds: of blocks, and to decode them from.

        A plan that was adopted later may use less of the arena; it is held all the same.
        """
        if self.stream is None:
            return 0
        engine, plan = self.stream._engine, self.stream.plan
        arena = plan.arena_bytes if engine is None else engine.arena_bytes
        return arena + plan.decode_bytes

    def attached(self, *arguments: Any) -> bool:
        """As `attach`; tells whether the device had room."""
        try:
            self.attach(*arguments)
        except torch.OutOfMemoryError as error:
            log.warning("DGLS: %s", error)
            self.release()
            return False
        return True

    def attach(
        self,
        net: nn.Module,
        names: tuple[str, ...],
        vram_bytes: int,
        device: torch.device,
        pinned: int | str,
        compress: str,
    ) -> None:
        """Streams the blocks ``names`` of ``net``; keeps the stream that is there if it fits.

        Raises:
            ValueError: The budget is too small.
            torch.OutOfMemoryError: The device is full.
        """
        stream = self.stream
        if stream is not None and (self._made != (names, compress) or not stream.is_current()):
            self.release()
            stream = None
        if stream is None:
            stream = dgls_torch.stream(
                net,
                vram_bytes,
                blocks=list(names),
                device=str(device),
                pinned=pinned,
                compress=compress,
            )
            self.stream, self._made = stream, (names, compress)
            stream.suspend()
        elif self._is_worth_it(stream.plan, vram_bytes):
            stream.replan(vram_bytes)
        self.latest, self.passed_by = stream, None
        self.pins.tell(stream)

    @staticmethod
    def _is_worth_it(plan: Plan, vram_bytes: int) -> bool:
        """Whether another budget is so different that fetching the residents again pays off.

        Larger, it has to be a step of the model. Smaller, it is a LoRA that came: what
        ComfyUI itself needs back it takes by `shrink`.
        """
        more, total = vram_bytes - plan.vram_bytes, plan.outside_bytes + plan.block_bytes
        return -more > total // 64 or (plan.streamed_bytes > 0 and more > max(1, total // _STEPS))

    def resume(self) -> None:
        """Puts the hooks on for one sampling run; without them it is right too, only slow."""
        stream = self.stream
        if stream is None:
            return
        try:
            stream.resume()
        except RuntimeError as error:
            log.warning("DGLS: not streaming in this run: %s", error)
            self.release()

    def suspend(self) -> None:
        """Takes the hooks off; what is on the device stays there."""
        if self.stream is not None:
            self.stream.suspend()
            self.pins.tell(self.stream)

    def shrink(self, wanted_bytes: int) -> int:
        """Gives device memory back and says how much: part of the arena, or all of it."""
        stream = self.stream
        if stream is None:
            return 0
        held, plan = self.held_bytes, stream.plan
        used = min(plan.vram_bytes, plan.outside_bytes + plan.arena_bytes)
        least, step = plan.least_vram_bytes, (plan.outside_bytes + plan.block_bytes) // _STEPS
        if used - wanted_bytes >= least:
            # Another plan costs the same however little it gives; ComfyUI may ask again at once.
            stream.replan(max(least, used - max(wanted_bytes, step)))
            self.pins.tell(stream)
        else:
            self.release()
        return held - self.held_bytes

    def release(self) -> int:
        """Detaches the stream; the masters are bound and the arena is freed. Returns its bytes."""
        held = self.held_bytes
        stream, self.stream = self.stream, None
        if stream is None:
            return 0
        try:
            stream.detach()
        finally:
            self.pins.tell(None)
        return held


def streamed_blocks(net: nn.Module, settings: Settings) -> list[tuple[str, nn.Module]]:
    """The blocks of a network that settings leave to the engine, or the layers in them.

    Raises:
        ValueError: The network has no blocks, or no layers in them.
    """
    resident = set(settings.resident or ())
    blocks = [block for block in network_blocks(net) if block[0] not in resident]
    return layers_of(blocks, is_operation) if settings.unit == "layer" else blocks


def sizes_of(model: nn.Module, settings: Settings) -> Sizes:
    """The sizes of a BaseModel under settings, of which not all blocks are resident."""
    net: Any = model.diffusion_model
    return measure(model, streamed_blocks(net, settings))

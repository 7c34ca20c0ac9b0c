"""Hooks on the whole model: bounds of a pass, changes of the host weights, copies and pickles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from dgls_torch.stream import Stream


def _nothing(*_: object) -> None:
    """The hook of a copy: a copied model is not streamed."""


class _Hook:
    """A hook that knows its stream. A deep copy of it does nothing; a pickle is refused."""

    def __init__(self, stream: Stream) -> None:
        self.stream: Stream | None = stream

    def __deepcopy__(self, _: object) -> Any:
        return _nothing

    def __reduce_ex__(self, _: object) -> Any:
        raise TypeError(
            "a streamed model cannot be pickled: its hooks belong to this process; call detach() "
            "on its stream first, or save its state_dict()"
        )


class _Before(_Hook):
    def __call__(self, module: nn.Module, _: Any) -> None:
        if self.stream is not None and self.stream._model() is module:
            _begin(self.stream)


class _After(_Hook):
    def __call__(self, module: nn.Module, *_: Any) -> None:
        if self.stream is not None and self.stream._model() is module:
            _end(self.stream)


@torch.compiler.disable
def _begin(stream: Stream) -> None:
    engine, hooks = stream._engine, stream._hooks
    if engine is None or hooks is None:
        return
    hooks.check_grad()
    engine.begin_pass()
    for block in hooks.changed_blocks():
        engine.reload(block)


@torch.compiler.disable
def _end(stream: Stream) -> None:
    engine, hooks = stream._engine, stream._hooks
    if engine is None or hooks is None:
        return
    engine.end_pass()
    if torch.is_grad_enabled():
        hooks.note_versions()  # the block hooks moved them


class PassHooks:
    """The hooks of one stream on its model, which keep the stream alive as long as the model."""

    def __init__(self, model: nn.Module, stream: Stream) -> None:
        """Registers the hooks."""
        self._before, self._after = _Before(stream), _After(stream)
        self._removers = [
            model.register_forward_pre_hook(self._before, prepend=True),
            model.register_forward_hook(self._after),
        ]
        layout = stream._layout
        weights = [] if layout is None else layout.weights
        # An inference tensor has no version: changes of it in place go unnoticed.
        self._params = [
            [w.param for w in ws if not w.param.is_inference() and not w.is_entry] for ws in weights
        ]
        self._files = [[w for w in ws if w.parts[0].file is not None] for ws in weights]
        self._versions: list[int] = []
        self.note_versions()

    @staticmethod
    def of(model: nn.Module) -> Stream | None:
        """The stream that is attached to a model."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(hook, _Before) and hook.stream is not None:
                stream = hook.stream
                return stream if stream._model() is model else None
        return None

    def check_grad(self) -> None:
        """Refuses to run for training, before anything is computed.

        Raises:
            RuntimeError: Grad mode is on and a streamed parameter requires grad.
        """
        if torch.is_grad_enabled() and any(p.requires_grad for ps in self._params for p in ps):
            raise RuntimeError(
                "dgls_torch streams weights for inference only, but grad mode is on and streamed "
                "parameters require grad; run under torch.inference_mode() or torch.no_grad(), or "
                "call model.requires_grad_(False)"
            )

    def note_versions(self) -> None:
        """Takes the present state of the host weights for the one that the device has."""
        self._versions = [sum(p._version for p in params) for params in self._params]

    def changed_blocks(self) -> list[int]:
        """Blocks whose host weights were changed in place since the last pass.

        Raises:
            RuntimeError: They stream from a file, which the change did not reach.
        """
        versions = [sum(p._version for p in params) for params in self._params]
        pairs = enumerate(zip(versions, self._versions, strict=True))
        changed = [block for block, (now, before) in pairs if now != before]
        self._versions = versions
        for block in changed:
            if self._files[block]:
                raise RuntimeError(
                    f"'{self._files[block][0].name}' was changed in place, but its block streams "
                    "from a file; detach() first, or stream from the tensors"
                )
        return changed

    def remove(self) -> None:
        """Takes the hooks off."""
        self._before.stream = self._after.stream = None
        for remover in self._removers:
            remover.remove()

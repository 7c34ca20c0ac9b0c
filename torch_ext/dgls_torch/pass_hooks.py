"""Hooks on the whole model: bounds of a pass, training, copies and pickles."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dgls_torch import untraced

if TYPE_CHECKING:
    from dgls_torch.native import Engine
    from dgls_torch.stream import Stream


def _nothing(*_: object) -> None:
    """The hook of a copy: a copied model is not streamed."""


class _Hook:
    """A hook that knows its stream. A deep copy of it does nothing; a pickle is refused."""

    def __init__(self, stream: Stream) -> None:
        self.stream: Stream | None = stream
        self._run = untraced.rarely(self.act)

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if self.stream is not None and self.stream._model() is module:
            self._run(self.stream, given[-1])

    @staticmethod
    def act(stream: Stream, given: object) -> None:
        """What the hook does."""

    def __deepcopy__(self, _: object) -> Any:
        return _nothing

    def __reduce_ex__(self, _: object) -> Any:
        raise TypeError(
            "a streamed model cannot be pickled: its hooks belong to this process; call detach() "
            "on its stream first, or save its state_dict()"
        )


class _Before(_Hook):
    @staticmethod
    def act(stream: Stream, given: object) -> None:
        engine, hooks = stream._engine, stream._hooks
        if engine is None or hooks is None:
            return
        hooks.check_grad()
        if stream._shortage.is_noted:
            stream._make_room()
            engine = stream._engine
            if engine is None:
                return
        hooks.began = engine
        engine.begin_pass()


class _After(_Hook):
    @staticmethod
    def act(stream: Stream, given: object) -> None:
        engine, hooks = stream._engine, stream._hooks
        error = sys.exc_info()[1]
        if given is None and error is not None:
            # An exception is leaving the forward: there is no output, and the pass did not end.
            stream._note(error)
            return
        # Another thread may have replanned or detached: the pass is none of the new engine's.
        if engine is not None and hooks is not None and hooks.began is engine and engine.is_open:
            engine.end_pass()


class PassHooks:
    """The hooks of one stream on its model, which keep the stream alive as long as the model."""

    def __init__(self, model: nn.Module, stream: Stream) -> None:
        """Registers the hooks."""
        self._before, self._after = _Before(stream), _After(stream)
        self._removers = [
            model.register_forward_pre_hook(self._before, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        layout = stream._layout
        weights = [] if layout is None else layout.weights
        self.began: Engine | None = None
        self._params = [w.param for ws in weights for w in ws]

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
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._params):
            raise RuntimeError(
                "dgls_torch streams weights for inference only, but grad mode is on and streamed "
                "parameters require grad; run under torch.inference_mode() or torch.no_grad(), or "
                "call model.requires_grad_(False)"
            )

    def remove(self) -> None:
        """Takes the hooks off."""
        self._before.stream = self._after.stream = None
        for remover in self._removers:
            remover.remove()

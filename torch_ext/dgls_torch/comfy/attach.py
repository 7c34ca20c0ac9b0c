"""`stream_model`: a MODEL of ComfyUI in, a MODEL whose blocks are streamed out."""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING, Any

from comfy.model_patcher import ModelPatcher

from dgls_torch.comfy.containers import unsupported
from dgls_torch.comfy.oom import with_room
from dgls_torch.comfy.patcher import KEY, StreamPatcher
from dgls_torch.comfy.residency import sizes_of, streamed_blocks

if TYPE_CHECKING:
    from dgls_torch.comfy.settings import Settings

log = logging.getLogger("dgls_torch")


class NotStreamableError(ValueError):
    """A model that is passed through as it is; the message says why."""


def stream_model(model: Any, settings: Settings, *, private: bool = False) -> StreamPatcher:
    """Makes a patcher that streams, out of any MODEL; ``model`` itself is not changed.

    Args:
        model: A model patcher.
        settings: What was asked for.
        private: Whether the weights are to be the result's own, so that they may be changed: the
            file is loaded again then.

    Raises:
        NotStreamableError: The model cannot be streamed; pass it through.
        ValueError: The budget is too small for it.
    """
    made = _clone(model, private)
    made.__class__ = StreamPatcher
    net = getattr(made.model, "diffusion_model", None)
    if net is None:
        raise NotStreamableError(f"{type(made.model).__name__} has no diffusion_model")
    reason = unsupported(net)
    if reason is not None:
        raise NotStreamableError(f"{type(net).__name__}: {reason}")
    try:
        streamed_blocks(net, settings)
    except ValueError as error:
        raise NotStreamableError(str(error)) from error
    made.set_attachments(KEY, settings)
    made.remove_wrappers_with_key("apply_model", KEY)  # a model that is streamed already has it
    made.add_wrapper_with_key("apply_model", KEY, with_room)
    # A clone that is loaded completely counts as loaded, blocks and all, while its patches are the
    # same; other patches make ComfyUI load it anew.
    made.patches_uuid = uuid.uuid4()
    if settings.vram_bytes is not None:
        sizes_of(made.model, settings).check(settings.vram_bytes)
    return made  # type: ignore[no-any-return]


def _clone(model: Any, private: bool) -> Any:
    is_dynamic = model.is_dynamic()
    kind = type(model).__name__
    plain = type(model) in (ModelPatcher, StreamPatcher) or is_dynamic
    if not plain:
        raise NotStreamableError(
            f"it comes with a patcher of its own ({kind}), which decides where its weights lie"
        )
    if (is_dynamic or private) and model.cached_patcher_init is None:
        wanted = "cast_target" if private else "DGLS"
        raise NotStreamableError(
            f"{wanted} needs to load the file again, and the loader of this model does not say "
            "how; load it with DGLS Model Loader, Load Diffusion Model or Load Checkpoint"
        )
    if private:
        return model.clone(disable_dynamic=True, force_deepcopy=True)
    return model.clone(disable_dynamic=True) if is_dynamic else model.clone()

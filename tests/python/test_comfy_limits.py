"""What cannot go as planned: interrupts, full devices, budgets, models that cannot be streamed.

Goal: never a wrong picture and never a half-done state; what does not stream says why.
Method: each trouble on a small network; afterwards streamed and plain runs are as they should be.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy_world import (
    CPU,
    WIDTH,
    Block,
    Flux,
    bits,
    difference,
    free_all,
    mm,
    patcher,
    residency,
    same,
    sample,
    settings,
    streamed,
)
from torch import nn

import dgls_torch
from dgls_torch.comfy.attach import NotStreamableError, stream_model
from dgls_torch.comfy.residency import sizes_of
from dgls_torch.comfy.settings import Settings
from dgls_torch.native import Engine


@pytest.fixture(autouse=True)
def _nothing_is_loaded() -> Any:
    yield
    free_all()


KEY = "diffusion_model.double_blocks.1.up.weight"


class Interrupted(BaseException):
    """As ComfyUI's own: no Exception."""


@pytest.mark.parametrize("error", [Interrupted, RuntimeError, torch.OutOfMemoryError])
def test_a_run_that_ends_early(error: Any) -> None:
    model = patcher()
    expected = sample(patcher())
    before = bits(model)
    stream = streamed(model)

    def stop(*_: Any) -> None:
        raise error

    hook = model.model.diffusion_model.single_blocks[1].down.register_forward_pre_hook(stop)
    with pytest.raises(error):
        sample(stream)
    hook.remove()
    assert bits(model) == before
    assert not any(m._forward_pre_hooks for m in model.model.modules())
    assert same(sample(stream), expected)
    assert same(sample(model), expected)


def test_a_model_that_fits_is_left_to_comfyui() -> None:
    for wanted in (Settings(), Settings(vram_bytes=1 << 40)):
        stream = stream_model(patcher(), wanted)
        assert same(sample(stream), sample(patcher()))
        assert residency(stream).stream is None
        assert "fits" in str(residency(stream).passed_by)
        assert stream.loaded_size() == mm.module_size(stream.model)


def test_auto_takes_what_comfyui_offers() -> None:
    model = patcher()
    sizes = sizes_of(model.model, Settings())
    stream = stream_model(model, Settings())
    stream._budget = _as_on_a_gpu(stream)
    with torch.inference_mode():
        stream.partially_load(CPU, int(0.6 * sizes.total_bytes))
    plan = residency(stream).stream.plan  # type: ignore[union-attr]
    assert plan.vram_bytes == int(0.6 * sizes.total_bytes)
    stream.partially_load(CPU, -plan.arena_bytes // 2)
    smaller = residency(stream).stream.plan  # type: ignore[union-attr]
    assert smaller.arena_bytes <= plan.arena_bytes // 2 + 1
    stream.partially_load(CPU, sizes.total_bytes)
    assert residency(stream).stream is None
    assert stream.loaded_size() == mm.module_size(stream.model)


def _as_on_a_gpu(stream: Any) -> Any:
    """Budgets as on a device that is not the CPU, on which everything always fits."""
    real = type(stream)._budget

    def budget(device: Any, offered: float) -> int | None:
        found = real(stream, device, offered)
        if found is None and stream.why_not(device) is None:
            sizes = stream._sizes(stream._settings())
            if sizes.least_bytes <= offered <= sizes.total_bytes:
                stream._residency().passed_by = None
                return int(offered)
        return found  # type: ignore[no-any-return]

    return budget


def test_a_budget_that_is_too_small() -> None:
    model = patcher()
    least = sizes_of(model.model, Settings()).least_bytes
    words = rf"vram is .*largest block, 'double_blocks.0'.*at least .* \({least} bytes\)"
    with pytest.raises(ValueError, match=words):
        stream_model(model, Settings(vram_bytes=least - 1))
    assert same(sample(stream_model(model, Settings(vram_bytes=least))), sample(patcher()))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_full_device(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    expected, real, left = sample(patcher()), dgls_torch.stream, [times]

    def full(*arguments: Any, **fields: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("full")
        return real(*arguments, **fields)

    monkeypatch.setattr(dgls_torch, "stream", full)
    stream = streamed(patcher(), 0.9)
    assert same(sample(stream), expected)
    assert (residency(stream).stream is None) == (times == 3)
    if times < 3:
        share = {1: 0.9, 2: 0.45}[times]
        asked = int(share * sizes_of(stream.model, Settings()).total_bytes)
        held: Any = residency(stream).stream
        assert abs(held.plan.vram_bytes - asked) <= 1
    assert same(sample(stream), expected)
    assert residency(stream).stream is not None


class Executor:
    """As ComfyUI's: what a wrapper calls, and the model it is about."""

    def __init__(self, model: Any, failures: int) -> None:
        self.class_obj, self.failures, self.calls = model, failures, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        net = self.class_obj.diffusion_model
        fail = self.calls <= self.failures
        hook = net.single_blocks[1].down.register_forward_pre_hook(_full if fail else _nothing)
        try:
            return net(x)  # type: ignore[no-any-return]
        finally:
            hook.remove()


def _full(*_: Any) -> None:
    raise torch.OutOfMemoryError("full")


def test_a_plan_that_takes_less_of_the_arena_gives_nothing_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one may that passes have shown to be better."""
    stream = streamed(patcher(), 0.5)
    sample(stream)
    held = residency(stream).held_bytes
    plan = residency(stream).stream.plan  # type: ignore[union-attr]
    less = replace(plan, arena_bytes=plan.arena_bytes // 2)
    monkeypatch.setattr(Engine, "plan", lambda _: less)
    assert residency(stream).held_bytes == held > less.arena_bytes


def _nothing(*_: Any) -> None:
    return None


def test_a_forward_that_runs_out_of_memory_is_run_once_more() -> None:
    x, model = torch.ones(3, WIDTH), patcher()
    expected = sample(patcher(), x=x)
    stream = stream_model(streamed(model, 0.9), settings(model, 0.9))
    (wrapper,) = stream.wrappers["apply_model"]["dgls"]
    with torch.inference_mode():
        mm.load_models_gpu([stream])
        stream.pre_run()
        held, loaded = residency(stream).held_bytes, stream.loaded_size()
        executor = Executor(stream.model, 1)
        assert same(wrapper(executor, x), expected)
        assert executor.calls == 2
        left = residency(stream).held_bytes
        assert left <= held // 2 + 1
        assert stream.loaded_size() == loaded - (held - left)
        with pytest.raises(torch.OutOfMemoryError):
            wrapper(Executor(stream.model, 2), x)
        while residency(stream).held_bytes:
            assert same(wrapper(Executor(stream.model, 1), x), expected)
        with pytest.raises(torch.OutOfMemoryError):
            wrapper(Executor(stream.model, 1), x)
        assert same(wrapper(Executor(stream.model, 0), x), expected)
        stream.cleanup()


def test_weights_replaced_by_others_are_fetched_anew() -> None:
    model, plain = patcher(), patcher()
    stream = streamed(model)
    sample(stream)
    for each in (model, plain):
        block = each.model.diffusion_model.single_blocks[0]
        block.up.weight = nn.Parameter(torch.ones_like(block.up.weight), requires_grad=False)
    assert same(sample(stream), sample(plain))


def _compiled(model: Any) -> None:
    model.model_options["torch_compile_kwargs"] = {}


def _hooked(model: Any) -> None:
    model.hook_patches = {"hook": {}}


def _replaced(model: Any) -> None:
    model.add_object_patch("diffusion_model.single_blocks.0", Block())


@pytest.mark.parametrize(
    ("change", "words"),
    [(_compiled, "compiled"), (_hooked, "hooks"), (_replaced, "module of its own")],
)
def test_what_cannot_stream_runs_plain_and_says_why(change: Any, words: str) -> None:
    torch.manual_seed(1)
    stream = streamed(patcher())
    sample(stream)
    other = stream.clone()
    change(other)
    assert words in str(other.why_not())
    sample(other)
    assert residency(other).stream is None
    assert words in str(residency(other).passed_by)
    assert same(sample(stream), sample(patcher()))


def test_foreign_patchers_and_networks_are_refused() -> None:
    class GGUFModelPatcher(type(patcher())):  # type: ignore[misc]
        """Another pack's patcher."""

    model = patcher()
    model.__class__ = GGUFModelPatcher
    with pytest.raises(NotStreamableError, match="GGUFModelPatcher"):
        stream_model(model, Settings())

    class WanAnimate2Model(Flux):
        """Its blocks are not run by forward."""

    with pytest.raises(NotStreamableError, match="WanAnimate2Model"):
        stream_model(patcher(WanAnimate2Model), Settings())
    with pytest.raises(NotStreamableError, match="no repeated blocks"):
        stream_model(patcher(nn.Identity), Settings())


def test_dynamic_vram_is_left_by_the_official_door() -> None:
    class Dynamic(type(patcher())):  # type: ignore[misc]
        """As ComfyUI's default on NVIDIA."""

        def is_dynamic(self) -> bool:
            return True

    model = patcher()
    model.__class__ = Dynamic
    model.add_patches(difference(model, KEY, 0.25))
    expected = patcher()
    expected.add_patches(difference(expected, KEY, 0.25))
    stream = streamed(model)
    assert stream.model is not model.model
    assert not stream.is_dynamic()
    assert same(sample(stream), sample(expected))
    assert residency(stream).latest is not None
    model.cached_patcher_init = None
    with pytest.raises(NotStreamableError, match="load the file again"):
        streamed(model)


def test_a_private_copy_leaves_the_original_alone() -> None:
    model = patcher()
    stream = stream_model(model, settings(model), private=True)
    assert stream.model is not model.model
    assert same(sample(stream), sample(model))
    model.cached_patcher_init = None
    with pytest.raises(NotStreamableError, match="load the file again"):
        stream_model(model, settings(model), private=True)


def test_a_copy_for_another_device_is_no_dynamic_one() -> None:
    """ComfyUI's multi-GPU nodes load the file again as the loader says, which may be dynamic."""
    model, asked = patcher(), []
    load, arguments = model.cached_patcher_init

    def watched(*given: Any, disable_dynamic: bool = False) -> Any:
        asked.append(disable_dynamic)
        return load(*given, disable_dynamic=disable_dynamic)

    model.cached_patcher_init = (watched, arguments)
    stream = streamed(model)
    other = stream.deepclone_multigpu(new_load_device=CPU)
    assert asked == [True]
    assert other.cached_patcher_init == stream.cached_patcher_init == (watched, arguments)
    assert other.model is not stream.model
    expected = sample(patcher())
    assert same(sample(other), expected)
    assert same(sample(stream), expected)
    streams = [residency(m).stream for m in (other, stream)]
    assert None not in streams
    assert streams[0] is not streams[1]

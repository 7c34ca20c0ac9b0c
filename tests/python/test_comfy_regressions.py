"""What the original DGLS got wrong: one test each, which fails on its behaviour.

Goal: the list of known faults stays fixed, each by its own test.
Method: the situation of each fault, on small networks; beside it stands what the original did.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from comfy_world import (
    CPU,
    WIDTH,
    ACEStepTransformer2DModel,
    Flux,
    GeneralDIT,
    HiDreamImageTransformer2DModel,
    UNetModel,
    difference,
    free_all,
    mm,
    patcher,
    residency,
    sample,
)

import dgls_torch
from dgls_torch.comfy.attach import stream_model
from dgls_torch.comfy.containers import network_blocks
from dgls_torch.comfy.layers import Layers
from dgls_torch.comfy.nodes import DynamicSwappingLoader
from dgls_torch.comfy.residency import sizes_of
from dgls_torch.comfy.settings import LoraMode, Settings

KEY = "diffusion_model.single_blocks.0.up.weight"
OLD = {
    **{"prefetch": 1, "cpu_threading": False, "cuda_streams": False, "cuda_graphs": False},
    **{"lora_size_mb": 0, "verbose": False},
}


@pytest.fixture(autouse=True)
def _nothing_is_loaded() -> Any:
    yield
    free_all()


def swapped(model: Any, **inputs: Any) -> Any:
    """The original's second node, on a model and its own layers."""
    vram = str(sizes_of(model.model, Settings()).total_bytes * 6 // 10)
    inputs = {"vram": vram, **OLD, **inputs}
    layers = Layers(model.model.diffusion_model)
    return DynamicSwappingLoader.execute(model, layers, **inputs).args[0]


def stepped(model: Any, value: float) -> torch.Tensor:
    """What is added to the output's weight when one weight becomes ``value`` everywhere."""
    made = model.clone()
    made.add_patches(difference(made, KEY, value))
    return sample(made)


@pytest.mark.parametrize("mode", list(LoraMode))
def test_a_lora_is_applied_once(mode: LoraMode) -> None:
    """The original: 4.0 became 8.0 after a partial unload, patched master plus patch at use."""
    expected = stepped(patcher(), 4.0)
    model = swapped(patcher(), lora=mode.value)
    model.add_patches(difference(model, KEY, 4.0))
    assert torch.equal(sample(model), expected)
    model.partially_unload(CPU, 1 << 40)
    assert torch.equal(sample(model), expected)
    free_all()
    assert torch.equal(sample(model), expected)


@pytest.mark.parametrize("mode", list(LoraMode))
def test_a_lora_is_gone_when_it_is_removed(mode: LoraMode) -> None:
    """The original: it stayed in the masters."""
    expected = sample(patcher())
    model = patcher()
    base = swapped(model, lora=mode.value)
    assert not torch.equal(stepped(base, 4.0), expected)
    assert torch.equal(sample(base), expected)
    assert torch.equal(sample(model), expected)


def test_patches_of_other_models_are_kept() -> None:
    """The original: each run of the node cleared the patches of every loaded model."""
    other = patcher(seed=1)
    other.add_patches(difference(other, KEY, 1.0))
    expected = sample(other)
    model = patcher()
    model.add_patches(difference(model, KEY, 2.0))
    for _ in range(2):
        sample(swapped(model))
        assert KEY in other.patches
        assert KEY in model.patches
        assert torch.equal(sample(other), expected)


def test_no_block_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original: a block that did not fit returned its input, and the picture was wrong."""
    expected = sample(patcher(), passes=1)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(dgls_torch, "stream", full)
    model = swapped(patcher())
    assert torch.equal(sample(model, passes=1), expected)
    net = model.model.diffusion_model
    assert [block.runs for _, block in network_blocks(net)] == [1] * 6


def test_blocks_with_keywords_only() -> None:
    """The original: TypeError, as it passed None for the first argument."""
    model = swapped(patcher(ACEStepTransformer2DModel))
    assert torch.equal(sample(model), sample(patcher(ACEStepTransformer2DModel)))
    assert residency(model).latest.report().uses > 0  # type: ignore[union-attr]


def test_the_second_loader_leaves_the_first_alone() -> None:
    """The original: one set of globals; the second model un-swapped the first."""
    high, low = swapped(patcher(seed=1)), swapped(patcher(seed=2))
    for seed, model in ((1, high), (2, low), (1, high), (2, low)):
        assert torch.equal(sample(model), sample(patcher(seed=seed)))
    for model in (high, low):
        stream = residency(model).stream
        assert stream is not None
        assert stream.report().uses == 2 * 2 * 6


@pytest.mark.timeout(60)
def test_without_cuda_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original: an endless loop at the first stage."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = swapped(patcher(), vram="auto")
    assert torch.equal(sample(model), sample(patcher()))


def test_blocks_in_a_dict_are_modules() -> None:
    """The original: the dict's keys, which have no state_dict."""
    layers = Layers(patcher(GeneralDIT).model.diffusion_model)
    assert [type(layer).__name__ for layer in layers] == ["Block"] * 4
    assert layers.names == tuple(f"blocks.block{n}" for n in range(4))


def test_a_unet_is_really_streamed() -> None:
    """The original: wrapped sequences whose forward is never called, and said nothing."""
    model = swapped(patcher(UNetModel))
    assert torch.equal(sample(model, passes=1), sample(patcher(UNetModel), passes=1))
    report = residency(model).latest.report()  # type: ignore[union-attr]
    assert report.uses == 7
    assert report.plan.streamed_bytes > 0


def test_both_halves_of_a_model_are_found() -> None:
    """The original: the alphabetically first container only."""
    layers = Layers(patcher(HiDreamImageTransformer2DModel).model.diffusion_model)
    assert len(layers) == 4
    assert layers.names[0].startswith("double")
    assert layers.names[-1].startswith("single")


def test_the_node_runs_again_on_the_same_layers() -> None:
    """The original: flags left on the layers kept them from ever being wrapped again."""
    model = patcher()
    for _ in range(3):
        made = swapped(model)
        sample(made)
        assert residency(made).latest.report().uses == 2 * 6  # type: ignore[union-attr]
        del made
        gc.collect()


def test_a_node_that_is_collected_ends_nothing() -> None:
    """The original: its node's __del__ cleared the state of whoever was live."""
    first, second = swapped(patcher(seed=1)), swapped(patcher(seed=2))
    sample(first)
    sample(second)
    del first
    gc.collect()
    assert residency(second).stream is not None
    assert torch.equal(sample(second), sample(patcher(seed=2)))


def test_activations_are_not_copied() -> None:
    """The original: each tensor argument was cloned at each block."""
    model = swapped(patcher())
    net = model.model.diffusion_model
    addresses: list[int] = []
    hook = net.first.register_forward_hook(lambda _, __, out: addresses.append(out.data_ptr()))
    sample(model, passes=1)
    hook.remove()
    assert net.double_blocks[0].address == addresses[0]


def test_weights_that_comfyui_moved_are_noticed() -> None:
    """The original: its cache trusted itself, and took stale weights for present ones."""
    model = patcher()
    stream = swapped(model)
    sample(stream)
    free_all()
    with torch.no_grad():
        for param in model.model.diffusion_model.single_blocks[1].parameters():
            param.mul_(2)
    other = patcher()
    with torch.no_grad():
        for param in other.model.diffusion_model.single_blocks[1].parameters():
            param.mul_(2)
    assert torch.equal(sample(stream), sample(other))


def test_device_memory_is_given_back_at_unload() -> None:
    """The original: its slots stayed, unknown to ComfyUI."""
    model = swapped(patcher())
    sample(model)
    assert residency(model).held_bytes > 0
    free_all()
    assert residency(model).held_bytes == 0
    assert model.loaded_size() == 0


def test_parameters_keep_their_identity() -> None:
    """The original: two new Parameter objects for each weight in each cycle."""
    model = swapped(patcher())
    before = [id(p) for p in model.model.parameters()]
    seen: list[list[int]] = []
    block = model.model.diffusion_model.double_blocks[0]
    hook = block.up.register_forward_pre_hook(
        lambda *_: seen.append([id(p) for p in model.model.parameters()])
    )
    sample(model, passes=1)
    hook.remove()
    assert seen == [before]
    assert [id(p) for p in model.model.parameters()] == before


def test_keys_are_all_there_while_streaming() -> None:
    """Proxies in place of blocks hid their keys, and later LoRAs of plain workflows were lost."""
    model = patcher(Flux)
    sample(swapped(model))
    expected = stepped(patcher(Flux), 1.0)
    assert torch.equal(stepped(model, 1.0), expected)


def test_a_budget_counts_everything_once() -> None:
    """The original: asked for 2.2 times the model, and subtracted loaded models twice."""
    model = patcher()
    sizes = sizes_of(model.model, Settings())
    stream = stream_model(model, Settings(vram_bytes=sizes.total_bytes // 2))
    assert stream.model_size() <= sizes.total_bytes // 2
    sample(stream, x=torch.zeros(1, WIDTH))
    assert stream.loaded_size() <= sizes.total_bytes // 2
    assert stream in mm.loaded_models()

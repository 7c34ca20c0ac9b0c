"""The patcher: pictures are ComfyUI's own, accounting is honest, and no one else is disturbed.

Goal: whatever is loaded, cloned, patched, freed, interrupted or dropped in whatever order, a
streamed model computes what a plain one does, and a plain one finds the model as if never streamed.
Method: small networks in a fake ComfyUI (or a real one, see comfy_world); results are compared bit
for bit with a plain model of the same weights.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from comfy_world import (
    CPU,
    NETWORKS,
    WIDTH,
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

from dgls_torch.blocks import layers_of
from dgls_torch.comfy.attach import stream_model
from dgls_torch.comfy.containers import is_operation, network_blocks
from dgls_torch.comfy.residency import sizes_of
from dgls_torch.comfy.settings import LoraMode, Settings

KEY = "diffusion_model.double_blocks.1.up.weight"


@pytest.fixture(autouse=True)
def _nothing_is_loaded() -> Any:
    yield
    free_all()


UNITS = pytest.mark.parametrize("unit", ["block", "layer"])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
@UNITS
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_in_every_budget(kind: Any, unit: str, share: float) -> None:
    expected = sample(patcher(kind))
    model = patcher(kind)
    before = bits(model)
    stream = streamed(model, share, unit=unit)
    for _ in range(2):
        assert same(sample(stream), expected)
    report = residency(stream).stream.report()  # type: ignore[union-attr]
    assert report.uses == 2 * 2 * len(report.plan.blocks)
    assert report.plan.streamed_bytes > 0
    assert same(sample(model), expected)
    assert residency(model).stream is None
    assert bits(model) == before


def test_the_input_is_not_changed() -> None:
    model = patcher()
    kind, uuid = type(model), model.patches_uuid
    stream = streamed(model)
    assert type(model) is kind
    assert model.patches_uuid == uuid
    assert model.attachments == {}
    assert stream.model is model.model
    assert stream.patches_uuid != uuid


def test_nothing_is_hooked_outside_of_a_run() -> None:
    model = patcher()
    stream = streamed(model)
    sample(stream)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.model.modules())
    assert residency(stream).stream is not None


@pytest.mark.parametrize("mode", list(LoraMode))
@pytest.mark.parametrize("before", [True, False])
@UNITS
def test_a_lora_before_or_after(mode: LoraMode, before: bool, unit: str) -> None:
    plain = patcher().clone()
    plain.add_patches(difference(plain, KEY, 0.25), 0.5)
    expected = sample(plain)
    model = patcher()
    assert not same(expected, sample(model))
    made = model.clone()
    if before:
        made.add_patches(difference(made, KEY, 0.25), 0.5)
    made = streamed(made, lora=mode, unit=unit)
    if not before:
        made = made.clone()
        made.add_patches(difference(made, KEY, 0.25), 0.5)
    assert same(sample(made), expected)
    assert same(sample(made), expected)


PARTS = [("first.weight", "block"), ("double_blocks.1.norm.weight", "layer")]


@pytest.mark.parametrize(("part", "unit"), PARTS)
def test_a_lora_of_a_resident_part(part: str, unit: str) -> None:
    key = f"diffusion_model.{part}"
    plain = patcher()
    plain.add_patches(difference(plain, key, 0.1))
    stream = streamed(patcher(), unit=unit)
    stream.add_patches(difference(stream, key, 0.1))
    assert same(sample(stream), sample(plain))


def test_layers_leave_the_rest_of_a_block_to_comfyui() -> None:
    model = patcher()
    stream = streamed(model, 0.0, unit="layer")
    net, sizes = model.model.diffusion_model, sizes_of(model.model, Settings())
    assert sample(stream) is not None
    plan = residency(stream).stream.plan  # type: ignore[union-attr]
    layers = [f"{n}.{layer}" for n, _ in network_blocks(net) for layer in ("up", "down")]
    assert [block.name for block in plan.blocks] == layers
    assert plan.vram_bytes < sizes.least_bytes, "less than a block is enough"
    block = net.double_blocks[0]
    assert block.norm.comfy_patched_weights, "loaded by ComfyUI"
    assert not hasattr(block.norm, "prev_comfy_cast_weights")
    assert hasattr(block.up, "prev_comfy_cast_weights"), "cast at use, as offloaded ones are"


def test_blocks_after_layers_and_layers_after_blocks() -> None:
    model = patcher()
    expected = sample(model)
    before = bits(model)
    for unit in ("block", "layer", "block"):
        stream = streamed(model, unit=unit)  # kept: what is dropped gives all back
        assert same(sample(stream), expected)
        names = {b.name for b in residency(model).stream.plan.blocks}  # type: ignore[union-attr]
        assert ("double_blocks.0.up" in names) == (unit == "layer")
    assert same(sample(model), expected)
    assert bits(model) == before


def test_an_operation_of_comfyuis_own_is_a_layer() -> None:
    """Its layer for mixed precision is none of torch's."""

    class Own(nn.Module):
        comfy_cast_weights = False

        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(shape))

    block = nn.ModuleDict({"norm": Own(8), "matrix": Own(8, 8), "plain": nn.LayerNorm(8)})
    assert [name for name, _ in layers_of([("b", block)], is_operation)] == ["b.matrix"]


def test_a_change_of_lora_keeps_what_is_on_the_device() -> None:
    stream = streamed(patcher(), 0.95)
    sample(stream)
    first = residency(stream).stream
    assert first is not None
    resident = sum(b.resident_bytes for b in first.plan.blocks)
    copied = first.report().h2d_bytes_total
    other = stream.clone()
    other.add_patches(difference(other, KEY, 0.25))
    sample(other)
    assert residency(other).stream is first
    assert first.report().h2d_bytes_total - copied < resident


def test_accounting_says_what_is_held() -> None:
    model = patcher()
    wanted = settings(model)
    stream = stream_model(model, wanted)
    total = mm.module_size(model.model)
    assert stream.model_size() <= wanted.vram_bytes < total
    assert stream.loaded_size() == 0
    sample(stream)
    held = residency(stream).held_bytes
    assert 0 < held <= wanted.vram_bytes
    assert held < stream.loaded_size() <= wanted.vram_bytes
    # Else ComfyUI would make room for the difference before every run.
    assert stream.model_size() == stream.loaded_size()
    free_all()
    assert stream.loaded_size() == 0
    assert residency(stream).stream is None


@pytest.mark.parametrize("share", [0.2, 0.5, 10.0])
def test_memory_asked_back_is_given(share: float) -> None:
    model = patcher()
    expected = sample(patcher())
    stream = streamed(model, 0.9)
    sample(stream)
    loaded, held = stream.loaded_size(), residency(stream).held_bytes
    freed = stream.partially_unload(CPU, int(share * held))
    assert freed >= min(share, 1) * held
    assert stream.loaded_size() == loaded - freed
    assert residency(stream).held_bytes == held - freed
    assert same(sample(stream), expected)


def test_small_requests_in_a_row_make_one_plan() -> None:
    """ComfyUI asks for what it lacks, again and again; each other plan locks and fetches anew."""
    stream = streamed(patcher(), 0.9)
    sample(stream)
    plan: Any = residency(stream).stream.plan  # type: ignore[union-attr]
    held = residency(stream).held_bytes
    total = plan.outside_bytes + plan.block_bytes
    freed = stream.partially_unload(CPU, 1000)
    assert total // 16 <= freed < held
    assert residency(stream).held_bytes == held - freed
    assert same(sample(stream), sample(patcher()))
    # Down to the least, but not further than that for the sake of a step.
    least = plan.least_vram_bytes
    stream = streamed(patcher(), 0.0)
    sample(stream)
    now = residency(stream).stream
    assert now is not None
    assert now.plan.vram_bytes == least
    stream = stream_model(patcher(), settings(patcher(), (least + 5000) / total))
    sample(stream)
    stream.partially_unload(CPU, 100)
    assert residency(stream).stream is not None


def test_memory_is_given_back_in_the_middle_of_a_run() -> None:
    model, x = patcher(), torch.ones(3, WIDTH)
    expected = sample(patcher(), x=x)
    stream = streamed(model, 0.9)
    with torch.inference_mode():
        mm.load_models_gpu([stream])
        stream.pre_run()
        assert same(model.model.diffusion_model(x), expected)
        stream.partially_unload(CPU, residency(stream).held_bytes // 2)
        assert same(model.model.diffusion_model(x), expected)
        stream.partially_unload(CPU, 1 << 40)
        assert residency(stream).stream is None
        assert same(model.model.diffusion_model(x), expected)
        stream.cleanup()


def test_the_same_run_again_keeps_the_stream() -> None:
    stream = streamed(patcher(), 0.9)
    sample(stream)
    first = residency(stream).stream
    sample(stream)
    clone = stream.clone()
    sample(clone)
    assert residency(stream).stream is first


def test_a_plain_run_takes_the_stream_off_and_the_next_puts_it_on() -> None:
    model = patcher()
    expected = sample(patcher())
    stream = streamed(model)
    for _ in range(2):
        assert same(sample(stream), expected)
        assert residency(model).stream is not None
        assert same(sample(model), expected)
        assert residency(model).stream is None


def test_a_clone_that_dies_takes_nothing_from_the_one_in_use() -> None:
    model = patcher()
    first = streamed(model)
    second = first.clone()
    sample(first)
    sample(second)
    held = residency(model).stream
    assert held is not None
    del first
    gc.collect()
    assert residency(model).stream is held
    del second
    gc.collect()
    assert residency(model).stream is None
    assert same(sample(model), sample(patcher()))


def test_a_model_that_dies_ends_its_stream() -> None:
    stream = streamed(patcher())
    sample(stream)
    held: Any = residency(stream).stream
    base = weakref.ref(stream.model)
    free_all()
    sample(stream)
    mm.current_loaded_models.clear()
    del stream
    gc.collect()
    assert base() is None
    with pytest.raises(RuntimeError, match="detached"):
        held.resume()


def test_two_models_at_once() -> None:
    expected = [sample(patcher(seed=seed)) for seed in (1, 2)]
    models = [streamed(patcher(seed=seed)) for seed in (1, 2)]
    for _ in range(2):
        assert [same(sample(m), e) for m, e in zip(models, expected, strict=True)] == [True, True]
    uses = [residency(m).stream.report().uses for m in models]  # type: ignore[union-attr]
    assert uses == [2 * 2 * 6] * 2


def test_two_budgets_of_one_model() -> None:
    model = patcher()
    expected = sample(patcher())
    small, large = streamed(model, 0.4), streamed(model, 0.9)
    for stream in (small, large, small, large):
        assert same(sample(stream), expected)

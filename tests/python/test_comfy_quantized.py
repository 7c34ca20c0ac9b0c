"""4-bit weights: stored in 4 bits, streamed, with LoRAs, and the same bits as not streamed.

Goal: a cast to fp4 or nf4 makes the blocks as small as it says and streams as exactly as any other.
Method: small networks in a real ComfyUI, which has the tensors; nf4 where bitsandbytes is.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from comfy_path import IS_REAL
from comfy_world import difference, free_all, patcher, residency, same, sample, streamed

from dgls_torch.comfy.casting import cast_modules
from dgls_torch.comfy.containers import network_blocks
from dgls_torch.comfy.settings import LoraMode
from dgls_torch.weights import inner_tensors

pytestmark = pytest.mark.skipif(not IS_REAL, reason="the fake has no quantised tensors")
HAS_NF4 = importlib.util.find_spec("bitsandbytes") is not None
FORMATS = [
    "fp4",
    pytest.param("nf4", marks=pytest.mark.skipif(not HAS_NF4, reason="needs bitsandbytes")),
]
KEY = "diffusion_model.double_blocks.1.up.weight"


@pytest.fixture(autouse=True)
def _nothing_is_loaded() -> Any:
    yield
    free_all()


def cast(target: str) -> Any:
    model = patcher()
    with torch.inference_mode():
        blocks = [block for _, block in network_blocks(model.model.diffusion_model)]
        done = cast_modules((m for b in blocks for m in b.modules()), [(None, target)])
    assert f"12 tensors float32 to {target}" in done
    return model


@pytest.mark.parametrize("target", FORMATS)
def test_it_is_small_and_streams_exactly(target: str) -> None:
    model = cast(target)
    weight = model.model.diffusion_model.single_blocks[0].up.weight
    held = sum(t.nbytes for t in inner_tensors(weight))
    assert held < 0.15 * weight.numel() * 4
    expected = sample(model)
    assert not same(expected, sample(patcher()))
    assert (expected - sample(patcher())).abs().max() < 0.5 * expected.abs().max()
    for share in (0.4, 0.7):
        stream = streamed(model, share)
        assert same(sample(stream), expected)
        assert residency(stream).stream.report().uses > 0  # type: ignore[union-attr]
    assert same(sample(model), expected)


@pytest.mark.parametrize("mode", list(LoraMode))
@pytest.mark.parametrize("target", FORMATS)
def test_a_lora_comes_and_goes(target: str, mode: LoraMode) -> None:
    model = cast(target)
    plain = sample(model)
    made = streamed(model, 0.6, lora=mode).clone()
    made.add_patches(difference(made, KEY, 0.25), 0.5)
    changed = sample(made)
    assert not same(changed, plain)
    if mode is LoraMode.BAKED:
        whole = model.clone()
        whole.add_patches(difference(whole, KEY, 0.25), 0.5)
        assert same(sample(whole), changed)
    assert same(sample(streamed(model, 0.6)), plain)
    assert same(sample(model), plain)


@pytest.mark.skipif(HAS_NF4, reason="bitsandbytes is here")
def test_without_bitsandbytes_one_sentence_says_what_is_needed(caplog: Any) -> None:
    model = patcher()
    block = model.model.diffusion_model.single_blocks[0]
    done = cast_modules(block.modules(), [(None, "nf4")])
    assert "float32 to bfloat16" in done
    assert "NF4 needs the package bitsandbytes, which is not installed" in caplog.text

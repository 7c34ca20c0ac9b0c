"""The nodes: the original's ids and inputs, true effects, and errors that say what is allowed.

Goal: saved workflows load unchanged; each input acts, or its tooltip says why it does not.
Method: schemas are compared with what the original documents; nodes are executed on small models.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import comfy.sd
import folder_paths
import pytest
import torch
from comfy_world import IS_REAL, WIDTH, Flux, UNetModel, free_all, patcher, residency, sample

from dgls_torch.comfy import tooltips
from dgls_torch.comfy.cast_grammar import parse_cast_target
from dgls_torch.comfy.casting import cast_modules
from dgls_torch.comfy.extension import DGLSExtension
from dgls_torch.comfy.layers import Layers, parse_indices
from dgls_torch.comfy.nodes import DGLSModelLoader, DGLSStream, DynamicSwappingLoader
from dgls_torch.comfy.residency import sizes_of
from dgls_torch.comfy.service_nodes import DGLSCleanup, DGLSReport
from dgls_torch.comfy.settings import Settings, parse_vram

pytestmark = pytest.mark.skipif(IS_REAL, reason="nodes of a real ComfyUI are run over HTTP")
OLD = {
    **{"prefetch": 1, "cpu_threading": False, "cuda_streams": False, "cuda_graphs": False},
    **{"lora_size_mb": 0, "verbose": False},
}


@pytest.fixture(autouse=True)
def _files(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(folder_paths, "names", {"flux.safetensors": "/flux"})
    monkeypatch.setattr(comfy.sd, "files", {"/flux": patcher, "/unet": lambda: patcher(UNetModel)})
    yield
    free_all()


def fields(node: Any) -> dict[str, dict[str, Any]]:
    return {f.id: f.options for f in node.define_schema().fields["inputs"]}


def load(**inputs: Any) -> Any:
    given = {
        **{"model_name": "flux.safetensors", "model_type": "default", "cast_dtype": "default"},
        **{"full_cast": "disabled", "clear_model_cache": False, "verbose": False},
        **inputs,
    }
    return DGLSModelLoader.execute(**given).args


def swap(model: Any, layers: Any, **inputs: Any) -> Any:
    return DynamicSwappingLoader.execute(model, layers, **{**OLD, **inputs}).args[0]


def vram_of(model: Any, share: float = 0.6) -> str:
    return str(int(share * sizes_of(model.model, Settings()).total_bytes))


def test_ids_names_and_categories() -> None:
    nodes = asyncio.run(DGLSExtension().get_node_list())
    schemas = {n.define_schema().node_id: n.define_schema().fields for n in nodes}
    assert {k: v["display_name"] for k, v in schemas.items()} == {
        "DGLSModelLoader": "DGLS Model Loader",
        "DynamicSwappingLoader": "DGLS Swapping Loader",
        "DGLSStream": "DGLS Stream",
        "DGLSReport": "DGLS Report",
        "DGLSCleanup": "DGLS Cleanup",
    }
    assert {v["category"] for v in schemas.values()} == {"loaders"}
    assert schemas["DGLSCleanup"]["is_output_node"]


def test_the_originals_inputs_and_defaults() -> None:
    loader, swapper = fields(DGLSModelLoader), fields(DynamicSwappingLoader)
    assert list(loader) == [
        *("model_name", "model_type", "cast_dtype", "full_cast", "clear_model_cache"),
        *("verbose", "nuke_all_caches"),
    ]
    assert loader["model_name"]["options"] == ["flux.safetensors"]
    assert loader["model_type"]["options"] == ["default", "hunyuan", "unet"]
    assert loader["cast_dtype"]["options"] == [
        *("default", "disabled", "fp32", "fp16", "bf16"),
        *("fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"),
    ]
    assert loader["full_cast"]["options"] == [
        *("disabled", "fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "nf4", "fp4"),
    ]
    assert list(swapper) == [
        *("model", "layers", "prefetch", "cpu_threading", "cuda_streams", "cuda_graphs"),
        *("lora_size_mb", "verbose", "gpu_layer_indices", "cast_target", "vram", "lora"),
    ]
    ranges = {n: (f["default"], f["min"], f["max"]) for n, f in swapper.items() if "min" in f}
    assert ranges == {"prefetch": (1, 0, 100), "lora_size_mb": (0, 0, 10000)}
    for name in ("cpu_threading", "cuda_streams", "cuda_graphs", "verbose"):
        assert swapper[name]["default"] is False
    # An API prompt gets no defaults: what the original lacks must be optional.
    for name in ("gpu_layer_indices", "cast_target", "vram", "lora"):
        assert swapper[name]["optional"]
    assert list(fields(DGLSCleanup)) == ["trigger", "use_comfy_clear", "verbose"]
    assert fields(DGLSCleanup)["verbose"]["default"] is True


def test_every_input_has_a_tooltip() -> None:
    for node in asyncio.run(DGLSExtension().get_node_list()):
        for name, options in fields(node).items():
            assert len(options["tooltip"]) > 20, f"{node.__name__}: {name}"
    for name in ("cpu_threading", "cuda_streams", "cuda_graphs"):
        assert tooltips.NO_EFFECT in tooltips.SWAPPER[name]


def test_load_and_swap() -> None:
    model, layers = load()
    assert isinstance(layers, list)
    assert [id(m) for m in layers] == [
        id(m)
        for m in [
            *model.model.diffusion_model.double_blocks,
            *model.model.diffusion_model.single_blocks,
        ]
    ]
    made = swap(model, layers, vram=vram_of(model))
    assert torch.equal(sample(made), sample(patcher()))
    assert residency(made).latest.plan.streamed_bytes > 0  # type: ignore[union-attr]


def test_layers_of_a_plain_list_work_too() -> None:
    model, layers = load()
    made = swap(model, list(layers), vram=vram_of(model))
    assert torch.equal(sample(made), sample(patcher()))


@pytest.mark.parametrize("prefetch", [0, 1, 100])
def test_indices_choose_what_stays(prefetch: int) -> None:
    model, layers = load()
    made = swap(model, layers, gpu_layer_indices="0, 4", prefetch=prefetch)
    assert torch.equal(sample(made), sample(patcher()))
    plan = residency(made).latest.plan  # type: ignore[union-attr]
    assert {b.name for b in plan.blocks} == {
        *("double_blocks.1", "double_blocks.2", "single_blocks.0", "single_blocks.2")
    }
    largest = max(b.resident_bytes + b.streamed_bytes for b in plan.blocks)
    room = min(prefetch + 1, 4) * largest
    assert room // 2 < plan.arena_bytes <= room
    if prefetch == 100:
        assert plan.streamed_bytes == 0


def test_indices_of_all_leave_the_model_alone() -> None:
    model, layers = load()
    assert swap(model, layers, gpu_layer_indices="0,1,2,3,4,5") is model


@pytest.mark.parametrize("text", ["6", "0,6", "-1", "a", "1.5", "0;1", "²"])
def test_bad_indices(text: str) -> None:
    model, layers = load()
    with pytest.raises(ValueError, match=r"gpu_layer_indices is .*Must be 0-5"):
        swap(model, layers, gpu_layer_indices=text)


def test_empty_indices_are_the_planners() -> None:
    assert parse_indices("", ["a"]) is None
    assert parse_indices("  ", ["a"]) is None
    assert parse_indices("1,0, 1,", ["a", "b"]) == ("a", "b")


def test_layers_of_another_model() -> None:
    model, layers = load()
    other = patcher(UNetModel)
    with pytest.raises(ValueError, match=r"layers lists 6 blocks of a Flux.*UNetModel"):
        swap(other, layers)
    with pytest.raises(ValueError, match="layers lists 7 modules, of which 7"):
        swap(model, list(Layers(other.model.diffusion_model)))


@pytest.mark.parametrize("name", ["missing.safetensors", "words.safetensors"])
def test_bad_files(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "names", {"words.safetensors": "/words"})
    with pytest.raises(ValueError, match=f"model_name is '{name}'.*allowed is"):
        load(model_name=name)


@pytest.mark.parametrize("model_type", ["default", "hunyuan", "unet"])
def test_model_types(model_type: str) -> None:
    model, _ = load(model_type=model_type)
    assert torch.equal(sample(model), sample(patcher()))
    again = model.clone(force_deepcopy=True)
    assert again.model is not model.model


def test_caches_are_cleared() -> None:
    from server import PromptServer

    other = patcher(seed=1)
    sample(other)
    load(clear_model_cache=True)
    assert other.loaded_size() == 0
    sample(other)
    load(nuke_all_caches=True)
    assert other.loaded_size() == 0
    assert PromptServer.instance.prompt_queue.flags["free_memory"] is True


@pytest.mark.parametrize("cast", ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"])
def test_full_cast_is_real_and_repeatable(cast: str) -> None:
    model, layers = load(full_cast=cast)
    plain = patcher()
    kept, was = residency(model), model.model.state_dict()
    small = sum(t.numel() * t.element_size() for t in was.values())
    assert small < 0.6 * sum(t.numel() * 4 for t in was.values())
    assert was["diffusion_model.double_blocks.0.norm.weight"].dtype is torch.float32
    expected = sample(model)
    assert not torch.equal(expected, sample(plain))
    assert torch.isfinite(expected).all()
    made = swap(model, layers, vram=vram_of(model))
    assert torch.equal(sample(made), expected)
    assert kept is residency(made)
    assert torch.equal(sample(model.clone(force_deepcopy=True)), expected)


def test_cast_target_casts_a_copy_of_the_streamed_layers_only() -> None:
    model, layers = load()
    made = swap(
        model, layers, vram=vram_of(model), gpu_layer_indices="0", cast_target="f16 f32, f32 bf16"
    )
    state, before = made.model.state_dict(), model.model.state_dict()
    assert state["diffusion_model.double_blocks.1.up.weight"].dtype is torch.bfloat16
    assert state["diffusion_model.double_blocks.1.norm.weight"].dtype is torch.float32
    for kept in ("double_blocks.0.up", "first"):
        assert state[f"diffusion_model.{kept}.weight"].dtype is torch.float32
    assert {t.dtype for t in before.values()} == {torch.float32}
    assert not torch.equal(sample(made), sample(model))


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("", ()),
        ("f32 f16", ((torch.float32, torch.float16),)),
        ("torch.float32 half", ((torch.float32, torch.float16),)),
        (
            "bf16 f16, f32 bf16",
            ((torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)),
        ),
        ("float f8_e4m3,", ((torch.float32, torch.float8_e4m3fn),)),
        ("fp32 e5m2", ((torch.float32, torch.float8_e5m2),)),
        ("float32 float8_e4m3fn", ((torch.float32, torch.float8_e4m3fn),)),
        ("BF16 NF4", ((torch.bfloat16, "nf4"),)),
        ("bfloat16 fp4", ((torch.bfloat16, "fp4"),)),
    ],
)
def test_the_grammar_of_cast_target(text: str, pairs: Any) -> None:
    assert parse_cast_target(text) == pairs


@pytest.mark.parametrize("text", ["f32", "f32 f16 bf16", "f32 f12", "x f16", "nf4 f16"])
def test_bad_cast_targets(text: str) -> None:
    with pytest.raises(ValueError, match=r"cast_target is .*allowed"):
        parse_cast_target(text)


def test_four_bits_that_cannot_be_stored_become_bf16(caplog: pytest.LogCaptureFixture) -> None:
    net = patcher(Flux).model.diffusion_model
    block = net.double_blocks[0]
    with caplog.at_level(logging.WARNING):
        cast_modules(block.modules(), [(torch.float32, "nf4")])
    assert block.up.weight.dtype is torch.bfloat16
    assert "bf16 instead of nf4" in caplog.text


@pytest.mark.parametrize("vram", ["-1GiB", "eight", "0", "4", "nan", "1e40", "8 apples"])
def test_bad_vram(vram: str) -> None:
    with pytest.raises(ValueError, match=r'vram .*"auto"'):
        DGLSStream.execute(patcher(), vram=vram)


def test_vram_in_words() -> None:
    assert parse_vram("auto") is None
    assert parse_vram("") is None
    assert parse_vram("8GiB") == 8 << 30


def test_a_model_that_cannot_stream_is_passed_through(caplog: pytest.LogCaptureFixture) -> None:
    model = patcher(torch.nn.Identity)
    with caplog.at_level(logging.WARNING):
        assert DGLSStream.execute(model).args[0] is model
    assert "passed through" in caplog.text


def test_layers_by_the_node(caplog: pytest.LogCaptureFixture) -> None:
    model = patcher()
    made = DGLSStream.execute(model, vram=vram_of(model), unit="layer").args[0]
    assert torch.equal(sample(made), sample(patcher()))
    sample(made)
    blocks = residency(made).stream.plan.blocks  # type: ignore[union-attr]
    assert {block.name.rpartition(".")[2] for block in blocks} == {"up", "down"}

    class Norms(Flux):
        """Blocks without a layer."""

        def __init__(self) -> None:
            super().__init__()
            self.double_blocks = self.single_blocks = torch.nn.ModuleList(
                torch.nn.LayerNorm(WIDTH) for _ in range(4)
            )

    model = patcher(Norms)
    with caplog.at_level(logging.WARNING):
        assert DGLSStream.execute(model, unit="layer").args[0] is model
    assert 'passed through as it is: unit="layer" needs blocks that hold layers' in caplog.text


@pytest.mark.parametrize("use_comfy_clear", [True, False])
def test_cleanup(use_comfy_clear: bool) -> None:
    model = patcher()
    made = DGLSStream.execute(model, vram=vram_of(model)).args[0]
    sample(made)
    thing = object()
    assert DGLSCleanup.execute(thing, use_comfy_clear=use_comfy_clear).args == (thing,)
    assert residency(made).held_bytes == 0
    assert (made.loaded_size() == 0) == use_comfy_clear
    assert torch.equal(sample(made), sample(patcher()))


def test_the_report() -> None:
    model = patcher()
    made = DGLSStream.execute(model, vram=vram_of(model)).args[0]
    before = DGLSReport.execute(made)
    assert "not streamed" in before.args[0]
    sample(made, passes=4)
    output = DGLSReport.execute(made, after=object())
    assert output.ui["text"] == [output.args[0]]
    data = json.loads(output.ui["dgls_report"][0])
    assert data["reason"] is None
    assert data["passes"] == 4
    assert len(data["blocks"]) == 6
    assert {use[1] for use in data["timeline"]} == {2, 3}
    assert all(use[5] <= use[6] <= use[7] for use in data["timeline"])
    assert DGLSReport.fingerprint_inputs(model=made) != DGLSReport.fingerprint_inputs(model=made)
    sample(patcher(), x=torch.zeros(1, WIDTH))
    free_all()
    assert "unloaded since" in DGLSReport.execute(made).args[0]


def test_the_report_says_why_a_model_was_passed_through() -> None:
    """It said that the model was not sampled yet, also after it was."""

    class GGUFModelPatcher(type(patcher())):  # type: ignore[misc]
        """Another pack's patcher."""

    model = patcher()
    model.__class__ = GGUFModelPatcher
    made = DGLSStream.execute(model).args[0]
    assert made is model
    sample(made)
    text = DGLSReport.execute(made).args[0]
    assert "is not streamed: it comes with a patcher of its own (GGUFModelPatcher)" in text
    assert len(text.splitlines()) == 1

"""Blocks found by the names in a weight file, and plans of modules that are not attached.

Goal: a file gives the blocks of the model it is of, in the order they run, whatever the names are
like; a plan of a module is what stream() would find, and leaves no trace.
Method: headers of known models without data; the same model as a file and as a module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from helpers import Snapshot, net
from plan_files import Shapes, diffusers_flux, flux, linear, merged, shard, unet, write
from safetensors.torch import save_file
from torch import nn

import dgls_torch
from dgls_torch.config import StreamConfig
from dgls_torch.files import SafetensorsSource
from dgls_torch.planner.sizes import ModelSizes, sizes_of
from dgls_torch.planner.skeleton import checkpoint

if TYPE_CHECKING:
    from pathlib import Path

CPU = StreamConfig(device="cpu")


def found(path: Path, **fields: object) -> ModelSizes:
    source, config = SafetensorsSource(path), CPU.replace(**fields)
    return sizes_of(checkpoint(source, layers=config.unit == "layer")[0], config)


def names(shapes: Shapes, folder: Path) -> list[str]:
    return [block.name for block in found(write(folder / "model.safetensors", shapes)).blocks]


def test_flux_is_found_whole_in_pieces_and_in_a_checkpoint(tmp_path: Path) -> None:
    wanted = [f"double_blocks.{k}" for k in range(19)] + [f"single_blocks.{k}" for k in range(38)]
    whole = found(write(tmp_path / "flux.safetensors", flux()))
    assert [block.name for block in whole.blocks] == wanted
    # As published: 339.8 and 141.6 million parameters in a block, a little less without norms.
    assert sum(whole.blocks[0].tensor_bytes) == pytest.approx(2 * 339.83e6, rel=1e-4)
    assert sum(whole.blocks[-1].tensor_bytes) == pytest.approx(2 * 141.59e6, rel=1e-4)
    assert whole.blocks[0].matrix_elements == 36 * 3072**2
    assert whole.outside_bytes == 2 * (3072 * 65 + 3072 * 4097 + 64 * 3073)
    (tmp_path / "pieces").mkdir()
    pieces = shard(tmp_path / "pieces", flux())
    assert found(pieces) == found(pieces.parent) == whole

    others = merged(linear(f"text_encoders.t5.block.{k}", 4096, 4096) for k in range(24))
    path = write(tmp_path / "all.safetensors", flux("model.diffusion_model.") | others)
    assert found(path) == whole
    assert checkpoint(SafetensorsSource(path))[1] == 2 * 24 * 4096 * 4097


def test_blocks_come_in_the_order_they_run(tmp_path: Path) -> None:
    wanted = [f"transformer_blocks.{k}" for k in range(3)]
    wanted += [f"single_transformer_blocks.{k}" for k in range(4)]
    assert names(diffusers_flux(), tmp_path) == wanted
    # Eleven and more are sorted as text in files.
    many = {f"blocks.{k}.w": (64, 64) for k in range(12)}
    assert names(many, tmp_path) == [f"blocks.{k}" for k in range(12)]
    wanted = [f"input_blocks.{k}" for k in range(12)]
    assert names(unet(), tmp_path) == wanted + [f"output_blocks.{k}" for k in range(12)]
    both = {f"{kind}_blocks.{k}.w": (64, 64) for kind in ("up", "down") for k in range(2)}
    assert names(both, tmp_path) == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
    refined = {f"{kind}.{k}.w": (64, 64) for kind in ("layers", "noise_refiner") for k in range(2)}
    assert names(refined, tmp_path)[0] == "noise_refiner.0"


def test_names_of_every_kind_are_found(tmp_path: Path) -> None:
    numbered = {f"net.blocks.block{k}.w": (64, 64) for k in range(11)}
    assert names(numbered, tmp_path) == [f"net.blocks.block{k}" for k in range(11)]
    # A file may call a tensor anything, and one thing may be a tensor and hold others too.
    odd = {f"forward.{k}.train": (64, 64) for k in range(3)} | {
        "forward": (2,),
        "": (2,),
        "..": (2,),
    }
    assert names(odd, tmp_path) == [f"forward.{k}" for k in range(3)]
    assert names({f"{k}.w": (64, 64) for k in range(3)}, tmp_path) == ["0", "1", "2"]
    # Numbers at the end alone make no row of blocks.
    with pytest.raises(ValueError, match="no repeated blocks"):
        names({f"{letter}1.w": (64, 64) for letter in "abcdefgh"}, tmp_path)
    with pytest.raises(ValueError, match="no repeated blocks"):
        names({f"stages.{key}.w": (64, 64) for key in ("0", "1", "2", "norm")}, tmp_path)
    deep = {f"blocks.{k}" + ".x" * 100: (64, 64) for k in range(3)}
    with pytest.raises(ValueError, match=r"^model\.safetensors needs names of at most 64 parts"):
        names(deep, tmp_path)
    with pytest.raises(ValueError, match=r"^model\.safetensors holds no tensors$"):
        names({}, tmp_path)


def test_a_model_is_found_as_its_file_is(tmp_path: Path) -> None:
    model = net(5)
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    of_file, of_module = found(tmp_path / "net.safetensors"), sizes_of(model, CPU)
    assert of_file.outside_bytes == of_module.outside_bytes
    for ours, theirs in zip(of_file.blocks, of_module.blocks, strict=True):
        assert (ours.name, ours.matrix_elements) == (theirs.name, theirs.matrix_elements)
        assert sorted(ours.tensor_bytes) == sorted(theirs.tensor_bytes)


LAYERS = ("attention", "mlp.0", "mlp.2", "mix")


class Stage(nn.Module):
    """Every kind of layer, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False))
        self.mix = nn.Conv1d(16, 16, 3)
        self.scale = nn.Parameter(torch.zeros(4, 16))


def test_layers_of_a_file_are_those_of_its_model(tmp_path: Path) -> None:
    model = nn.ModuleDict({"head": nn.Linear(16, 16), "stages": nn.ModuleList([Stage(), Stage()])})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fields: dict[str, object] = {"blocks": ["stages"], "unit": "layer"}
    of_file = found(tmp_path / "model.safetensors", **fields)
    of_module = sizes_of(model, CPU.replace(**fields))
    assert of_file.outside_bytes == of_module.outside_bytes
    theirs = {block.name: block for block in of_module.blocks}
    layers = {f"stages.{k}.{name}" for k in (0, 1) for name in LAYERS}
    assert {block.name for block in of_file.blocks} == theirs.keys() == layers
    for ours in of_file.blocks:
        assert ours.matrix_elements == theirs[ours.name].matrix_elements
        assert sorted(ours.tensor_bytes) == sorted(theirs[ours.name].tensor_bytes)


def test_a_plan_leaves_no_trace_and_says_what_stream_would_find() -> None:
    model = net(8)
    before = Snapshot(model)
    with dgls_torch.stream(model, 1 << 30, device="cpu") as s:
        attached = s.plan
    vram = attached.outside_bytes + attached.block_bytes // 2
    planned = dgls_torch.plan(model, vram, device="cpu", h2d_bytes_per_s=1e9, compute_s=1e-3)
    before.check(model)
    assert [b.name for b in planned.blocks] == [b.name for b in attached.blocks]
    assert planned.outside_bytes == attached.outside_bytes
    assert planned.least_vram_bytes == attached.least_vram_bytes
    assert planned.vram_bytes == vram >= planned.used_bytes
    assert planned.compute_s == pytest.approx(1e-3)
    assert 0 < planned.streamed_bytes <= attached.arena_bytes
    assert planned.efficiency == pytest.approx(planned.bound_s / planned.period_s)
    assert "plan for" in str(planned)
    with pytest.raises(AttributeError):
        planned.vram_bytes = 0  # type: ignore[misc]


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = net(8)
    for fields in (
        {},
        {"compute_s": [1e-4] * 8},
        {"exclude": ["blocks.7"]},
        {"blocks": ["blocks"]},
    ):
        forecast = dgls_torch.plan(model, "1MiB", device="cpu", h2d_bytes_per_s="1GB/s", **fields)
        assert len(forecast.blocks) == (7 if "exclude" in fields else 8)
    save_file(net(8).state_dict(), tmp_path / "net.safetensors")
    path = tmp_path / "net.safetensors"
    same = dgls_torch.plan(model, "1MiB", device="cpu", source=path, h2d_bytes_per_s="1GB/s")
    assert same.blocks == dgls_torch.plan(net(8), "1MiB", device="cpu", h2d_bytes_per_s=1e9).blocks


def test_what_is_not_given_is_measured_or_unknown() -> None:
    model = net(8)
    vram = sum(p.numel() * 4 for p in model.parameters()) // 2
    measured = dgls_torch.plan(model, vram, device="cpu")
    assert measured.inputs["h2d_bytes_per_s"] > 0
    assert measured.efficiency is None
    assert "no compute time is known" in str(measured)
    told = dgls_torch.plan(model, vram, device="cpu", copy_bytes_per_s=5e8)
    assert told.inputs["h2d_bytes_per_s"] == 5e8
    fits = dgls_torch.plan(model, device="cpu", h2d_bytes_per_s=1e9, compute_s=1.0)
    assert fits.batched_s is fits.automatic_s is None
    assert fits.solution.limit == "fits"
    assert "everything fits" in str(fits)


def test_a_pipeline_shares_its_budget() -> None:
    class Pipeline:
        transformer, transformer_2 = net(8), net(4)

    vram = 1 << 20
    plans = dgls_torch.plan(Pipeline(), vram, device="cpu", h2d_bytes_per_s=1e9)
    with dgls_torch.stream(Pipeline(), vram, device="cpu") as group:
        attached = {name: plan.vram_bytes for name, plan in group.plan.items()}
    assert {name: plan.vram_bytes for name, plan in plans.items()} == attached


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vram": 1000}, r"^vram is 1000 B \(1000 bytes\), .* smallest budget that works is"),
        ({"vram": 9000}, r"^vram is .* take 8\.25 KiB, and 'blocks\.0' needs "),
        ({"h2d_bytes_per_s": 0}, "^h2d_bytes_per_s needs a rate above 0"),
        ({"compute_s": [1.0]}, "^compute_s needs one number for each of 6 blocks, got 1"),
        ({"compute_s": [1.0] * 5 + [-1.0]}, r"^compute_s\[5\] needs a time"),
        ({"compute_s": float("nan")}, "^compute_s needs a time"),
        ({"copy_latency_s": "10 parsecs"}, "^copy_latency_s needs a time"),
        ({"outside_s": -1}, "^outside_s needs a time"),
        ({"granularity": "bytes"}, "granularity"),
        ({"resident": [6]}, "resident"),
        ({"prefetch": -1}, "prefetch"),
    ],
)
def test_wrong_arguments_are_named(fields: dict[str, object], said: str) -> None:
    good = {"vram": 1 << 20, "device": "cpu", "h2d_bytes_per_s": 1e9}
    with pytest.raises(ValueError, match=said):
        dgls_torch.plan(net(6), **(good | fields))
    with pytest.raises(TypeError, match="has no field 'vrma'"):
        dgls_torch.plan(net(6), vrma=5)
    with pytest.raises(ValueError, match="no repeated blocks"):
        dgls_torch.plan(nn.Linear(2, 2), **good)

"""Weights that stream from safetensors files, for models on the CPU and on meta.

Goal: the bits of the file, from one file or many, whatever else the file holds; a file that does
not fit the model, or changes while it is in use, is an error that names tensor and file.
Method: files written by the safetensors package from a model, streamed into an empty twin of it.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import SMALL, Block, Snapshot, budgets, check, inputs, net, same, threads
from safetensors.torch import save_file
from torch import nn

import dgls_torch
from dgls_torch import native

if TYPE_CHECKING:
    from pathlib import Path


def meta(make: Any = net) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def save(model: nn.Module, folder: Path, shards: int = 1, **more: torch.Tensor) -> Path:
    """Writes one file, or several with an index; returns what ``source`` takes."""
    state = {k: v.contiguous().clone() for k, v in model.state_dict().items()} | more
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    where = {key: names[number % shards] for number, key in enumerate(state)}
    for name in names:
        save_file({k: v for k, v in state.items() if where[k] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    return index


def run(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(inputs())


def check_meta(make: Any, source: Path, expected: Any, call: Any = run, **options: Any) -> None:
    """As `helpers.check`, for a model that cannot run by itself."""
    model = meta(make)
    before = Snapshot(model)
    for size in budgets(model, source=source, **options):
        with dgls_torch.stream(model, size, source=source, **(SMALL | options)) as s:
            for _ in range(3):
                assert same(call(model), expected), s.plan
        before.check(model)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_from_one_file_or_many(kind: str, shards: int, tmp_path: Path) -> None:
    source = save(net(), tmp_path, shards)
    for path in (source, str(source), tmp_path):
        if kind == "meta":
            check_meta(net, path, run(net()))
        else:
            check(net(), run, source=path)


def test_the_file_counts_and_not_the_tensors(tmp_path: Path) -> None:
    source = save(net(seed=1), tmp_path)
    model = net(seed=0)
    want = nn.Sequential(model.first, *net(seed=1).blocks, model.last)
    before = Snapshot(model)
    with dgls_torch.stream(model, budgets(model)[0], source=source, **SMALL):
        assert same(run(model), run(want))
    before.check(model)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
)
def test_dtypes_from_files(dtype: torch.dtype, tmp_path: Path) -> None:
    class Cast(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            weight = torch.randn(width, width).mul(20).to(dtype)
            self.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x @ self.weight.to(torch.float32) / 100)

    def make() -> nn.Module:
        return net(block=Cast)

    check_meta(make, save(make(), tmp_path), run(make()))


class Rich(Block):
    """Buffers of all kinds, an empty parameter, and one that is tied inside of the block."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("scale", torch.rand(width))
        self.register_buffer("count", torch.tensor(3))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.again = nn.Linear(width, 2 * width, bias=False)
        self.again.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale + self.count) + self.again(x).sum(1, keepdim=True)


def test_buffers_empty_and_tied_parameters_on_meta(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = net(block=Rich)
        model.last.weight = model.first.weight
        return model

    check_meta(make, save(make(), tmp_path, 2), run(make()))


def test_parameters_that_lie_otherwise_than_in_the_file(tmp_path: Path) -> None:
    """The file's order counts: the bits of a product may depend on the order in memory."""
    model = net()
    for block in model.blocks:
        block.norm = nn.Linear(32, 32)
        block.norm.weight = nn.Parameter(torch.randn(32, 32).t())
    source = save(model, tmp_path)
    before = Snapshot(model)
    strides = [block.norm.weight.stride() for block in model.blocks]
    with dgls_torch.stream(model, budgets(model, source=source)[0], source=source, **SMALL):
        streamed = run(model)
    before.check(model)
    assert strides == [(1, 32)] * 6
    for block in model.blocks:
        block.norm.weight.data = block.norm.weight.data.contiguous()
    assert same(streamed, run(model))


def test_what_is_not_in_the_file_streams_from_memory(tmp_path: Path) -> None:
    model = net()
    path = tmp_path / "part.safetensors"
    save_file({k: v for k, v in model.state_dict().items() if k.endswith("up.weight")}, path)
    check(model, run, source=path)


def test_what_else_the_file_holds_does_not_matter(tmp_path: Path) -> None:
    source = save(net(), tmp_path, other=torch.ones(3), **{"blocks.9.up.weight": torch.ones(2)})
    check_meta(net, source, run(net()))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    state = net().state_dict()
    for gone in ("blocks.3.down.weight", "first.bias"):
        path = tmp_path / "model.safetensors"
        save_file({k: v for k, v in state.items() if k != gone}, path)
        model = meta()
        before = Snapshot(model)
        with pytest.raises(ValueError, match=f"'{gone}' is on the meta device and its bytes are"):
            dgls_torch.stream(model, 1 << 20, source=path, **SMALL)
        before.check(model)
        assert threads() == []
    with pytest.raises(ValueError, match=r"'blocks.0.norm.weight' is on the meta device"):
        dgls_torch.stream(meta(), 1 << 20, **SMALL)


@pytest.mark.parametrize(
    "change", [lambda t: t.half(), lambda t: t[:-1].clone(), lambda t: t[None]]
)
@pytest.mark.parametrize("name", ["blocks.2.up.weight", "last.weight"])
def test_a_tensor_of_another_kind_is_named(name: str, change: Any, tmp_path: Path) -> None:
    state = net().state_dict()
    state[name] = change(state[name]).contiguous()
    save_file(state, tmp_path / "model.safetensors")
    model = meta()
    with pytest.raises(ValueError, match=f"'{name}' is torch.float32.* in the model but torch"):
        dgls_torch.stream(model, 1 << 20, source=tmp_path, **SMALL)
    assert threads() == []


@pytest.mark.parametrize("how", ["rewritten", "truncated", "touched"])
def test_a_file_that_changes_while_it_is_in_use_is_an_error(how: str, tmp_path: Path) -> None:
    source = save(net(), tmp_path)
    model = meta()
    before = Snapshot(model)
    with dgls_torch.stream(model, budgets(model, source=source)[0], source=source, **SMALL):
        expected = run(model)
        status = os.stat(source)
        if how == "rewritten":
            source.write_bytes(bytes(status.st_size + 1))
        elif how == "truncated":
            os.truncate(source, status.st_size // 2)
        else:
            os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        for _ in range(3):
            with pytest.raises(RuntimeError, match=r"model\.safetensors failed: the file changed"):
                run(model)
        assert same(expected, run(net()))
    before.check(model)


def test_a_file_that_changes_before_it_is_in_use_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at its header and the first read of the engine."""
    source = save(net(), tmp_path)
    make = native.empty_arena

    def change(size: int, device: torch.device) -> torch.Tensor:
        save(net(seed=2), tmp_path)
        os.utime(source, ns=(1, 1))
        return make(size, device)

    monkeypatch.setattr(native, "empty_arena", change)
    model = meta()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"model\.safetensors.* changed"):
        dgls_torch.stream(model, 1 << 20, source=source, **SMALL)
    before.check(model)
    assert threads() == []


def test_a_file_that_is_deleted_or_replaced_is_still_read(tmp_path: Path) -> None:
    source = save(net(), tmp_path)
    model = meta()
    with dgls_torch.stream(model, budgets(model, source=source)[0], source=source, **SMALL):
        (tmp_path / "new").mkdir()
        os.replace(save(net(seed=3), tmp_path / "new"), source)
        assert same(run(model), run(net()))
        source.unlink()
        assert same(run(model), run(net()))


def test_files_are_closed_again(tmp_path: Path) -> None:
    source = save(net(), tmp_path, 3)
    model = meta()
    before = sorted(os.listdir("/proc/self/fd"))
    with dgls_torch.stream(model, 1 << 20, source=source, **SMALL):
        run(model)
        assert len(os.listdir("/proc/self/fd")) > len(before)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_model_on_meta_does_not_run_without_its_stream(tmp_path: Path) -> None:
    source = save(net(), tmp_path)
    model = meta()
    with dgls_torch.stream(model, 1 << 20, source=source, **SMALL):
        run(model)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(model)

"""Decides that the demo is honest: real shapes, exact files, and a verdict that can be "no".

Goal: what `python -m dgls_torch demo` claims is true of what it ran.
Method: parameters are counted on the meta device, weight files read back, tiny models run whole.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

import dgls_torch
from dgls_torch.demo import run as demo_run
from dgls_torch.demo import watch
from dgls_torch.demo.flux import DoubleStreamBlock, FluxConfig, SingleStreamBlock
from dgls_torch.demo.layers import rope_angles, rotate
from dgls_torch.demo.run import main
from dgls_torch.demo.sample import MODELS, SIZES, find_case, noise_levels
from dgls_torch.demo.wan import Wan, WanBlock, WanConfig
from dgls_torch.demo.watch import PlainBar, make_bar
from dgls_torch.demo.weights import file_bytes, write_weights

SAME = "outputs identical to the fully resident model: yes"
DIFFERENT = "outputs identical to the fully resident model: no"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads wait for each other at every small matrix when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small_model() -> nn.Module:
    """Every kind of tensor the file treats apart; the first needs two pieces and a bit."""
    with torch.device("meta"):
        layers = (nn.Linear(2048, 4100), nn.LayerNorm(48), nn.Conv3d(3, 8, 2), nn.Linear(5, 3))
        return nn.Sequential(*layers).to(torch.bfloat16)


def read(path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def demo(tmp_path, *extra: str, device: str = "cpu") -> int:
    folders = ["--dir", str(tmp_path / "weights"), "--out", str(tmp_path / "out")]
    return main(["--size", "tiny", "--device", device, *folders, *extra])


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: DoubleStreamBlock(FluxConfig()), 339_831_296),
        (lambda: SingleStreamBlock(FluxConfig()), 141_591_808),
        (lambda: WanBlock(WanConfig()), 351_394_304),
    ],
    ids=["flux double", "flux single", "wan"],
)
def test_a_real_block_has_the_real_number_of_parameters(make, count):
    with torch.device("meta"):
        assert parameters(make()) == count


@pytest.mark.parametrize(
    ("name", "count", "tensors"),
    [("flux", 11_901_408_320, 780), ("wan", 14_288_491_584, 1095)],
)
def test_a_full_model_is_that_of_the_published_checkpoint(name, count, tensors):
    model = find_case(name, "full").meta_model()
    assert parameters(model) == count
    assert len(model.state_dict()) == tensors
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_keeps_the_names_and_the_depth(name, size):
    full, scaled = (find_case(name, each).meta_model().state_dict() for each in ("full", size))
    assert list(scaled) == list(full)


def test_scaled_keeps_the_ratios():
    assert FluxConfig().scaled(768) == FluxConfig(hidden=768)
    assert WanConfig().scaled(1280) == WanConfig(hidden=1280, ffn=3456)
    assert WanConfig().scaled(5120) == WanConfig()


@pytest.mark.parametrize("config", [FluxConfig(), WanConfig()], ids=["flux", "wan"])
@pytest.mark.parametrize("hidden", [-128, 0, 100])
def test_a_width_without_whole_heads_is_refused(config, hidden):
    with pytest.raises(
        ValueError, match=rf"hidden must be a positive multiple of 128, got {hidden}"
    ):
        config.scaled(hidden)


def test_wan_puts_patches_back_where_they_came_from():
    model = Wan(WanConfig(hidden=128, ffn=128, depth=0))
    latent = torch.randn(1, 16, 3, 4, 6)
    # [batch, channels, F, f, H, h, W, w] -> one row of values a token, channels last
    cut = latent.reshape(1, 16, 3, 1, 2, 2, 3, 2).permute(0, 2, 4, 6, 3, 5, 7, 1)
    tokens = cut.reshape(1, 18, 64)
    assert torch.equal(model._unpatch(tokens, torch.Size((3, 2, 3))), latent)


def test_rotated_products_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 128, generator=generator)

    def product(at: int, distance: int) -> torch.Tensor:
        ids = torch.tensor([[0, at, 7], [0, at + distance, 7]])
        cos, sin = rope_angles(ids, (16, 56, 56), 10000.0)
        return (rotate(q, (cos[:1], sin[:1])) * rotate(k, (cos[1:], sin[1:]))).sum()

    torch.testing.assert_close(product(3, 5), product(40, 5), rtol=1e-4, atol=1e-4)
    assert abs(product(3, 5) - product(3, 9)) > 1e-2


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_noise_levels_fall_from_one_to_zero(shift):
    levels = noise_levels(4, shift)
    assert levels[0] == 1.0
    assert levels[-1] == 0.0
    assert all(above > below for above, below in pairwise(levels))
    assert len(levels) == 5


def test_the_file_reads_back_as_written(tmp_path):
    model, path = small_model(), tmp_path / "weights.safetensors"
    counts: list[int] = []
    assert write_weights(model, path, on_bytes=counts.append)
    assert counts[-1] == path.stat().st_size == file_bytes(model)

    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    tensors = read(path)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    for name, tensor in tensors.items():
        first, last = header[name]["data_offsets"]
        assert tensor.dtype == torch.bfloat16
        assert tensor.contiguous().view(torch.uint8).flatten().tolist() == list(
            raw[start + first : start + last]
        )


def test_the_values_keep_activations_in_size(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_weights(small_model(), path)
    tensors = read(path)
    wide = tensors["0.weight"].float()
    assert wide.std().item() == pytest.approx(2048**-0.5, rel=0.01)
    assert wide.mean().item() == pytest.approx(0, abs=1e-4)
    assert tensors["2.weight"].float().std().item() == pytest.approx(24**-0.5, rel=0.3)
    assert torch.equal(tensors["1.weight"], torch.ones(48, dtype=torch.bfloat16))
    assert 0 < tensors["1.bias"].abs().max().item() < 0.2
    # No piece may repeat another: every row of the two and a bit pieces is its own.
    assert len(torch.unique(wide[:, :8], dim=0)) == len(wide)


def test_the_same_seed_gives_the_same_file(tmp_path):
    paths = [tmp_path / name for name in ("first", "again", "other")]
    for path, seed in zip(paths, (7, 7, 80), strict=True):
        assert write_weights(small_model(), path, seed=seed)
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again
    assert first != other
    assert {int.from_bytes(raw[:8], "little") % 8 for raw in (first, other)} == {0}


def test_a_tensor_s_values_depend_on_its_name_alone(tmp_path):
    with torch.device("meta"):
        longer = nn.ModuleDict({"0": nn.Linear(64, 64), "1": nn.Linear(64, 64)})
        shorter = nn.ModuleDict({"1": nn.Linear(64, 64)})
    for name, model in (("longer", longer), ("shorter", shorter)):
        write_weights(model, tmp_path / name)
    weights = read(tmp_path / "longer")
    assert torch.equal(weights["1.weight"], read(tmp_path / "shorter")["1.weight"])
    assert not torch.equal(weights["1.weight"], weights["0.weight"])


def test_a_right_file_is_kept_and_a_wrong_one_replaced(tmp_path):
    model, path = small_model(), tmp_path / "weights.safetensors"
    assert write_weights(model, path)
    whole = path.read_bytes()
    before = path.stat().st_ino, path.stat().st_mtime_ns
    assert not write_weights(model, path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before

    path.write_bytes(whole[:-1])
    assert write_weights(model, path)
    assert path.read_bytes() == whole
    assert write_weights(model, path, seed=1)
    assert write_weights(nn.Linear(4, 4), path)
    assert set(read(path)) == {"weight", "bias"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"older")

    def interrupt(_written_bytes: int) -> None:
        assert len(list(tmp_path.iterdir())) == 2  # The part is beside the older file.
        raise error

    with pytest.raises(error):
        write_weights(small_model(), path, on_bytes=interrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"older"


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(OSError, match=r"needs .* MiB of disk space but .* has 1\.00 MiB free"):
        write_weights(small_model(), tmp_path / "weights.safetensors")
    assert list(tmp_path.iterdir()) == []

    assert demo(tmp_path) == 1
    assert "flux-128.safetensors needs" in capsys.readouterr().err
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.parametrize("with_tqdm", [False, True], ids=["plain", "tqdm"])
def test_a_bar_on_a_terminal_counts_to_its_end(monkeypatch, with_tqdm):
    if with_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = make_bar("step 1/1", 57, "blocks")
    assert isinstance(bar, PlainBar) != with_tqdm
    for done in (0, 10, 57):
        bar.show(done)
    bar.close()
    lines = terminal.getvalue().replace("\r", "\n").rstrip("\n").split("\n")
    assert len(lines) > 1
    assert " 0/57 blocks" in terminal.getvalue()
    assert "step 1/1" in lines[-1]
    assert "57/57 blocks" in lines[-1]
    assert lines[-1].endswith(" s")


def test_a_bar_in_a_log_is_one_line(capsys):
    bar = make_bar("writing", 3, "MiB")
    for done in (1, 2, 3):
        bar.show(done)
    bar.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"  writing  [{'#' * 30}]  3/3 MiB  ")


def test_on_a_gpu_the_bar_follows_the_device_and_not_the_host(monkeypatch):
    passed: list[object] = []
    shown: list[int] = []

    class Event:
        def record(self) -> None:
            """The device has not come this far."""

        def query(self) -> bool:
            return self in passed

    for name in ("init", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    bar = SimpleNamespace(show=shown.append, close=lambda: None)
    monkeypatch.setattr(watch, "make_bar", lambda *_: bar)
    # The device passes one more block each time the host waits.
    monkeypatch.setattr(watch.time, "sleep", lambda _: passed.append(follower._events[len(passed)]))

    blocks = [nn.Identity() for _ in range(3)]
    follower = watch.Watch(blocks, torch.device("cuda"), 1)
    shown_at_block: list[int] = []
    with follower.step(0):
        for block in blocks:
            block(torch.ones(1))
            shown_at_block.append(len(shown))
    follower.close()
    assert shown_at_block == [0, 0, 0]
    assert shown == [1, 2, 3]
    assert not any(block._forward_hooks for block in blocks)


@pytest.mark.parametrize("device", DEVICES)
def test_both_models_run_and_are_identical(tmp_path, capsys, device):
    assert demo(tmp_path, "--steps", "2", device=device) == 0
    out, err = capsys.readouterr()
    assert out.splitlines().count(SAME) == 2
    assert DIFFERENT not in out
    # Two models, resident and streamed, two steps each; every step ends with all its blocks.
    assert err.count("57/57 blocks") == 4
    assert err.count("40/40 blocks") == 4
    for name in MODELS:
        assert f"\n  {name} tiny  " in out
        assert "<svg" in (tmp_path / "out" / f"{name}-timeline.svg").read_text()


def test_a_second_run_reuses_the_file_and_only_the_seed_changes_the_result(tmp_path, capsys):
    results = []
    for how, seed in (("written in", "0"), ("reused", "0"), ("reused", "1")):
        assert demo(tmp_path, "--model", "wan", "--steps", "1", "--seed", seed) == 0
        out = capsys.readouterr().out
        assert how in out
        assert "flux" not in out
        results.append({line for line in out.splitlines() if "sha256" in line})
    assert [len(result) for result in results] == [1, 1, 1]
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_other_weights_are_told_apart(tmp_path, capsys, monkeypatch):
    stream = dgls_torch.stream

    def stream_others(model, *, source, **fields):
        other = source.with_name("other.safetensors")
        write_weights(model, other, seed=1)
        return stream(model, source=other, **fields)

    monkeypatch.setattr(dgls_torch, "stream", stream_others)
    assert demo(tmp_path, "--model", "flux", "--steps", "1") == 1
    out = capsys.readouterr().out
    assert f"{DIFFERENT} (max abs diff " in out
    assert SAME not in out


def test_without_room_for_the_resident_model_nothing_is_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_run, "free_vram", lambda _: 1 << 20)
    assert demo(tmp_path, "--model", "flux", "--steps", "1") == 0
    out = capsys.readouterr().out
    assert "not compared: the resident model needs 4" in out
    assert "this device has 1.00 MiB" in out
    assert SAME not in out
    assert "fully resident\n" not in out
    assert out.count("sha256") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "sdxl"], "--model needs some of flux, wan, found 'sdxl'"),
        (["--model", ""], "--model needs some of flux, wan, found ''"),
        (["--steps", "0"], "--steps needs at least 1, found 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--size", "huge"], "argument --size: invalid choice: 'huge'"),
        (["--vram", "8 parsecs"], "--vram needs a size"),
        (["--vram", "0"], "--vram needs at least 1"),
        (["--wram", "8GiB"], "unrecognized arguments: --wram 8GiB"),
    ],
)
def test_a_bad_option_gets_one_sentence(tmp_path, capsys, options, sentence):
    assert demo(tmp_path, *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dgls_torch demo: {sentence}")
    assert err.count("\n") == 1
    assert not (tmp_path / "weights").exists() or not list((tmp_path / "weights").iterdir())


def test_a_file_in_place_of_a_folder_is_a_bad_option(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert demo(tmp_path) == 2
    assert "--out needs a folder, found" in capsys.readouterr().err


def test_cuda_without_cuda_is_a_bad_option(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo(tmp_path, device="cuda") == 2
    assert "--device cuda needs a CUDA device" in capsys.readouterr().err


def test_a_budget_below_the_least_is_a_bad_option(tmp_path, capsys):
    assert demo(tmp_path, "--model", "flux", "--vram", "1KiB") == 2
    assert "flux cannot be streamed: " in capsys.readouterr().err

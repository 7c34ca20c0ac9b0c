"""What a bug report tells, and what it never tells.

Goal: `report().bundle()` has plan, times, versions, limits, counters and last errors, also after
failures and after detach; no folder's name and no foreign variable of the environment is in it.
Method: folders, users and variables with a secret name, everywhere such a name can come from.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import SMALL, budgets, inputs, net
from safetensors.torch import save_file

import dgls_torch
from dgls_torch import StreamConfig
from dgls_torch.bundle import base_name

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "jane doe's secret"


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(inputs())


def test_everything_is_there(tmp_path: Path) -> None:
    model = net()
    path = tmp_path / "x.json"
    with dgls_torch.stream(model, budgets(model)[1], **SMALL) as s:
        for _ in range(4):
            run(model)
        s.report().bundle(path)
        found = json.loads(path.read_text())
        report = s.report()
    assert found["format"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert "no usable CUDA driver" in str(found["versions"]["driver"]) or (
        found["versions"]["driver"] > 11000
    )
    assert found["machine"]["memory"]["physical_bytes"] > 1 << 28
    assert "memlock_limit_bytes" in found["machine"]["memory"]
    assert found["config"]["vram"] == report.plan.vram_bytes
    assert set(found["config"]) == set(StreamConfig.__dataclass_fields__)
    assert found["plan"]["streamed_bytes"] == report.plan.streamed_bytes
    assert len(found["plan"]["blocks"]) == 6
    assert found["counters"]["passes"] == 4
    assert found["counters"]["h2d_bytes_total"] == report.h2d_bytes_total
    assert found["measured"]["pass_s"] > 0
    assert [block["block"] for block in found["trace"]] == [f"blocks.{n}" for n in range(6)]
    assert all(block["uses"] == 3 and block["compute_s"] > 0 for block in found["trace"])
    assert found["errors"] == []
    s.report().bundle(path)  # after detach
    assert json.loads(path.read_text())["counters"] == found["counters"]


def test_no_folder_and_no_variable_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / SECRET / "my project"
    folder.mkdir(parents=True)
    source = folder / "weights.safetensors"
    model = net()
    save_file(model.state_dict(), source)
    monkeypatch.setenv("SECRET_TOKEN", SECRET)
    monkeypatch.setenv("DGLS_FOLDER", f"{folder}/cache")
    monkeypatch.setenv("DGLS_PLAIN", "plain")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    blocks = list(model.blocks)
    options: dict[str, Any] = {**SMALL, "blocks": blocks}
    for given in (source, "weights.safetensors", folder, f"../my project/{source.name}"):
        with dgls_torch.stream(model, 40_000, source=given, **options) as s:
            run(model)
            status = os.stat(source)
            os.utime(source, ns=(1, 1))
            with pytest.raises(RuntimeError, match="changed while in use"):
                run(model)
            os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
            s.report().bundle("x.json")
        text = (folder / "x.json").read_text()
        found = json.loads(text)
        assert "weights.safetensors failed: the file changed" in found["errors"][-1]
        for secret in ("jane", "doe's", "secret", str(tmp_path), tmp_path.name):
            assert secret not in text, secret
        last = "my project" if given == folder else "weights.safetensors"
        assert found["config"]["source"] == last
        assert found["config"]["blocks"] == ["Block"] * 6
        assert found["environment"]["DGLS_FOLDER"] == "cache"
        assert found["environment"]["DGLS_PLAIN"] == "plain"
        assert "SECRET_TOKEN" not in text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("reading 3 bytes of /home/jane/x.bin failed", "reading 3 bytes of x.bin failed"),
        (r"cannot open C:\Users\jane doe\x.bin", "cannot open x.bin"),
        (r"\\server\share\x", "x"),
        ("~/models/x", "x"),
        ("../up/x and ./y/z", "z"),
        ("models/x.bin", "x.bin"),
        ("12.5 of 3 blocks.0 on cuda:0", "12.5 of 3 blocks.0 on cuda:0"),
    ],
)
def test_of_a_path_the_last_part_stays(text: str, clean: str) -> None:
    assert base_name(text) == clean


def test_out_of_memory_is_in_it(tmp_path: Path) -> None:
    model = net()
    with dgls_torch.stream(model, 40_000, **SMALL) as s:

        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

        hook = model.last.register_forward_hook(full)
        with pytest.raises(torch.OutOfMemoryError):
            run(model)
        hook.remove()
    s.report().bundle(tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["errors"][-1].startswith("Tried to allocate 2.00 GiB.\ndgls_torch: the weights")


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with dgls_torch.stream(net(), 40_000, **SMALL) as s, pytest.raises(OSError, match="nowhere"):
        s.report().bundle(tmp_path / "nowhere" / "x.json")

"""``compress`` in plans: of weight files by the command, and of modules.

Goal: a plan says what weights that go over the link encoded would give and take, with the numbers
that a stream has; every budget that is named works; where nothing can be encoded nothing changes.
Method: files without data and modules on meta, each planned beside itself without ``compress``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import net
from plan_files import flux, write
from test_plan_command import LINK, bad, good
from test_plan_command import model as flux_file  # noqa: F401 (a fixture)

import dgls_torch

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def model(flux_file: Path) -> Path:  # noqa: F811
    return flux_file


def test_weights_that_go_over_the_link_encoded(model: Path, capsys: Any) -> None:
    asked = [model, "--vram", "8GiB", *LINK, "--tflops", 300]
    off, out = good(capsys, *asked), good(capsys, *asked, "--compress", "auto")
    assert good(capsys, *asked, "--compress", "off") == off
    assert out.splitlines()[0].endswith(", 672.94 MiB would do"), "without a buffer, as it is"
    assert "outside of blocks 152.76 MiB, 128.00 MiB of them to decode from" in out
    assert "encoded on the link, 69 % of the bytes: 10." in out
    assert "25.0 GB/s, 10.0 us for each copy; of encoded weights 36.4 GB/s" in out
    before, inputs = (
        json.loads(good(capsys, *asked, "--print-inputs", *more))
        for more in ([], ["--compress", "on"])
    )
    share = inputs.pop("h2d_bytes_per_s") / before.pop("h2d_bytes_per_s")
    assert share == pytest.approx(16 / 10.98, rel=1e-3)
    assert before.pop("budget_bytes") - inputs.pop("budget_bytes") == 128 << 20
    assert inputs == before
    plans = [json.loads(good(capsys, *asked, "--json", "--compress", way)) for way in ("off", "on")]
    assert 1.35 < plans[0]["period_s"] / plans[1]["period_s"] < 1.46
    hides = 'copies hide as it is: compress="auto" would encode nothing'
    assert hides not in out
    slow = [model, "--vram", "12GiB", *LINK, "--tflops", 100, "--no-curve", "--compress", "auto"]
    assert hides in good(capsys, *slow)
    assert "bound 969 ms (the compute)" in " ".join(good(capsys, *slow).split())


@pytest.mark.parametrize("more", [[], ["--resident", "0-5"]])
def test_smallest_budgets_with_a_buffer_work(model: Path, capsys: Any, more: list[str]) -> None:
    on = [model, *LINK, "--no-curve", "--compress", "on", *more]
    least = int(bad(capsys, *on, "--vram", "500MiB", status=1).split("(")[-1].split()[0])
    off = [model, *LINK, "--no-curve", *more, "--vram"]
    bare = int(bad(capsys, *off, "500MiB", status=1).split("(")[-1].split()[0])
    assert least - bare == 32 << 20
    assert "32.00 MiB of them to decode from" in good(capsys, *on, "--vram", least)
    bad(capsys, *on, "--vram", least - 1, status=1)
    auto = [model, *LINK, "--no-curve", "--compress", "auto", *more, "--vram"]
    assert "decode" not in good(capsys, *auto, bare)
    assert "decode" in good(capsys, *auto, least)


def test_what_cannot_be_encoded_is_planned_as_it_is(tmp_path: Path, capsys: Any) -> None:
    for dtype in ("F32", "F8_E5M2"):
        asked = [write(tmp_path / "flux.safetensors", flux(), dtype), "--vram", "8GiB", *LINK]
        assert good(capsys, *asked, "--compress", "on") == good(capsys, *asked)


def test_fp8_becomes_less_smaller(tmp_path: Path, capsys: Any) -> None:
    asked = [write(tmp_path / "flux.safetensors", flux(), "F8_E4M3"), "--vram", "4GiB", *LINK]
    assert "encoded on the link, 85 % of the bytes: " in good(capsys, *asked, "--compress", "on")


def test_a_plan_of_a_module_with_encoded_weights() -> None:
    with torch.device("meta"):
        model = net(80, 512).to(torch.bfloat16)  # 160 MiB
    asked = {"device": "cpu", "h2d_bytes_per_s": 1e9, "compute_s": 1e-3}
    plain, on = (dgls_torch.plan(model, "80MiB", **asked, compress=way) for way in ("off", "on"))
    assert on.outside_bytes - plain.outside_bytes == 32 << 20
    assert on.least_vram_bytes - plain.least_vram_bytes == 32 << 20
    assert plain.encoded is None
    assert on.encoded is not None
    assert on.encoded.share == pytest.approx(10.98 / 16, rel=0.01)
    assert on.period_s == pytest.approx(on.streamed_bytes * on.encoded.share / 1e9, rel=0.1)
    assert on.period_s < plain.period_s * 1.1, "32 MiB more to stream, and 0.69 of it"
    assert 0.68 < on.encoded.held_bytes(on.streamed_bytes) / on.streamed_bytes < 0.69
    assert dgls_torch.plan(model, "20MiB", **asked, compress="auto").encoded is None

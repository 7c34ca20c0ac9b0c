"""``compress`` with fp8 weights, alone and beside bf16 ones, on the CPU with a link.

Goal: every bit of an fp8 weight arrives, whatever it means and wherever it comes from; what goes
over the link is as much smaller as the page says; a plan counts fp8 as what it becomes.
Method: blocks whose result has every bit of a bf16 and of an fp8 weight, each pass beside the
resident model's result; numbers of the report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from compress_cases import (
    ON,
    WIDTH,
    Both,
    both,
    may_lock,
    normal_bytes,
    normal_words,
    passes,
    random_bytes,
    random_words,
    run_words,
)
from helpers import Snapshot, same, threads
from safetensors.torch import save_file

import dgls_torch
from dgls_torch.config import StreamConfig
from dgls_torch.planner.sizes import sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

pytestmark = pytest.mark.skipif(
    not may_lock(), reason="NOT TESTED: encoded weights have to be page-locked (ulimit -l)"
)
N = 4 * WIDTH * WIDTH  # bytes of each of a block's two weights
BUDGET = 4 * N  # of 8


def scaled() -> torch.Tensor:
    return normal_bytes(90)


def with_all_others() -> torch.Tensor:
    """Every byte there is, NaNs and denormals too, between usual ones."""
    found = normal_bytes()
    found[::16] = torch.randperm(N // 16).to(torch.uint8)
    return found


def denormals() -> torch.Tensor:
    return random_bytes() & 0x87


def zeros() -> torch.Tensor:
    return torch.zeros(N, dtype=torch.uint8)


# Of the encoded bytes, for each decoded one.
FORMS: dict[str, tuple[Callable[[], torch.Tensor], float, float]] = {
    "as they are": (normal_bytes, 0.75, 0.79),
    "scaled": (scaled, 0.84, 0.90),
    "all patterns": (with_all_others, 0.77, 0.87),
    "denormals": (denormals, 0.75, 0.76),
    "zeros": (zeros, 0.75, 0.76),
}


@pytest.mark.parametrize(("of_bytes", "least", "most"), FORMS.values(), ids=FORMS)
def test_each_bit_arrives(of_bytes: Callable[[], torch.Tensor], least: float, most: float) -> None:
    model = both(random_words, of_bytes)
    expected, before = run_words(model), Snapshot(model)
    assert not same(run_words(both(random_words, random_bytes)), expected)
    with dgls_torch.stream(model, BUDGET, **ON) as s:
        # Of eight weights four fit, so two of fp8 or more are streamed, which alone are encoded.
        report = passes(s, lambda: run_words(model), expected, lambda r: r.decoded_bytes_total > 0)
    assert report.errors == 0
    assert least < report.encoded_bytes_total / report.decoded_bytes_total < most
    before.check(model)
    assert threads() == []


WAYS: dict[str, dict[str, Any]] = {
    "in place": {},
    "verified": {"verify": True},
    "not adapted": {"adapt": False},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_beside_bf16_weights(options: dict[str, Any]) -> None:
    model = both(normal_words, normal_bytes, count=6)
    expected, before = run_words(model), Snapshot(model)
    with dgls_torch.stream(model, BUDGET, **ON | options) as s:

        def all_held(report: dgls_torch.Report) -> bool:
            return report.encoded_held_bytes > 0.6 * report.plan.streamed_bytes

        report = passes(s, lambda: run_words(model), expected, all_held)
        if "verify" in options:
            assert report.verified_bytes > 0
        block = model[0]
        assert isinstance(block, Both)
        block.bytes.view(torch.uint8).bitwise_xor_(0x80)
        turned = run_words(model)
        assert not same(turned, expected), "a change in place is followed"
        block.bytes.view(torch.uint8).bitwise_xor_(0x80)
        passes(s, lambda: run_words(model), expected, all_held)
    assert (report.errors, report.mismatches) == (0, 0)
    before.check(model)


def test_from_a_file(tmp_path: Path) -> None:
    model = both(normal_words, scaled, count=6)
    expected = run_words(model)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with torch.device("meta"):
        empty: nn.Module = both_on_meta(6)
    options = ON | {"source": tmp_path / "weights.safetensors", "ram": "64MiB"}
    with dgls_torch.stream(empty, BUDGET, **options) as s:
        report = passes(s, lambda: run_words(empty), expected, lambda r: r.decoded_bytes_total > 0)
    assert report.errors == 0


def both_on_meta(count: int) -> nn.Sequential:
    return torch.nn.Sequential(*(Both() for _ in range(count)))


def test_a_plan_counts_what_fp8_becomes() -> None:
    with torch.device("meta"):
        sizes = sizes_of(both_on_meta(3), StreamConfig(vram="1GiB"))
    assert sizes.encodable_bytes == 6 * N
    assert sizes.encoded_bytes == pytest.approx(3 * N * (10.98 / 16 + 0.85), abs=8)

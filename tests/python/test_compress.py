"""``compress``: weights that go over the link encoded, on the CPU with a link.

Goal: the same bits arrive, whatever they are and wherever they come from; fewer go over the link;
and nothing is encoded that gains nothing, or that nobody asked for.
Method: models in bf16 with weights of the least size, each pass beside the resident model's result;
blocks whose result has every bit of their weights; numbers of the report.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compress_cases import (
    LINK,
    ON,
    WIDTH,
    all_held,
    both,
    may_lock,
    normal_words,
    passes,
    random_bytes,
    random_words,
    run,
    run_words,
    some_passes,
    wide,
    words,
    x,
)
from helpers import SMALL, Block, Snapshot, budgets, net, same, threads
from safetensors.torch import save_file
from torch import nn

import dgls_torch
from dgls_torch import encoding
from dgls_torch import host_budget as budgets_module

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not may_lock(), reason="NOT TESTED: encoded weights have to be page-locked (ulimit -l)"
)
N = 2 * WIDTH * WIDTH


def normal_and_all_others() -> torch.Tensor:
    """Every bit pattern there is, NaNs and denormals too, between usual ones."""
    patterns = normal_words()
    patterns[::8] = torch.randperm(1 << 16)[: N // 8].to(torch.int16)
    return patterns


def denormals() -> torch.Tensor:
    return torch.randint(0, 1 << 7, (N,))


def ones() -> torch.Tensor:
    return torch.full((N,), 0x3F80)


# ---- the same bits, fewer on the link


def test_whole_models_are_bit_identical_in_every_budget() -> None:
    model = wide()
    expected, before = run(model), Snapshot(model)
    for size in budgets(model, **LINK)[:-1]:  # in the last one all fits
        with dgls_torch.stream(model, size, **ON) as s:
            report = passes(s, lambda: run(model), expected)
            assert "dgls-copy" in threads()
        before.check(model)
        assert threads() == []
        # What was encoded after the report came to it.
        assert s.report().encoded_held_bytes >= report.encoded_held_bytes, "kept after detach"
        assert report.errors == 0
    assert same(run(model), expected)


@pytest.mark.parametrize("patterns", [normal_words, normal_and_all_others, denormals, ones])
def test_each_bit_arrives(patterns: Callable[[], torch.Tensor]) -> None:
    model = words(patterns)
    expected, before = run_words(model), Snapshot(model)
    assert not same(run_words(words(random_words)), expected)
    with dgls_torch.stream(model, 2 * N * 2, **ON) as s:
        # 2 of 4 fit: what is not encoded is less than one of them
        report = passes(
            s, lambda: run_words(model), expected, lambda report: report.encoded_held_bytes > N
        )
        assert report.decoded_bytes_total > 0
    before.check(model)


def test_fewer_bytes_go_over_the_link_and_the_report_says_so() -> None:
    model, moved, said = wide(), {}, {}
    expected, size = run(model), budgets(model, **LINK)[2]
    for mode in ("off", "on"):
        with dgls_torch.stream(model, size, adapt=False, **ON | {"compress": mode}) as s:
            passes(s, lambda: run(model), expected, lambda r, on=mode == "on": all_held(r) == on)
            before = s.report()
            for _ in range(3):
                assert same(run(model), expected)
            report = s.report()
        moved[mode] = report.h2d_bytes_total - before.h2d_bytes_total
        encoded = report.encoded_bytes_total - before.encoded_bytes_total
        decoded = report.decoded_bytes_total - before.decoded_bytes_total
        assert moved[mode] - encoded + decoded == 3 * report.plan.streamed_bytes
        assert report.h2d_bytes == report.plan.streamed_bytes, "what arrives"
        said[mode] = [line.split() for line in str(report).splitlines()]
    assert 0.6 < encoded / decoded < 0.75
    assert moved["on"] < 0.9 * moved["off"]
    assert not [line for line in said["off"] if line[0] == "encoded"]
    (row,) = [line for line in said["on"] if line[0] == "encoded"]
    assert row[2:4] == ["MiB", "held,"]
    assert row[5:] == ["%", "of", "their", "size", "on", "the", "link"]
    assert 60 < float(row[4]) < 75


# ---- where nothing is encoded

NOTHING: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "off": (wide, {"compress": "off"}),
    "by default": (wide, {"compress": None}),
    "no link": (wide, {"copy_bytes_per_s": None}),
    "fp32": (lambda: wide(2, dtype=torch.float32), {}),
    "fp16": (lambda: wide(dtype=torch.float16), {}),
    "fp8, e5m2": (lambda: both(random_words, random_bytes, torch.float8_e5m2), {"vram": 8 * N}),
    "random fp8": (lambda: both(random_words, random_bytes), {"vram": 8 * N}),
    "small": (lambda: net(8, 256).bfloat16(), {}),
    "everything fits": (wide, {"vram": 1 << 30}),
    "no memory for it": (wide, {"pinned": 4096}),
    "random bits": (lambda: words(random_words), {"vram": 2 * N * 2}),
}


@pytest.mark.parametrize(("make", "options"), NOTHING.values(), ids=NOTHING)
def test_nothing_is_held(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = make()
    options = {key: value for key, value in (ON | options).items() if value is not None}
    width = next(iter(model.parameters())).shape[-1]

    def call() -> torch.Tensor:
        if isinstance(model, nn.Sequential):
            return run_words(model)
        with torch.inference_mode():
            return model(x(next(model.parameters()).dtype)[:, :width])

    expected = call()
    vram = options.pop("vram", None) or budgets(model, **LINK)[1]
    with dgls_torch.stream(model, vram, **options) as s:
        some_passes(s, call, expected, 6)
        report = s.report()
    assert (report.plan.streamed_bytes > 0) == (vram < 1 << 30)
    assert report.encoded_held_bytes == 0
    assert (report.encoded_bytes_total, report.decoded_bytes_total) == (0, 0)
    assert "held, " not in str(report)
    assert threads() == []


def test_the_buffer_leaves_what_weights_need() -> None:
    least, most = encoding.BUFFER_LEAST, encoding.BUFFER_BYTES
    for needed in (1 << 20, 700 << 20, 3 << 30, 60 << 30):
        assert encoding.decoder_bytes("auto", needed + least - 1, needed) == 0
        before = 0
        for more in (0, least, least + 12345, 2 * least, 4 * least, 1 << 32, 1 << 40):
            vram = needed + more
            found = encoding.decoder_bytes("on", vram, needed)
            assert before <= found <= most
            assert found == least or found <= min(more // 2, vram // 32)
            assert more < least or found == encoding.decoder_bytes("auto", vram, needed)
            before = found
        assert before == most


# ---- "auto"


def test_auto_encodes_where_the_link_decides() -> None:
    model = wide()
    expected, before = run(model), Snapshot(model)
    options = ON | {"compress": "auto", "copy_bytes_per_s": 2e8}
    with dgls_torch.stream(model, budgets(model, **LINK)[1], **options) as s:
        assert same(run(model), expected)
        time.sleep(0.02)
        assert s.report().encoded_held_bytes == 0, "before any pass was timed"
        report = passes(s, lambda: run(model), expected)
        assert report.decoded_bytes_total > 0
    before.check(model)


def test_auto_leaves_it_where_the_compute_decides() -> None:
    model = wide()
    for block in model.blocks:
        block.up.register_forward_hook(lambda *_: time.sleep(0.01))
    expected, size = run(model), budgets(model, **LINK)[-3]
    for mode in ("on", "auto"):
        with dgls_torch.stream(model, size, **ON | {"compress": mode}) as s:
            if mode == "on":
                passes(s, lambda: run(model), expected, lambda r: r.encoded_held_bytes > 0)
                continue
            some_passes(s, lambda: run(model), expected, 20)
            report = s.report()
            assert report.plan.predicted_s is not None, "times are known"
            assert report.limit == "compute"
            assert (report.encoded_held_bytes, report.encoded_bytes_total) == (0, 0)


def test_auto_follows_what_decides() -> None:
    model, pauses = wide(), [0.0]
    for block in model.blocks:
        block.up.register_forward_hook(lambda *_: time.sleep(pauses[0]))
    expected, before = run(model), Snapshot(model)
    options = ON | {"compress": "auto", "copy_bytes_per_s": 2e8}
    with dgls_torch.stream(model, budgets(model, **LINK)[1], **options) as s:

        def decodes() -> bool:
            decoded = s.report().decoded_bytes_total
            some_passes(s, lambda: run(model), expected, 2)
            return s.report().decoded_bytes_total > decoded

        def passes_until(decoded: bool) -> None:
            for _ in range(50):
                if decodes() == decoded:
                    return
            raise AssertionError(f"decodes: {not decoded}\n{s.report()}")

        for pause, decoded in ((0.0, True), (0.03, False), (0.0, True)):
            pauses[0] = pause
            passes_until(decoded)
            assert decodes() == decoded
        assert s.report().errors == 0
    before.check(model)
    assert threads() == []


# ---- every way that weights come and go


@pytest.mark.parametrize("unit", ["block", "layer"])
@pytest.mark.parametrize("ram", ["68KiB", "3MiB", "auto"])
def test_weights_from_a_file(ram: str, unit: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(wide().state_dict(), path)
    model = wide().to("meta")
    expected, before = run(wide()), Snapshot(model)
    options = ON | {"source": path, "ram": ram, "staging": "64KiB", "unit": unit}
    with dgls_torch.stream(model, 4 << 20, **options) as s:
        report = passes(s, lambda: run(model), expected)
        assert report.decoded_bytes_total > 0
        assert (report.host.file_bytes > 0) == (ram != "auto")
    before.check(model)
    assert threads() == []


def test_memory_that_cannot_be_locked_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is staged from memory is encoded as well, if there is room for that."""
    split = budgets_module.host_budget

    def split_otherwise(*args: Any, **sizes: Any) -> Any:
        return replace(split(*args, **sizes), pinned_bytes=5 << 20, encoded_bytes=8 << 20)

    monkeypatch.setattr(budgets_module, "host_budget", split_otherwise)
    model = wide()
    expected = run(model)
    with dgls_torch.stream(model, budgets(model, **LINK)[2], staging="64KiB", **ON) as s:
        report = passes(s, lambda: run(model), expected)
    assert report.host.memory_bytes > 0
    assert report.staging_bytes > 0
    assert report.decoded_bytes_total > 0


def test_other_plans() -> None:
    model = wide()
    expected = run(model)
    for options in ({"prefetch": 0}, {"resident": [1]}, {"trace_passes": 0}, {"unit": "layer"}):
        with dgls_torch.stream(model, budgets(model, **LINK)[3], **ON | options) as s:
            report = passes(s, lambda: run(model), expected)
            assert report.decoded_bytes_total > 0, options


def test_what_arrives_is_verified() -> None:
    model = wide()
    expected = run(model)
    with dgls_torch.stream(model, budgets(model, **LINK)[2], verify=True, **ON) as s:
        report = passes(s, lambda: run(model), expected)
    assert report.decoded_bytes_total > 0
    assert (report.mismatches, report.errors) == (0, 0)
    assert report.verified_bytes == report.passes * sum(b.nbytes for b in model.blocks.parameters())


class Twice(Block):
    """A block that uses one of its weights twice."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.again = nn.Linear(width, 2 * width, bias=False)
        self.again.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.again(x).sum(1, keepdim=True)


def test_tied_weights() -> None:
    model = net(4, WIDTH, block=Twice).bfloat16().requires_grad_(False)
    model.blocks[3].down.weight = model.blocks[1].down.weight
    expected, before = run(model), Snapshot(model)
    with dgls_torch.stream(model, budgets(model, **LINK)[1], **ON) as s:
        passes(s, lambda: run(model), expected, lambda r: r.encoded_held_bytes > 4 << 20)
        for factor in (2, 0.5):
            with torch.no_grad():
                model.blocks[1].down.weight.mul_(factor)
                model.blocks[2].up.weight.mul_(factor)
            some_passes(s, lambda: run(model), _by_itself(model), 3)
    before.check(model)


def _by_itself(model: nn.Module) -> torch.Tensor:
    twin = net(4, WIDTH, block=Twice).bfloat16()
    twin.load_state_dict(model.state_dict())
    return run(twin)


@pytest.mark.parametrize("compress", ["off", "on"])
def test_two_streams_side_by_side(compress: str) -> None:
    models = [wide(seed=seed) for seed in range(2)]
    expected = [run(model) for model in models]
    options: dict[str, Any] = SMALL | LINK | {"compress": compress}
    size = budgets(models[0], **LINK)[1]
    before, promised = encoding.promised_bytes(), []
    streams = []
    for model in models:
        streams.append(dgls_torch.stream(model, size, **options))
        promised.append(encoding.promised_bytes() - before)
    whole = 8 * 2 * WIDTH * WIDTH * 2  # bytes of the weights of one that may be encoded
    share = promised[0] / whole
    assert 0.68 < share < 0.7 if compress == "on" else share == 0
    assert promised[1] == 2 * promised[0]
    for s, model, out in zip(streams, models, expected, strict=True):
        passes(s, lambda m=model: run(m), out, lambda r: all_held(r) == (compress == "on"))
    held = sum(s.report().encoded_held_bytes for s in streams)
    assert encoding.promised_bytes() - before == promised[1] - held, "what is held is not free"
    for s in streams:
        s.detach()
    assert encoding.promised_bytes() == before
    assert threads() == []


# ---- without the hooks


def test_decoding_that_makes_no_sense() -> None:
    tensors, blocks = [torch.zeros(100), torch.zeros(100)], [0, 1]
    ops, at = torch.ops.dgls, torch.zeros(1)
    arena = torch.zeros(1024, dtype=torch.uint8)

    def create(**options: Any) -> int:
        return ops.create(arena, tensors, [], [], [], [], blocks, blocks, 1024, **options)

    one_dimension = "decode_buffer must be a contiguous uint8 tensor of one dimension"
    bad: list[tuple[dict[str, Any], str]] = [
        ({"encode": 3}, "encode must be 0 .never., 1 .* or 2 .always., got 3"),
        ({"encode": -1}, "encode must be .* got -1"),
        ({"encode": 2, "encodable": [0, 2]}, "encodable names tensor 2 of 2"),
        ({"encode": 2, "encodable": [-1]}, r"encodable must be in 0\.\.2\^32-1, got -1"),
        ({"encode": 2, "encodable": [1 << 32]}, "encodable must be in"),
        ({"encode": 2, "encodable_fp8": [2]}, "encodable_fp8 names tensor 2 of 2"),
        ({"encode": 2, "encodable_fp8": [-1]}, "encodable_fp8 must be in"),
        ({"encodable": [0, 1], "encodable_fp8": [1]}, "tensor 1 is both in encodable and in"),
        ({"encode": 2, "encoded_bytes": -7}, "encoded_bytes must not be negative, got -7"),
        ({"decode_buffer": torch.zeros(256)}, one_dimension),
        ({"decode_buffer": torch.zeros(16, 16, dtype=torch.uint8)}, one_dimension),
        ({"decode_buffer": torch.zeros(512, dtype=torch.uint8)[::2]}, one_dimension),
    ]
    for options, text in bad:
        with pytest.raises(RuntimeError, match=text):
            create(**options)
    assert threads() == []
    engine = create(encode=2, encodable=[0, 1, 1], encoded_bytes=1 << 20)
    for block in (0, 1, 0):
        ops.wait(at, engine, block)
        ops.release(at, engine, block)
    ops.destroy(engine)

"""Streamed output is the resident model's output, bit for bit, whatever the weights are.

Goal: every dtype, layout, subclass and sharing of weights that torch moves streams right or stays.
Method: a model of each kind in every budget from the smallest to all-fits (`helpers.check`), with
freed device memory poisoned; then with faults in the engine, where the same tests have to go wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    Block,
    Pair,
    Plain,
    budgets,
    check,
    inputs,
    net,
    same,
)
from torch import nn

import dgls_torch

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
STORED = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.complex32,
]


def raw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits as ``dtype``: numbers that no float is rounded to."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        data &= 1
    return data.view(dtype).reshape(shape)


class Stored(nn.Module):
    """A block whose forward returns all bits of its weights, mixed with its input."""

    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        for number, weight in enumerate(weights):
            setattr(self, f"weight{number}", nn.Parameter(weight, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.parameters():
            data = weight.detach().resolve_conj().contiguous().reshape(-1)
            x = x * 31 + data.view(torch.uint8).to(torch.int64)[: x.numel()]
        return x


def stored(*kinds: Any) -> nn.Sequential:
    return nn.Sequential(*[Stored(*[make(seed) for make in kinds]) for seed in range(5)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_float_models(dtype: torch.dtype) -> None:
    model, x = net().to(dtype), inputs().to(dtype)
    check(model, lambda m: m(x))


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_every_bit_of_every_dtype(dtype: torch.dtype) -> None:
    model = stored(lambda seed: raw(16, 9, dtype=dtype, seed=seed))
    check(model, lambda m: m(torch.arange(16 * 9)))


def test_parameters_of_many_dtypes_in_one_block() -> None:
    kinds = [
        lambda seed, d=dtype: raw(17, 5, dtype=d, seed=seed) for dtype in STORED[:6] + STORED[12:]
    ]
    check(stored(*kinds), lambda m: m(torch.arange(17 * 5)))


@pytest.mark.parametrize(
    "make",
    [
        lambda w: w.t(),
        lambda w: torch.cat([w, w])[::2],
        lambda w: torch.cat([w, w], 1)[:, ::2],
        lambda w: torch.cat([w, w])[3 : 3 + len(w)],
        lambda w: w[:1].expand(len(w), -1),
        lambda w: w[0].as_strided((32, 32), (1, 0)),
        lambda w: torch.zeros(2000)[7:].as_strided((32, 32), (40, 1)).copy_(w),
        lambda w: torch.randn(32, 32).unfold(0, 2, 1)[:31:1, :, 0].new_tensor(w.tolist()),
    ],
    ids=["transposed", "rows", "columns", "offset", "expanded", "zero-stride", "gaps", "fresh"],
)
def test_strides(make: Any) -> None:
    model = net()
    for block in model.blocks:
        block.up.weight.data = block.up.weight.data  # as it is
        square = nn.Linear(32, 32)
        square.weight = nn.Parameter(make(square.weight.detach().clone()))
        block.norm = nn.Sequential(block.norm, square)
    check(model, lambda m: m(inputs()))


class Conv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Conv(8) for _ in range(5)]).eval().to(memory_format=layout)
    x = torch.randn(2, 8, 9, 9).to(memory_format=layout)
    check(model, lambda m: m(x))


def test_statistics_of_batch_norm_are_updated_as_without_a_stream() -> None:
    def run(streamed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*[Conv(8) for _ in range(4)]).train().requires_grad_(False)
        x = torch.randn(2, 8, 9, 9)
        out = [model(x) for _ in range(0 if streamed else 3)]
        if streamed:
            with dgls_torch.stream(model, 4096, device="cpu", min_stream_bytes=0, poison=True):
                out = [model(x) for _ in range(3)]
        return [*out, *(b.clone() for b in model.buffers())]

    assert same(run(True), run(False))


def test_buffers_of_any_kind() -> None:
    class Buffered(Block):
        def __init__(self, width: int = 32) -> None:
            super().__init__(width)
            self.register_buffer("scale", torch.randn(width))
            self.register_buffer("hidden", torch.randn(width), persistent=False)
            self.register_buffer("index", torch.randperm(width))
            self.register_buffer("nothing", None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * self.scale + self.hidden)[:, self.index]

    check(net(block=Buffered), lambda m: m(inputs()))


def pair(depth: int, seed: int) -> nn.Parameter:
    torch.manual_seed(seed)
    payload: torch.Tensor = torch.randint(-127, 127, (32, 32), dtype=torch.int8)
    for _ in range(depth):
        payload = Pair(payload, torch.rand(32, 1) / 100)
    return nn.Parameter(payload, requires_grad=False)


@pytest.mark.parametrize("depth", [1, 2])
def test_wrapper_subclasses(depth: int) -> None:
    model = net()
    for seed, block in enumerate(model.blocks):
        block.norm = nn.Linear(32, 32)
        block.norm.weight = pair(depth, seed)
    assert min(budgets(model)) < sum(p.numel() for p in model.parameters()) * 4
    reports = check(model, lambda m: m(inputs()))
    assert reports[0].plan.streamed_bytes > 0


def test_a_wrapper_that_is_shared_is_bound_everywhere() -> None:
    model = net()
    shared = pair(1, 7)
    for block in model.blocks[:4]:
        block.norm = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        block.norm[0].weight = block.norm[1].weight = shared
    check(model, lambda m: m(inputs()))


def test_plain_subclasses_may_lie_about_their_shape() -> None:
    model = net()
    for block in model.blocks:
        made = torch.randn(64, 32).as_subclass(Plain)
        block.up.weight = nn.Parameter(made, requires_grad=False)
        assert block.up.weight.shape == (1, 64, 32)
    check(model, lambda m: m(inputs()))


def test_conjugated_negative_and_sparse_weights_stay() -> None:
    class Odd(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            base = raw(8, 8, dtype=torch.complex64, seed=seed)
            base = torch.complex(torch.rand(8, 8), torch.rand(8, 8)) + 0 * base.nan_to_num(0, 0, 0)
            self.conjugate = nn.Parameter(base.conj(), requires_grad=False)
            self.negative = nn.Parameter(base.conj().imag, requires_grad=False)
            self.sparse = nn.Parameter(torch.eye(8).to_sparse(), requires_grad=False)
            self.dense = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = (x.to(torch.complex64) @ self.conjugate).real + x @ self.negative
            return torch.sparse.mm(self.sparse, x) @ self.dense

    torch.manual_seed(3)
    model = nn.Sequential(*[Odd(seed) for seed in range(4)])
    plan = check(model, lambda m: m(torch.eye(8)))[0].plan
    assert plan.block_bytes == 4 * 8 * 8 * 4
    assert plan.outside_bytes == 4 * 8 * 8 * (8 + 4 + 4)


def test_empty_parameters_and_containers() -> None:
    class Sparse(Block):
        def __init__(self, width: int = 32) -> None:
            super().__init__(width)
            self.none = nn.ParameterList()
            self.empty = nn.Parameter(torch.empty(0, width))
            self.named = nn.ParameterDict({"a": torch.randn(width), "b": torch.empty(0)})
            self.register_parameter("missing", None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.cat([x * self.named["a"], self.empty]))

    check(net(block=Sparse), lambda m: m(inputs()))


@pytest.mark.parametrize("where", ["inside", "between", "outside", "all"])
def test_tied_weights(where: str) -> None:
    torch.manual_seed(5)
    shared = nn.Parameter(torch.randn(32, 32))
    model = net()
    for block in model.blocks:
        block.norm = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        if where == "inside":
            block.norm[0].weight = block.norm[1].weight
        if where in ("between", "all"):
            block.norm[1].weight = shared
    if where in ("outside", "all"):
        for block in model.blocks[::2]:
            block.norm[0].weight = shared
        model.last.weight = shared
    reports = check(model, lambda m: m(inputs()))
    # What is used outside as well stays, and counts there; what blocks share moves with each.
    kept = {id(p) for part in (model.first, model.last) for p in part.parameters()}
    for plan in [report.plan for report in reports]:
        assert plan.outside_bytes == sum(
            {id(p): p.nbytes for p in model.parameters() if id(p) in kept}.values()
        )
        sizes = [p.nbytes for b in model.blocks for p in b.parameters() if id(p) not in kept]
        assert plan.block_bytes == sum(sizes)


def test_the_same_memory_under_two_parameters() -> None:
    model = net()
    for block, after in zip(model.blocks, model.blocks[1:], strict=False):
        after.up.weight.data = block.up.weight.data
        block.down.weight.data = block.up.weight.data.t()
    check(model, lambda m: m(inputs()))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_inference_tensors(depth: int) -> None:
    with torch.inference_mode():
        model = net()
        for seed, block in enumerate(model.blocks if depth else []):
            block.norm = nn.Linear(32, 32)
            block.norm.weight = pair(depth, seed)
    assert model.first.weight.is_inference()
    check(model, lambda m: m(inputs()))


def test_a_block_without_anything_to_move() -> None:
    model = net()
    model.blocks[2] = nn.LayerNorm(32, elementwise_affine=False)
    model.blocks[3].up = model.blocks[3].down = nn.Linear(32, 32)
    model.blocks[3].norm = nn.Identity()
    model.blocks[3].up.weight = model.last.weight
    model.blocks[3].up.bias = None
    check(model, lambda m: m(inputs()))


@pytest.mark.parametrize("smallest", [0, 300, 5000, 1 << 30])
def test_small_tensors_stay_where_the_budget_allows(smallest: int) -> None:
    check(net(), lambda m: m(inputs()), min_stream_bytes=smallest)


def test_one_slot_and_two() -> None:
    model = net()
    with dgls_torch.stream(model, 1 << 30, device="cpu", min_stream_bytes=0) as s:
        least, outside = s.plan.least_vram_bytes, s.plan.outside_bytes
    plans = [r.plan for r in check(model, lambda m: m(inputs()), vram=[least, 2 * least - outside])]
    assert plans[0].ring_bytes == least - outside
    assert not any(block.resident_bytes for block in plans[0].blocks)
    assert plans[1].streamed_bytes < plans[0].streamed_bytes


class Copying(Pair):
    """A wrapper that copies its scale whenever it is wrapped, as ComfyUI's quantized tensors do."""

    def __init__(self, payload: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(payload, scale.clone())


def test_a_wrapper_that_copies_a_part_keeps_its_value() -> None:
    model = net()
    for block in model.blocks:
        payload = torch.randint(-9, 9, (64, 32), dtype=torch.int8)
        block.up.weight = nn.Parameter(Copying(payload, torch.rand(64, 1)), requires_grad=False)
    reports = check(model, lambda m: m(inputs()))
    streamed = [b.streamed_bytes for b in reports[0].plan.blocks]
    assert min(streamed) >= 64 * 32, streamed


class CopyingAll(Copying):
    """A wrapper that shares no memory with what it was made of."""

    def __init__(self, payload: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(payload.clone(), scale)


def test_a_wrapper_that_copies_everything_stays_on_the_device() -> None:
    model = net()
    payload = torch.randint(-9, 9, (64, 32), dtype=torch.int8)
    model.blocks[2].up.weight = nn.Parameter(
        CopyingAll(payload, torch.rand(64, 1)), requires_grad=False
    )
    check(model, lambda m: m(inputs()))


def test_a_wrapper_outside_of_blocks_counts_what_it_takes() -> None:
    model = net()
    plain = budgets(model)[0]
    payload = torch.randint(-9, 9, (32, 32), dtype=torch.int8)
    model.first.weight = nn.Parameter(Pair(payload, torch.rand(32, 1)), requires_grad=False)
    with dgls_torch.stream(model, 1 << 30, device="cpu") as s:
        assert s.plan.least_vram_bytes == plain - 32 * 32 * 4 + 32 * 32 + 32 * 4

"""Which modules become blocks, and which budgets they can live with.

Goal: the repeated layers of models of every shape are found, a caller's choice is taken or refused
with its name, and the smallest budget that is named works while one byte less does not.
Method: skeletons of known architectures on meta, and every refusal by its text.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import SMALL, Block, Net, Pair, Snapshot, budgets, check, inputs, net, same, threads
from torch import nn

import dgls_torch
from dgls_torch.blocks import find_blocks, layers_of, models_of, weight_bytes

MIB = 1 << 20


def linears(count: int, width: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(count)])


class Layer(nn.Module):
    """A transformer layer with containers of its own inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )


class Single(Layer):
    """Another class of layers."""


def flux() -> nn.Module:
    model = nn.Module()
    model.embedder = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64))
    model.double = nn.ModuleList(Layer(64) for _ in range(5))
    model.single = nn.ModuleList(Single(64) for _ in range(7))
    model.out = nn.Linear(64, 16)
    return model


def unet() -> nn.Module:
    def stage(width: int) -> nn.Module:
        part = nn.Module()
        part.resnets = nn.ModuleList(nn.Conv2d(width, width, 3) for _ in range(3))
        part.attentions = nn.ModuleList(Layer(width) for _ in range(3))
        return part

    model = nn.Module()
    model.conv_in = nn.Conv2d(4, 32, 3)
    model.down_blocks = nn.ModuleList(stage(width) for width in (32, 64, 128))
    model.mid_block = stage(128)
    model.up_blocks = nn.ModuleList(stage(width) for width in (128, 64, 32))
    return model


def encoder_decoder() -> nn.Module:
    model = nn.Module()
    for name in ("encoder", "decoder"):
        part = nn.Module()
        part.layers = nn.ModuleList(Layer(64) for _ in range(4))
        model.add_module(name, part)
    model.shared = nn.Embedding(50, 64)
    return model


def mapping() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleDict({name: Layer(32) for name in "abcdef"})
    return model


FOUND = {
    "flat": (lambda: linears(6, 32), [str(i) for i in range(6)]),
    "flux": (flux, [f"double.{i}" for i in range(5)] + [f"single.{i}" for i in range(7)]),
    "two stacks": (
        encoder_decoder,
        [f"{part}.layers.{i}" for part in ("encoder", "decoder") for i in range(4)],
    ),
    "dict": (mapping, [f"layers.{name}" for name in "abcdef"]),
    "with activations": (
        lambda: nn.Sequential(*[f() for _ in range(4) for f in (lambda: nn.Linear(8, 8), nn.ReLU)]),
        ["0", "2", "4", "6"],
    ),
    "two": (lambda: linears(2, 8), ["0", "1"]),
    "wrapped": (
        lambda: nn.Sequential(nn.Sequential(linears(5, 16))),
        [f"0.0.{i}" for i in range(5)],
    ),
}


@pytest.mark.parametrize(("make", "names"), FOUND.values(), ids=FOUND)
def test_what_is_found(make: Any, names: list[str]) -> None:
    with torch.device("meta"):
        model = make()
    assert [name for name, _ in find_blocks(model)] == names
    modules = dict(model.named_modules())
    assert all(modules[name] is block for name, block in find_blocks(model))


def test_stages_of_a_unet_are_taken_apart() -> None:
    with torch.device("meta"):
        model = unet()
    blocks = find_blocks(model)
    assert all("attentions" in name or "resnets" in name for name, _ in blocks)
    assert max(weight_bytes(block) for _, block in blocks) * 4 <= weight_bytes(model)
    assert sum(weight_bytes(block) for _, block in blocks) * 2 >= weight_bytes(model)


def test_layers_of_blocks_are_taken_one_by_one() -> None:
    with torch.device("meta"):
        blocks = find_blocks(flux())
        unets = find_blocks(unet())
    of_each = ("attention", "mlp.0", "mlp.2")
    assert [name for name, _ in layers_of(blocks)] == [
        f"{name}.{layer}" for name, _ in blocks for layer in of_each
    ]
    assert {type(layer) for _, layer in layers_of(unets)} == {
        nn.Conv2d,
        nn.Linear,
        nn.MultiheadAttention,
    }
    twice = [("a", blocks[0][1]), ("b", blocks[0][1])]
    assert [name for name, _ in layers_of(twice)] == [f"a.{layer}" for layer in of_each]
    with pytest.raises(ValueError, match=r'unit="layer" needs blocks .* none in 1 of LayerNorm'):
        layers_of([("norm", nn.LayerNorm(3))])


def test_layers_stream_within_less_than_a_block() -> None:
    blocks, layers = budgets(net()), budgets(net(), unit="layer")
    assert layers[0] < blocks[0]
    reports = check(net(), lambda m: m(inputs()), vram=[layers[0], *blocks], unit="layer")
    for report in reports:
        assert [block.name for block in report.plan.blocks] == [
            f"blocks.{i}.{layer}" for i in range(6) for layer in ("up", "down")
        ]
        assert report.mispredicted == 0
    with pytest.raises(ValueError, match="too small"):
        dgls_torch.stream(net(), layers[0] - 1, unit="layer", **SMALL)


def test_what_is_left_of_a_block_beside_its_layers_stays() -> None:
    def made() -> nn.Module:
        model = net()
        for block in model.blocks:
            block.scale = nn.Parameter(torch.full((32,), 0.5), requires_grad=False)
            block.up.register_forward_pre_hook(lambda _, x, scale=block: (x[0] * scale.scale,))
        return model

    before = budgets(net(), unit="layer")[0]
    assert budgets(made(), unit="layer")[0] == before + 6 * 32 * 4
    check(made(), lambda m: m(inputs()), unit="layer")
    names = [f"blocks.{i}" for i in (1, 4)]
    with dgls_torch.stream(made(), blocks=names, unit="layer", exclude=["*.4.up"], **SMALL) as s:
        assert [b.name for b in s.plan.blocks] == ["blocks.1.up", "blocks.1.down", "blocks.4.down"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 3),
        lambda: nn.Sequential(nn.Linear(3, 3)),
        lambda: nn.Sequential(nn.ReLU(), nn.ReLU()),
        lambda: nn.ParameterList([nn.Parameter(torch.ones(3))] * 3),
        lambda: nn.Module(),
    ],
)
def test_no_blocks(make: Any) -> None:
    with pytest.raises(ValueError, match=r"no repeated blocks were found in .* name them with"):
        dgls_torch.stream(make(), 1 << 20, **SMALL)


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        (["blocks"], [f"blocks.{i}" for i in range(6)]),
        (["blocks.1", "blocks.4"], ["blocks.1", "blocks.4"]),
        (["first", "blocks.5", "last"], ["first", "blocks.5", "last"]),
        (["blocks.2.up", "blocks.2.down"], ["blocks.2.up", "blocks.2.down"]),
        (["blocks", "last"], [*(f"blocks.{i}" for i in range(6)), "last"]),
    ],
)
def test_blocks_that_a_caller_names(blocks: list[str], names: list[str]) -> None:
    model = net()
    modules = dict(model.named_modules())
    for chosen in (blocks, tuple(modules[name] for name in blocks)):
        reports = check(model, lambda m: m(inputs()), blocks=chosen)
        assert [block.name for block in reports[0].plan.blocks] == names


class Other(nn.Module):
    pass


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        (["block"], "Net has no module 'block'"),
        (["blocks.9"], "Net has no module 'blocks.9'"),
        ([nn.Linear(1, 1)], "a Linear is not part of the model"),
        (["blocks.1", "blocks.1.up"], "'blocks.1' and 'blocks.1.up' overlap"),
        (["blocks", "blocks.1.up"], "'blocks.1' and 'blocks.1.up' overlap"),
        (["blocks.0.act"], "'blocks.0.act' has no parameters"),
        (["blocks.*"], "no pattern"),
        ([], "at least one"),
    ],
)
def test_blocks_that_are_refused(blocks: list[Any], text: str) -> None:
    model = net()
    model.blocks[0].act = nn.GELU()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=text):
        dgls_torch.stream(model, 1 << 20, blocks=blocks, **SMALL)
    before.check(model)
    assert threads() == []


def test_excluded_blocks_stay() -> None:
    model = net()
    least = {}
    for exclude in ([], ["blocks.1"], ["blocks.[135]"], ["blocks.[!0]"]):
        reports = check(model, lambda m: m(inputs()), exclude=exclude)
        least[len(reports[0].plan.blocks)] = reports[0].plan.least_vram_bytes
    assert sorted(least) == [1, 3, 5, 6]
    assert sorted(least.values(), reverse=True) == [least[n] for n in sorted(least)]
    with pytest.raises(ValueError, match="exclude leaves no block"):
        dgls_torch.stream(model, 1 << 20, exclude=["blocks"], **SMALL)


@pytest.mark.parametrize("missing", [1, 100, 10**9])
def test_a_budget_that_is_too_small_says_what_would_do(missing: int) -> None:
    model = net()
    model.blocks[3] = Block(32)
    model.blocks[3].extra = nn.Parameter(torch.zeros(1000))
    least = budgets(model)[0]
    before = Snapshot(model)
    size = max(1, least - missing)
    with pytest.raises(
        ValueError, match=f"the smallest budget that works is .* .{least} bytes"
    ) as e:
        dgls_torch.stream(model, size, **SMALL)
    for part in (f"({size} bytes)", "'blocks.3'", "outside", "needs"):
        assert part in str(e.value)
    before.check(model)
    assert threads() == []
    check(model, lambda m: m(inputs()), vram=[least])


@pytest.mark.parametrize("smallest", [0, 1 << 16])
def test_the_least_budget_is_exact_for_models_of_any_kind(smallest: int) -> None:
    def wrapped() -> nn.Module:
        model = net()
        made = Pair(torch.randint(0, 9, (32, 32), dtype=torch.int8), torch.rand(32, 1))
        model.blocks[1].up.weight = nn.Parameter(Pair(made, torch.rand(32, 1)), requires_grad=False)
        model.blocks[1].up.forward = lambda x: torch.cat([x @ made.dense()] * 2, -1)
        return model

    def tied() -> nn.Module:
        model = net()
        model.blocks[0].down.weight = model.blocks[4].down.weight
        model.blocks[2].up.weight = nn.Parameter(model.last.weight.new_zeros(64, 32))
        model.last.weight = nn.Parameter(model.blocks[2].up.weight[:32])
        return model

    for make in (net, wrapped, tied):
        model = make()
        options = {"min_stream_bytes": smallest}
        least = budgets(model, **options)[0]
        check(model, lambda m: m(inputs()), vram=[least, least + 1], **options)
        with pytest.raises(ValueError, match="too small"):
            dgls_torch.stream(model, least - 1, **(SMALL | options))


@pytest.mark.parametrize(
    ("vram", "size"),
    [("1MiB", MIB), ("0.5 GiB", 1 << 29), ("8GiB", 8 << 30), (8e9, 8 * 10**9), (MIB, MIB)],
)
def test_budgets_in_any_form(vram: Any, size: int) -> None:
    model = net()
    for options in ({"vram": vram}, {"config": dgls_torch.StreamConfig(vram=vram)}):
        with dgls_torch.stream(model, **SMALL, **options) as s:
            assert s.plan.vram_bytes == size
            assert s.plan.outside_bytes + s.plan.arena_bytes <= size


def test_auto_takes_what_is_there() -> None:
    model = net()
    for options in ({}, {"vram": "auto"}, {"vram": None}):
        with dgls_torch.stream(model, **SMALL, **options) as s, torch.inference_mode():
            assert s.plan.streamed_bytes == 0
            assert same(model(inputs()), net()(inputs()))
            before = s.plan
            s.replan()
            s.replan("auto")
            assert s.plan.streamed_bytes == 0
            assert abs(s.plan.vram_bytes - before.vram_bytes) < 2 << 30
            s.replan(budgets(net())[0])
            assert 0 < s.plan.ring_bytes == s.plan.arena_bytes


@pytest.mark.parametrize("vram", ["", "much", "8 apples", -1, 0, True, float("nan"), [1], b"8GiB"])
def test_nonsense_is_refused(vram: Any) -> None:
    model = net()
    before = Snapshot(model)
    with pytest.raises((ValueError, TypeError), match="vram"):
        dgls_torch.stream(model, vram, **SMALL)
    before.check(model)


def test_overrides_of_a_config() -> None:
    config = dgls_torch.StreamConfig(vram="1GiB", device="cpu", trace_passes=3, min_stream_bytes=7)
    model = net()
    with dgls_torch.stream(model, "2GiB", config=config, poison=True) as s:
        assert s.config == config.replace(vram="2GiB", poison=True)
    with pytest.raises(TypeError, match="did you mean 'poison'"):
        dgls_torch.stream(model, poisson=True)


def test_pipelines_share_a_budget_by_weight() -> None:
    class Pipe:
        def __init__(self) -> None:
            self.transformer, self.unet, self.vae = net(9), net(3, seed=1), nn.Linear(1, 1)

    pipe, x = Pipe(), inputs()
    assert [name for name, _ in models_of(pipe)] == ["transformer", "unet"]
    expected = [pipe.transformer(x), pipe.unet(x)]
    with torch.inference_mode(), dgls_torch.stream(pipe, 100_000, **SMALL) as group:
        sizes = [plan.vram_bytes for plan in group.plan.values()]
        assert 99_998 <= sum(sizes) <= 100_000
        assert sizes[0] > 2 * sizes[1]
        for vram in (None, 120_000, "auto"):
            group.replan(vram)
            assert same([pipe.transformer(x), pipe.unet(x)], expected)
        assert [report.passes for report in group.report().values()] == [3, 3]  # none is lost
    assert threads() == []
    with pytest.raises(ValueError, match="too small"):
        dgls_torch.stream(pipe, 30_000, **SMALL)
    assert threads() == []
    for thing in (object(), None, 3, Other):
        with pytest.raises(TypeError, match=r"needs an nn\.Module or a pipeline"):
            dgls_torch.stream(thing, **SMALL)


def test_weights_on_a_device_are_refused_by_name() -> None:
    model = Net()
    model.blocks[2].up.to("meta")
    with pytest.raises(ValueError, match=r"'blocks\.2\.up\.weight' is on the meta device"):
        dgls_torch.stream(model, 1 << 20, **SMALL)
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        dgls_torch.stream(net(), 1 << 20, **(SMALL | {"device": "cuda:77"}))
    assert threads() == []

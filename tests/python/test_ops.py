"""torch.ops.dgls.*: an engine without the hooks, and what happens to arguments that make no sense.

Goal: another project can drive an engine by the ops alone; every misuse is a RuntimeError that says
what was needed and what was found, and the process lives on.
Method: a hand-written loop over wait and release whose weights are compared bit by bit; the schemas
as torch holds them; one bad argument at a time.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import settle, threads

import dgls_torch

if TYPE_CHECKING:
    from pathlib import Path

ops = torch.ops.dgls
X = torch.zeros(1)
SIZES = [(100, 7), (300,), (64, 64), (1,), (2000,)]


def weights(seed: int = 0, count: int = 5) -> list[list[torch.Tensor]]:
    torch.manual_seed(seed)
    return [[torch.randn(SIZES[(i + j) % 5]) for j in range(3)] for i in range(count)]


def make(blocks: list[list[torch.Tensor]], budget: int, **options: Any) -> tuple[int, torch.Tensor]:
    flat = [tensor for block in blocks for tensor in block]
    owner = [number for number, block in enumerate(blocks) for _ in block]
    order = options.pop("order", list(range(len(blocks))))
    least = options.get("min_stream_bytes", 0)
    facts = ops.plan([t.nbytes for t in flat], owner, order, budget, least)[1]
    arena = torch.full((facts[3],), 0xA5, dtype=torch.uint8)
    return ops.create(arena, flat, [], [], [], [], owner, order, budget, **options), arena


def positions(engine: int) -> list[tuple[int, list[int]]]:
    flat, uses = ops.layout(engine), []
    while flat:
        block, count = flat[:2]
        uses.append((block, flat[2 : 2 + count]))
        flat = flat[2 + count :]
    return uses


def use(engine: int, arena: torch.Tensor, blocks: list[list[torch.Tensor]], block: int) -> None:
    """Waits for a block, compares its weights in the arena, and releases it."""
    position = ops.wait(X, engine, block)
    found, offsets = positions(engine)[position]
    assert found == block
    for tensor, offset in zip(blocks[block], offsets, strict=True):
        assert offset % 256 == 0
        data = arena[offset : offset + tensor.nbytes]
        assert torch.equal(data, tensor.reshape(-1).view(torch.uint8)), f"block {block}"
    ops.release(X, engine, block)


def least_bytes(blocks: list[list[torch.Tensor]]) -> int:
    return max(sum(-(-t.nbytes // 256) * 256 for t in block) for block in blocks)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_loop_by_hand(share: float) -> None:
    blocks = weights()
    least = least_bytes(blocks)
    engine, arena = make(blocks, int(least + share * 5 * least), poison=True)
    ops.prefetch(engine)
    for _ in range(6):
        ops.begin_pass(engine)
        for block in range(5):
            use(engine, arena, blocks, block)
        ops.end_pass(engine)
    stats = ops.stats(engine)
    assert stats[:6] == [30, 0, 0, 0, 0, 6]
    chance = random.Random(int(share * 10))
    for _ in range(100):
        use(engine, arena, blocks, chance.randrange(5))
    assert ops.stats(engine)[0] == 130
    ops.destroy(engine)
    assert threads() == []


def test_rebuild_for_an_order_and_a_budget() -> None:
    blocks = weights()
    least = least_bytes(blocks)
    engine, arena = make(blocks, least)
    order = [4, 0, 0, 2]
    ops.begin_pass(engine)
    for block in order:
        use(engine, arena, blocks, block)
    assert not ops.wants_rebuild(engine)
    ops.end_pass(engine)
    assert ops.wants_rebuild(engine)
    assert ops.order(engine) == [0, 1, 2, 3, 4]
    for budget in (least, 2 * least, 9 * least, least):
        size = ops.plan_for(engine, budget)[1][3]
        arena = torch.empty(size, dtype=torch.uint8)
        ops.rebuild(engine, arena, budget)
        assert ops.order(engine) == order
        assert not ops.wants_rebuild(engine)
        for block in order * 3 + [1, 3]:
            use(engine, arena, blocks, block)
    ops.destroy(engine)


def test_reload() -> None:
    blocks = weights()
    engine, arena = make(blocks, 1 << 30)
    for number in range(5):
        for block in range(5):
            use(engine, arena, blocks, block)
        blocks[number][0] += 1
        ops.reload(engine, number)
    ops.destroy(engine)


def test_weights_from_files(tmp_path: Path) -> None:
    blocks = weights()
    files, spans = [], []
    for number in range(2):
        files.append(str(tmp_path / f"{number}.bin"))
        data = bytearray(13)  # nothing needs to be aligned
        for owner, block in enumerate(blocks):
            tensor = block[1 + number]
            spans.append((number, len(data), tensor.nbytes, owner))
            data += tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        (tmp_path / f"{number}.bin").write_bytes(data)
    numbers, offsets, sizes, owners = (list(column) for column in zip(*spans, strict=True))
    budget = least_bytes(blocks)
    arena = torch.empty(budget, dtype=torch.uint8)
    memory = [block[0] for block in blocks]
    order, owned = list(range(5)), [*range(5), *owners]
    engine = ops.create(arena, memory, numbers, offsets, sizes, files, owned, order, budget)
    for _ in range(3):
        for block in range(5):
            use(engine, arena, blocks, block)
    ops.destroy(engine)
    for bad, text in [((9, 0, 4), "file_index must be in 0..2, got 9"), ((-1, 0, 4), "got -1")]:
        with pytest.raises(RuntimeError, match=text):
            ops.create(arena, [], [bad[0]], [bad[1]], [bad[2]], files, [0], [0], budget)
    engine = ops.create(arena, [], [0], [1 << 40], [64], files, [0], [0], budget)
    with pytest.raises(RuntimeError, match=r"reading 64 bytes at offset 1099511627776 of 0\.bin"):
        ops.wait(X, engine, 0)
    ops.destroy(engine)
    with pytest.raises(RuntimeError, match=r"of gone.bin failed: No such file"):
        ops.create(arena, [], [0], [0], [4], [str(tmp_path / "gone.bin")], [0], [0], budget)


def test_plan_by_itself() -> None:
    resident, facts = ops.plan([1000, 1000, 5000], [0, 1, 1], [0, 1, 0, 1], 1 << 20)
    assert resident == [1, 1, 1]
    assert facts == [1024 + 1024 + 5120, 0, 0, 7168, 6144, 1, -1, -1]
    resident, facts = ops.plan([1000, 1000, 5000], [0, 1, 1], [0, 1], 6144)
    assert facts[1] + facts[0] == 7168
    assert facts[3] <= 6144
    assert ops.plan([], [], [], 0) == ([], [0, 0, 0, 0, 0, 1, -1, -1])
    for arguments, text in [
        (([1000], [0], [0], 1023), "block 0 needs 1024 bytes but the budget .* is 1023 bytes"),
        (([0], [0], [0], 10), "tensor 0 has 0 bytes"),
        (([-1], [0], [0], 10), "tensor_bytes must not be negative, got -1"),
        (([1], [-1], [0], 1000), r"tensor_block must be in 0\.\.2\^32-1, got -1"),
        (([1], [0, 1], [0], 1000), "tensor_bytes and tensor_block must have the same length"),
        (([1], [0], [-2], 1000), "order must be in"),
        (([1], [0], [1 << 40], 1000), "order must be in"),
        (([1], [0], [0], -1), "budget must not be negative"),
        (([1], [0], [0], 1000, -1), "min_stream_bytes must not be negative"),
        (([1 << 61, 1 << 61], [0, 0], [0], 1000), r"add up to 2\^62 bytes"),
        (([1], [1 << 31], [0], 1000), "blocks"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            ops.plan(*arguments)


def test_an_engine_that_is_not_there() -> None:
    engine, arena = make(weights(), 1 << 20)
    ops.destroy(engine)
    ops.destroy(engine)
    ops.destroy(-5)
    for number in (engine, 0, -1, 1 << 40):
        for call in (
            lambda n: ops.wait(X, n, 0),
            lambda n: ops.release(X, n, 0),
            lambda n: ops.prefetch(n),
            lambda n: ops.layout(n),
            lambda n: ops.order(n),
            lambda n: ops.stats(n),
            lambda n: ops.trace(n),
            lambda n: ops.plan_for(n, 100),
            lambda n: ops.rebuild(n, arena, 100),
            lambda n: ops.begin_pass(n),
            lambda n: ops.end_pass(n),
            lambda n: ops.wants_rebuild(n),
            lambda n: ops.reload(n, 0),
            lambda n: dgls_torch._C.take_back(n),
            lambda n: dgls_torch._C.runner(n),
        ):
            with pytest.raises(RuntimeError, match=f"dgls engine {number} does not exist"):
                call(number)


def test_calls_out_of_turn() -> None:
    blocks = weights()
    engine, arena = make(blocks, least_bytes(blocks))
    with pytest.raises(RuntimeError, match="a block ended that had not begun"):
        ops.release(X, engine, 0)
    for block in (5, 99, (1 << 32) - 1):
        with pytest.raises(RuntimeError, match=f"block {block} is not in the plan"):
            ops.wait(X, engine, block)
        with pytest.raises(RuntimeError, match=f"block {block} is not in the plan"):
            ops.reload(engine, block)
    for block in (-1, 1 << 32):
        with pytest.raises(RuntimeError, match="block must be in"):
            ops.wait(X, engine, block)
    ops.wait(X, engine, 2)
    for block in (2, 3):
        with pytest.raises(RuntimeError, match=f"block {block} began while block 2 runs"):
            ops.wait(X, engine, block)
    with pytest.raises(RuntimeError, match="cannot change while block 2 runs"):
        ops.rebuild(engine, arena, 1 << 30)
    ops.release(X, engine, 2)
    for block in range(5):
        use(engine, arena, blocks, block)
    ops.destroy(engine)


def test_arenas_that_do_not_fit() -> None:
    tensors, blocks = [torch.zeros(100), torch.zeros(100)], [0, 1]

    def create(arena: torch.Tensor, budget: int = 1024, **options: Any) -> int:
        return ops.create(arena, tensors, [], [], [], [], blocks, blocks, budget, **options)

    one_dimension = "contiguous uint8 tensor of one dimension"
    for arena, text in [
        (torch.zeros(1023, dtype=torch.uint8), "needs an arena of 1024 bytes, got 1023 bytes"),
        (torch.zeros(0, dtype=torch.uint8), "needs an arena of 1024 bytes, got 0 bytes"),
        (torch.zeros(2048, dtype=torch.uint8)[1:], "multiple of 64 bytes"),
        (torch.zeros(2048, dtype=torch.float32), one_dimension),
        (torch.zeros(2048, dtype=torch.bool), one_dimension),
        (torch.zeros(4096, dtype=torch.uint8)[::2], one_dimension),
        (torch.zeros(32, 64, dtype=torch.uint8), one_dimension),
    ]:
        with pytest.raises(RuntimeError, match=text):
            create(arena)
    good = torch.zeros(1024, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"block . needs 512 bytes but the budget .* 511 bytes"):
        create(good, 511)
    for name in ("min_stream_bytes", "pinned_bytes", "staging_bytes", "trace_uses"):
        with pytest.raises(RuntimeError, match=f"{name} must not be negative, got -7"):
            create(good, **{name: -7})
    with pytest.raises(RuntimeError, match="copy_bytes_per_s must not be negative"):
        create(good, copy_bytes_per_s=-1)
    with pytest.raises(RuntimeError, match=r"driver must be auto, host .* or cuda, got tpu"):
        create(good, driver="tpu")
    engine = create(good)
    with pytest.raises(RuntimeError, match="needs an arena of 1024 bytes, got 8 bytes"):
        ops.rebuild(engine, torch.zeros(8, dtype=torch.uint8), 1024)
    with pytest.raises(RuntimeError, match=one_dimension):
        ops.rebuild(engine, torch.zeros(2048, dtype=torch.float32), 1024)
    ops.wait(X, engine, 0)
    ops.destroy(engine)
    assert threads() == []


def test_lists_that_do_not_match() -> None:
    arena, tensors = torch.zeros(1024, dtype=torch.uint8), [torch.zeros(100), torch.zeros(100)]
    for arguments, text in [
        ((tensors, [], [], [], [], [0], [0]), "a block for each of the 2 tensors, got 1"),
        ((tensors, [], [], [], [], [0, 0, 0], [0]), "a block for each of the 2 tensors, got 3"),
        ((tensors, [0], [], [], ["a"], [0, 0, 0], [0]), "must have the same length"),
        ((tensors, [], [0], [], ["a"], [0, 0], [0]), "must have the same length"),
        ((tensors, [0], [-1], [4], ["a"], [0, 0, 0], [0]), "file_offset must not be negative"),
        ((tensors, [0], [0], [-4], ["a"], [0, 0, 0], [0]), "file_bytes must not be negative"),
        (([torch.zeros(1, device="meta")], [], [], [], [], [0], [0]), "none on meta"),
        (([torch.zeros(0)], [], [], [], [], [0], [0]), "tensor 0 has 0 bytes"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            ops.create(arena, *arguments, 1024)


def test_the_engine_keeps_its_tensors_alive() -> None:
    blocks = weights()
    engine, arena = make(blocks, least_bytes(blocks))
    again, where = weights(), arena.data_ptr()
    del blocks, arena
    settle()
    filler = [torch.zeros(size) for size in [(64, 64)] * 50]
    for block in range(5):
        position = ops.wait(X, engine, block)
        assert positions(engine)[position][0] == block
        ops.release(X, engine, block)
    assert all(tensor.data_ptr() != where for tensor in filler)
    assert again
    ops.destroy(engine)


def test_schemas() -> None:
    for name, schema in {
        "wait": "dgls::wait(Tensor(a!) x, int engine, int block) -> int",
        "release": "dgls::release(Tensor(a!) x, int engine, int block) -> ()",
        "plan": "dgls::plan(int[] tensor_bytes, int[] tensor_block, int[] order, "
        "int budget_bytes, int min_stream_bytes=0) -> (int[], int[])",
    }.items():
        assert str(getattr(ops, name).default._schema) == schema
    doc = __import__("dgls_torch.ops").ops.__doc__
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("dgls::") and not name.startswith("dgls::_"):
            assert name.removeprefix("dgls::").split(".")[0] in doc, f"{name} is not documented"


def test_opcheck() -> None:
    blocks = weights()
    engine, arena = make(blocks, least_bytes(blocks))
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.rebuild.default, (engine, arena, arena.numel()), test_utils=utils)
    ops.destroy(engine)
    arguments = ([1000], [0], [0], 4096)
    torch.library.opcheck(ops.plan.default, arguments, test_utils="test_schema")


def test_ops_in_a_compiled_function() -> None:
    blocks = weights()
    engine, arena = make(blocks, least_bytes(blocks))

    @torch.compile(backend="eager")
    def step(x: torch.Tensor, block: int) -> Any:
        position = ops.wait(x, engine, block)
        y = x * 2
        ops.release(x, engine, block)
        return y, position

    for number in range(10):
        result, position = step(torch.ones(3), number % 5)
        assert torch.equal(result, torch.full((3,), 2.0))
        assert positions(engine)[position][0] == number % 5
        assert ops.stats(engine)[0] == number + 1
    use(engine, arena, blocks, 0)
    ops.destroy(engine)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_ops_leave_the_tensor_that_orders_them_alone(mode: Any) -> None:
    blocks = weights()
    engine, _ = make(blocks, least_bytes(blocks))
    leaf = torch.ones(3, requires_grad=True)
    with mode():
        for x in (leaf, leaf * 2, torch.ones(3)):
            ops.wait(x, engine, 1)
            ops.release(x, engine, 1)
            assert x.is_inference() or x._version == 0
    (leaf * 2).sum().backward()
    ops.destroy(engine)


def test_a_panic_is_an_error_and_the_process_lives() -> None:
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"internal error .please report it.: a panic"):
            ops._panic()
    engine, arena = make(weights(), 1 << 20)
    use(engine, arena, weights(), 3)
    ops.destroy(engine)


@pytest.mark.parametrize("page_locked", [False, True])
def test_measuring(page_locked: bool) -> None:
    assert ops.measure_copy(-1, 1 << 16, 3, page_locked) > 0
    assert 0 <= ops.measure_page_lock(-1, 1 << 16) <= 1 << 16
    for arguments in ((-1, 0, 1), (-1, -1, 1), (-1, 4096, -1), (-1, 1 << 50, 1)):
        with pytest.raises(RuntimeError, match=r"bytes|repeats"):
            ops.measure_copy(*arguments, page_locked)
    for device in (-2, 1 << 40):
        with pytest.raises(RuntimeError, match=f"device must be .* got {device}"):
            ops.measure_copy(device, 4096, 1, page_locked)
        with pytest.raises(RuntimeError, match=f"device must be .* got {device}"):
            ops.measure_page_lock(device, 4096)
    with pytest.raises(RuntimeError, match="max_bytes must not be negative"):
        ops.measure_page_lock(-1, -1)

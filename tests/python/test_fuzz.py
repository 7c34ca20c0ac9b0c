"""Input that nobody meant: headers, indexes, configurations and op arguments at random.

Goal: whatever is given, the answer is a result or an exception of the documented kind; the process
neither ends nor allocates by a number that it was given.
Method: right input, changed at random by seed (`DGLS_SEEDS` multiplies the rounds). Ops run in a
process of their own with little address space, where an abort is seen.
"""

from __future__ import annotations

import json
import math
import os
import random
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save

from dgls_torch import StreamConfig
from dgls_torch.files import SafetensorsFile, SafetensorsSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from processes import Processes

FACTOR = int(os.environ.get("DGLS_SEEDS", "1"))
NUMBERS = [0, 1, -1, 7, 255, 4096, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64]
ODD: list[Any] = [*NUMBERS, -(2**63), 10**400, 0.0, -0.0, 1.5, 1e308, math.nan, math.inf, None]
ODD += [True, False, "", "auto", "8GiB", "-1", "cuda:99", "cpu", "é\0", "a" * 5000, b"x", "*", "."]
ODD += [[], {}, (), {"a": 1}, [[]], ["blocks.0", 1], [None], object(), object, set(), range(3)]


def spoilt(value: Any, chance: random.Random) -> Any:
    """Something wrong at a random place of a JSON value."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice([*value])
        way = chance.randrange(10)
        if way == 0:
            return {k: v for k, v in value.items() if k != key}
        if way == 1:
            return {**value, key + "_": value[key]}
        return {**value, key: spoilt(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        way = chance.randrange(10)
        if way == 0:
            return value[:at] + value[at + 1 :]
        return [*value[:at], spoilt(value[at], chance), *value[at + (way != 1) :]]
    plain = [odd for odd in ODD if isinstance(odd, (int, float, str, list, dict, type(None)))]
    return chance.choice([*plain, "F32", "BF16", [0, 4], -4])


def scratched(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut off, put in or doubled."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(changed) + 1)
        way = chance.randrange(6)
        if way == 0:
            del changed[at:]
        elif way == 1:
            changed[at:at] = changed[at : at + chance.randrange(20)]
        elif way == 2:
            changed[:8] = chance.choice(NUMBERS[:-3]).to_bytes(9, "little", signed=True)[:8]
        elif changed:
            changed[min(at, len(changed) - 1)] = chance.randrange(256)
    return bytes(changed)


def right_file() -> bytes:
    tensors = {"a.weight": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}
    return save(tensors | {"c": torch.zeros(0, 3), "d": torch.tensor(True)}, {"format": "pt"})


def refused(read: Any, most_bytes: int) -> bool:
    """Whether it was; in any case nothing large was allocated."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    text = said(read, (ValueError, OSError))
    assert tracemalloc.get_traced_memory()[1] - before < most_bytes
    assert text is None or 10 < len(text) < 1000, text
    return text is not None


def said(call: Callable[[], object], kinds: tuple[type[Exception], ...]) -> str | None:
    """What an exception of these kinds said; nothing if there was none."""
    try:
        call()
    except kinds as error:
        return str(error)
    return None


@pytest.fixture
def traced() -> Any:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
def test_safetensors_headers(tmp_path: Path) -> None:
    data, chance = right_file(), random.Random(1)
    length = int.from_bytes(data[:8], "little")
    header, bulk = json.loads(data[8 : 8 + length]), data[8 + length :]
    path = tmp_path / "x.safetensors"
    refusals, rounds = 0, 3000 * FACTOR
    for _ in range(rounds):
        if chance.random() < 0.5:
            path.write_bytes(scratched(data, chance))
        else:
            value: Any = header
            for _ in range(chance.randrange(1, 4)):
                value = spoilt(value, chance)
            text = json.dumps(value).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + bulk)

        def read() -> None:
            file = SafetensorsFile(path)
            for name, tensor in file.tensors.items():
                assert tensor.offset + tensor.bytes <= file.size
                file.load_tensor(name)

        refusals += refused(read, 1 << 20)
    assert rounds // 2 < refusals < rounds


@pytest.mark.usefixtures("traced")
def test_safetensors_indexes(tmp_path: Path) -> None:
    chance = random.Random(2)
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(right_file())
    right = {
        "metadata": {"total_size": 60},
        "weight_map": {"a.weight": "model-1.safetensors", "b": "model-2.safetensors"},
    }
    path = tmp_path / "model.safetensors.index.json"
    refusals, rounds = 0, 1500 * FACTOR
    for _ in range(rounds):
        text = json.dumps(spoilt(spoilt(right, chance), chance)).encode()
        path.write_bytes(scratched(text, chance) if chance.random() < 0.3 else text)
        refusals += refused(lambda: SafetensorsSource(tmp_path), 1 << 20)
    assert rounds // 3 < refusals < rounds


def test_configurations() -> None:
    """Only ValueError and TypeError, and what is accepted is stored in its one form."""
    chance, names = random.Random(3), [*StreamConfig.__dataclass_fields__]
    accepted: list[StreamConfig] = []
    rounds = 20_000 * FACTOR
    for _ in range(rounds):
        fields = {name: chance.choice(ODD) for name in chance.sample(names, chance.randrange(1, 4))}
        text = said(
            lambda fields=fields: accepted.append(StreamConfig(**fields)), (ValueError, TypeError)
        )
        assert text is None or 10 < len(text) < 20_000, fields
    for config in accepted:
        assert config.replace() == config
        assert isinstance(config.staging_bytes, int)
        assert config.excludes("blocks.0") in (True, False)
    assert rounds // 50 < len(accepted) < rounds // 2


OPS = """
import math, random, resource, sys, torch
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
chance = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else SEED)
NUMBERS = [0, 1, 2, 3, -1, -2, 255, 256, 4096, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40,
           2**53, 2**62, 2**63 - 1, -2**63]
# What may block or touch the whole machine is not called with what it would take.
SKIPPED = {"_panic"}
def number():
    return chance.choice(NUMBERS if chance.random() < 0.5 else [0, 1, 2, 3, 5, 256, 1024])
def tensor():
    dtype = chance.choice([torch.uint8, torch.float32, torch.int64, torch.bool, torch.bfloat16])
    shape = chance.choice([(), (0,), (1,), (4096,), (3, 5), (2, 0, 3), (1 << 16,)])
    made = torch.zeros(shape, dtype=dtype, device=chance.choice(["cpu", "cpu", "cpu", "meta"]))
    return made.t() if made.dim() == 2 else made
def text():
    plan = '{"blocks": [{"bytes": 10}], "budget_bytes": 100, "h2d_bytes_per_s": 1e6}'
    return chance.choice(["", "auto", "host", "cuda", "/nowhere", "/dev/null", "/proc/self/mem",
                          "a\\0b", "{}", "[", plan, plan.replace("10}", "1e400}"), "\\n" * 99])
def numbers():
    return [number() for _ in range(chance.randrange(5))]
MAKE = {
    "Tensor": tensor, "int": number, "bool": lambda: chance.random() < 0.5, "str": text,
    "Optional[Tensor]": lambda: chance.choice([None, tensor()]),
    "List[int]": numbers,
    "List[Tensor]": lambda: [tensor() for _ in range(chance.randrange(4))],
    "List[str]": lambda: [text() for _ in range(chance.randrange(3))],
}
def usual():
    # An engine that can be made, or nearly.
    sizes = [chance.choice([256, 4096, 0]) for _ in range(4)]
    given = [torch.zeros(1 << 15, dtype=torch.uint8), [torch.zeros(n, dtype=torch.uint8)
             for n in sizes], [], [], [], [], [0, 0, 1, 1], [0, 1], 1 << 14]
    if chance.random() < 0.5:
        at = chance.randrange(len(given))
        given[at] = MAKE[["Tensor", "List[Tensor]", *["List[int]"] * 3, "List[str]",
                          *["List[int]"] * 2, "int"][at]]()
    return given
names = [n for n in dir(torch.ops.dgls) if n not in SKIPPED and not n.startswith("__")]
schemas = {}
for schema in torch._C._jit_get_all_schemas():
    if schema.name.startswith("dgls::") and schema.name[6:] not in SKIPPED:
        schemas[schema.name[6:] + ("." + schema.overload_name if schema.overload_name else "")] = (
            [str(a.type) for a in schema.arguments])
assert len(schemas) > 20, schemas
engines, done, told = [], 0, 0
def call(name):
    base, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.dgls, base), overload or "default")
    if base == "create" and chance.random() < 0.8:
        given = usual()
    else:
        given = [MAKE[kind]() for kind in schemas[name]]
        kinds = schemas[name]
        if engines and "int" in kinds and chance.random() < 0.8 and base != "create":
            given[kinds.index("int")] = chance.choice(engines)
    if base.startswith("measure"):
        given[1] = min(given[1], 1 << 22) if chance.random() < 0.9 else 2**62
        if base == "measure_copy":
            given[2] = min(given[2], 3)
    print(name, repr(given)[:500], file=log, flush=True)
    found = op(*given)
    if base == "create":
        engines.append(found)
log = open(PATH, "w")
for _ in range(ROUNDS):
    name = chance.choice([*schemas, "create"])
    try:
        call(name)
        done += 1
    except (RuntimeError, ValueError, TypeError, NotImplementedError, OverflowError) as error:
        told += 1
        assert len(str(error)) > 5, error
    if len(engines) > 20:
        torch.ops.dgls.destroy(engines.pop(0))
for engine in engines:
    torch.ops.dgls.destroy(engine)
print(done, told)
"""


@pytest.mark.parametrize("seed", range(3))
def test_ops(processes: Processes, seed: int, tmp_path: Path) -> None:
    log, rounds = tmp_path / "calls", 4000 * FACTOR
    settings = f"SEED, ROUNDS, PATH = {seed}, {rounds}, {str(log)!r}\n"
    done = processes.run(settings + OPS, seconds=120 * FACTOR)
    last = log.read_text().splitlines()[-1]
    # Torch writes to stderr on its own when it has no driver to ask.
    assert done.code == 0, f"{done.err[-2000:]}\nthe last call: {last}"
    worked, told = map(int, done.out.split())
    assert worked > rounds // 20
    assert told > rounds // 4


@pytest.mark.parametrize("block", [2**16, 2**20, 2**32 - 1])
def test_a_block_of_a_large_number_is_refused_at_once(block: int) -> None:
    """As many blocks as the highest number says would be planned for."""
    with pytest.raises(RuntimeError, match=rf"up to 65536 blocks, got {block + 1}"):
        torch.ops.dgls.plan([1], [block], [], 512)

"""What torch.ops.dgls.plan.json refuses.

Goal: inputs that are wrong are refused with the field, the value and what it may be; none crash.
Method: one good input, one change at a time; text that is no JSON; random damage.
"""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

import pytest
import torch

import dgls_torch  # noqa: F401

GOOD: dict[str, Any] = {
    "blocks": [
        {"bytes": 1000, "compute_s": 0.5, "count": 4, "tensor_bytes": [600, 400]} for _ in range(3)
    ],
    "budget_bytes": 4000,
    "h2d_bytes_per_s": 1e3,
    "copy_latency_s": 1e-5,
    "outside_s": 0.1,
    "granularity": "tensor",
    "static_addresses": True,
    "verify": True,
}


def ask(text: str) -> Any:
    return json.loads(torch.ops.dgls.plan.json(text))


def refused(text: str) -> str:
    with pytest.raises(RuntimeError) as caught:
        ask(text)
    sentence = str(caught.value)
    assert "panic" not in sentence
    assert len(sentence) < 500
    return sentence


def changed(path: str, value: object) -> dict[str, Any]:
    inputs: Any = copy.deepcopy(GOOD)
    at = inputs
    *above, last = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", path)]
    for part in above:
        at = at[part]
    at[last] = value
    return inputs


INF, NAN = float("inf"), float("nan")
WRONG: list[tuple[str, list[object]]] = [
    ("blocks", [None, 5, "x", {}, []]),
    ("blocks[1]", [None, 5, []]),
    ("blocks[1].bytes", [-1, 1.5, "x", None, True, 2**63, 1e3, NAN]),
    ("blocks[1].compute_s", [-0.1, INF, NAN, -INF, "x", None, True, []]),
    ("blocks[1].count", [0, -1, 1.5, None, "2", 2**40]),
    ("blocks[1].tensor_bytes", [5, "x", {}, [600], [600, 401], []]),
    ("blocks[1].tensor_bytes[0]", [-600, 0.5, "x", None]),
    ("budget_bytes", [-1, 1.5, "8GiB", None, 2**63, NAN]),
    ("h2d_bytes_per_s", [0, -1.0, INF, NAN, "25GB/s", None]),
    ("copy_latency_s", [-1e-9, INF, NAN, "10us", None]),
    ("outside_s", [-1.0, INF, NAN, "x"]),
    ("granularity", [0, -1, 1.5, "bytes", True, []]),
    ("static_addresses", [0, 1, "yes"]),
    ("verify", [0, 1, "yes"]),
    ("resident", [5, "0", [-1], [12], [0.5]]),
    ("prefetch", [-1, 0.5, "1"]),
]


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG for value in values]
)
def test_a_wrong_value_is_named(field: str, value: object) -> None:
    sentence = refused(json.dumps(changed(field, value)))
    # What is in a list is named by its place or by the list.
    assert field in sentence, sentence


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_pythons_json_writes_for_no_number_is_named(value: float) -> None:
    sentence = refused(json.dumps(changed("blocks[2].compute_s", value)))
    assert "blocks[2].compute_s" in sentence
    assert ("NaN" if value != value else "Infinity") in sentence


@pytest.mark.parametrize("field", ["blocks", "budget_bytes", "h2d_bytes_per_s", "copy_latency_s"])
def test_a_missing_field_is_named(field: str) -> None:
    assert field in refused(json.dumps({k: v for k, v in GOOD.items() if k != field}))


@pytest.mark.parametrize("field", ["bytes", "compute_s"])
def test_a_missing_field_of_a_block_is_named(field: str) -> None:
    inputs = copy.deepcopy(GOOD)
    del inputs["blocks"][2][field]
    assert re.search(rf"blocks\[[0-2]\]\.{field}", refused(json.dumps(inputs)))


def test_unknown_fields_are_named() -> None:
    assert "h2d_rate" in refused(json.dumps(GOOD | {"h2d_rate": 1}))
    assert "seconds" in refused(json.dumps(changed("blocks[0].seconds", 1)))


NO_OBJECT = [
    "",
    "{",
    "[]",
    "null",
    "5",
    '"x"',
    "{}x",
    '{"blocks": }',
    "\0",
    "nan",
    "{'blocks': []}",
]
DEEP = ["[" * 100_000, '{"a":' * 100_000, '{"budget_bytes": 1' + "0" * 400 + "}"]


@pytest.mark.parametrize("text", [*NO_OBJECT, *DEEP], ids=range(len(NO_OBJECT + DEEP)))
def test_what_is_no_json_object_is_refused(text: str) -> None:
    refused(text)


def test_damaged_text_never_crashes() -> None:
    rng = random.Random(0)
    text = json.dumps(GOOD)
    sentences = []
    for _ in range(2000):
        at = rng.randrange(len(text))
        damaged = text[:at] + rng.choice('{}[]",:0-eN. ') + text[at + rng.randrange(3) :]
        try:
            ask(damaged)
        except RuntimeError as error:
            sentences.append(str(error))
    assert len(sentences) > 1000
    assert not any("panic" in sentence for sentence in sentences)

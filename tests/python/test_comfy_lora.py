"""LoRA factors on the device: what is moved, what it counts, and when it is given back.

Goal: a LoRA's factors are on the device once, counted, and only where they are small.
Method: adapters in the form of ComfyUI's; the meta device stands for one that is not the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy_world import free_all, patcher, sample, streamed

from dgls_torch.comfy.lora import factors

META = torch.device("meta")


class Adapter:
    """As ComfyUI's weight adapters."""

    def __init__(self, loaded_keys: set[str], weights: Any) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights


def patches() -> dict[str, list[Any]]:
    up, down = torch.ones(8, 2), torch.ones(2, 8)
    adapter = Adapter({"a"}, (up, down, 2.0, None, [up]))
    return {
        "a.weight": [(0.5, adapter, 1.0, None, None)],
        "b.weight": [(1.0, ("diff", (torch.ones(8, 8),)), 1.0, None, None)],
        "c.weight": [(1.0, Adapter({"c"}, (up,)), 1.0, None, None)],
    }


def test_adapters_are_moved_and_counted() -> None:
    given = patches()
    made = factors(given, ["a.weight", "b.weight", "x.weight"], META, 1 << 20, 7)
    assert set(made.patches) == {"a.weight", "b.weight"}
    assert made.device_bytes == 3 * 8 * 2 * 4
    assert made.version == 7
    ((strength, adapter, *rest),) = made.patches["a.weight"]
    assert (strength, rest) == (0.5, [1.0, None, None])
    up, down, alpha, mid, (again,) = adapter.weights
    assert {up.device.type, down.device.type, again.device.type} == {"meta"}
    assert (alpha, mid, adapter.loaded_keys) == (2.0, None, {"a"})
    # Not an adapter: it may be as large as the weight. And the patcher's own stay as they are.
    assert made.patches["b.weight"] == given["b.weight"]
    assert given["a.weight"][0][1].weights[0].device.type == "cpu"


def test_factors_that_are_no_small_share_stay() -> None:
    given = patches()
    made = factors(given, ["a.weight"], META, 8 * (3 * 8 * 2 * 4) - 1, 7)
    assert made.device_bytes == 0
    assert made.patches == {"a.weight": given["a.weight"]}


def test_nothing_is_copied_on_the_cpu() -> None:
    given = patches()
    made = factors(given, given, torch.device("cpu"), 0, 7)
    assert made.device_bytes == 0
    assert made.patches["a.weight"][0][1].weights[0] is given["a.weight"][0][1].weights[0]


def test_they_are_given_back_with_the_model() -> None:
    model = streamed(patcher())
    sample(model)
    assert model._factors is not None
    free_all()
    assert model._factors is None

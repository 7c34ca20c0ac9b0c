"""What is planned in tests: the blocks of real models tensor by tensor, and seeded random ones.

Goal: the planner meets the sizes, rates and budgets that people have, and odd ones.
Method: no test of its own; tensor lists of the published architectures, compute times from the
operations of a pass at a known resolution.
"""

from __future__ import annotations

import random
from typing import Any

MIB = 1 << 20
GB = 10**9
BUDGETS = (4 * GB, 8 * GB, 12 * GB, 16 * GB)
RATES = (12e9, 25e9, 50e9)
TFLOPS = (60, 150, 400)


def linear(outputs: int, inputs: int) -> list[int]:
    return [outputs * inputs, outputs]


def double_block(width: int = 3072) -> list[int]:
    """FLUX.1 and HunyuanVideo: an image and a text stream."""
    stream = linear(3 * width, width) + linear(width, width) + [128, 128]
    stream += linear(4 * width, width) + linear(width, 4 * width) + linear(6 * width, width)
    return 2 * stream


def single_block(width: int = 3072) -> list[int]:
    both = linear(7 * width, width) + linear(width, 5 * width)
    return both + linear(3 * width, width) + [128, 128]


def wan_block(width: int = 5120, inner: int = 13824) -> list[int]:
    attention = 4 * linear(width, width) + [width, width]
    rest = linear(inner, width) + linear(width, inner) + [width, width, 6 * width]
    return 2 * attention + rest


def qwen_block(width: int = 3072) -> list[int]:
    stream = linear(6 * width, width) + 4 * linear(width, width) + [128, 128]
    return 2 * (stream + linear(4 * width, width) + linear(width, 4 * width))


#: Kinds of blocks with their number, and the operations of a pass of all of them.
MODELS: dict[str, tuple[list[tuple[list[int], int]], float]] = {
    "flux-1024": ([(double_block(), 19), (single_block(), 38)], 74.4e12),
    "wan-480p-1": ([(wan_block(), 40)], 42.1e12),
    "wan-480p-33": ([(wan_block(), 40)], 505e12),
    "hunyuan-320p-33": ([(double_block(), 20), (single_block(), 40)], 108e12),
    "qwen-1328": ([(qwen_block(), 60)], 134.7e12),
}


def real(
    name: str,
    *,
    item_bytes: int = 2,
    budget: int = 8 * GB,
    rate: float = 25e9,
    tflops: float = 150,
    latency_s: float = 10e-6,
) -> dict[str, Any]:
    """A model in bf16 or fp8. Each block of FLUX takes the same time, whatever its bytes."""
    kinds, operations = MODELS[name]
    count = sum(number for _, number in kinds)
    blocks = []
    for elements, number in kinds:
        tensors = [-(-each * item_bytes // 256) * 256 for each in elements]
        seconds = operations / count / (tflops * 1e12)
        entry = {"bytes": sum(tensors), "compute_s": seconds, "count": number}
        blocks.append(entry | {"tensor_bytes": tensors})
    return {
        "blocks": blocks,
        "budget_bytes": budget,
        "h2d_bytes_per_s": rate,
        "copy_latency_s": latency_s,
    }


def grid() -> list[tuple[str, dict[str, Any]]]:
    """Every real model in every setting, in an order that mixes them."""
    cases = [
        (f"{name} {8 * size} bit {budget // GB} GB {rate / 1e9:.0f} GB/s {tflops} TFLOP/s", inputs)
        for name in MODELS
        for size in (2, 1)
        for budget in BUDGETS
        for rate in RATES
        for tflops in TFLOPS
        for inputs in [real(name, item_bytes=size, budget=budget, rate=rate, tflops=tflops)]
    ]
    random.Random(0).shuffle(cases)
    return cases


def made_up(seed: int, least: int, most: int, room: int = 1) -> dict[str, Any]:
    """Blocks of some kinds, of any balance of copies and compute; the largest fits ``room`` times.

    There are ``least`` to ``most`` blocks.
    """
    rng = random.Random(seed)
    kinds = []
    for _ in range(rng.randint(1, 4)):
        unit = rng.choice([256, 4096, MIB])
        tensors = [unit * rng.randint(1, 64) for _ in range(rng.randint(4, 24))]
        kinds.append((tensors, rng.uniform(0.2, 2.0)))
    chosen = [rng.choice(kinds) for _ in range(rng.randint(least, most))]
    if rng.random() < 0.7:
        chosen.sort(key=lambda kind: kinds.index(kind))
    rate = rng.choice(RATES)
    whole = sum(sum(tensors) for tensors, _ in chosen)
    share = whole / rate * rng.uniform(0.1, 1.5) / sum(part for _, part in chosen)
    largest = max(sum(tensors) for tensors, _ in chosen)
    blocks = [
        {"bytes": sum(tensors), "compute_s": part * share, "tensor_bytes": tensors}
        for tensors, part in chosen
    ]
    return {
        "blocks": blocks,
        "budget_bytes": rng.randint(min(room * largest, whole), whole),
        "h2d_bytes_per_s": rate,
        "copy_latency_s": 0.0,
        "outside_s": rng.choice([0.0, share]),
    }


def few(seed: int) -> dict[str, Any]:
    """Three to five blocks of one to three mebibytes."""
    rng = random.Random(seed)
    sizes = [MIB * rng.randint(1, 3) for _ in range(rng.randint(3, 5))]
    blocks = [{"bytes": size, "compute_s": rng.uniform(1e-4, 3e-3)} for size in sizes]
    return {
        "blocks": blocks,
        "budget_bytes": MIB * rng.randint(max(sizes) // MIB, sum(sizes) // MIB - 1),
        "h2d_bytes_per_s": 1e9,
        "copy_latency_s": 0.0,
        "granularity": "block",
    }

"""The engines that run without a GPU, and what tells a wrong one.

Goal: every engine gives the resident run's output; one that reads weights too early does not.
Method: small stacks on the CPU, a link that is slow enough for a missing wait to show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import bench_path
import pytest
import torch

bench_path.put_on_path()

from bench import measure, weights  # noqa: E402
from bench.engines import ENGINES, Engine, Setup  # noqa: E402
from bench.links import HostLink, open_link  # noqa: E402
from bench.stacks import Stack, Workload, weight_bytes  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.once
CPU = torch.device("cpu")
RATE = 2e9


def load(workload: Workload, folder: Path) -> Stack:
    return weights.load(workload, weights.make(workload, folder, CPU))


def small(shape: str, dtype: str = "bf16") -> Workload:
    return Workload(shape, dtype, scale=1 / 40, depth=0.2, text_tokens=2)


def digest(name: str, stack: Stack, workload: Workload, share: float, passes: int = 2) -> list[str]:
    setup = Setup(stack, int(share * weight_bytes(stack)), CPU, RATE)
    attached = ENGINES[name].attach(setup)
    x, c = workload.inputs(workload.least_tokens(), CPU)
    try:
        return [measure.digest(attached.step, x, c) for _ in range(passes)]
    finally:
        attached.close()


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("shape", ["flux", "wan", "qwen"])
def test_engines_give_the_resident_output(shape: str, dtype: str, tmp_path: Path) -> None:
    workload = small(shape, dtype)
    expected = digest("resident", load(workload, tmp_path), workload, 1.0)
    assert expected[0] == expected[1]
    for name in ("dgls", "dgls-layer", "ring", "original"):
        for share in (0.5, 0.75):
            found = digest(name, load(workload, tmp_path), workload, share)
            assert found == expected, (name, share)


def test_other_weights_give_another_hash(tmp_path: Path) -> None:
    workload = small("flux")
    stack = load(workload, tmp_path)
    before = digest("resident", stack, workload, 1.0)
    next(stack.order[3].parameters()).data.mul_(1.5)
    assert digest("resident", stack, workload, 1.0) != before


def test_a_ring_that_does_not_wait_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = small("flux")
    expected = digest("resident", load(workload, tmp_path), workload, 1.0)
    monkeypatch.setattr(HostLink, "compute_waits", lambda *_: None)
    monkeypatch.setattr(__name__ + ".RATE", 2e7)
    try:
        found = digest("ring", load(workload, tmp_path), workload, 0.5)
    except ArithmeticError:
        return  # buffers that were never written to may hold anything
    assert found != expected


def test_a_hash_of_nothing_is_refused() -> None:
    x, c = torch.zeros(1, 4, 8), torch.zeros(1)
    for value in (float("nan"), 0.0):
        with pytest.raises(ArithmeticError, match="finite values that differ"):
            measure.digest(lambda x, _, value=value: torch.full_like(x, value), x, c)


def test_blocks_take_at_least_their_pace(tmp_path: Path) -> None:
    workload = small("flux")
    stack = load(workload, tmp_path)
    stack.pace(0.01)
    x, c = workload.inputs(workload.least_tokens(), CPU)
    assert measure.timed(stack, x, c, 2).median_s >= 0.01 * len(stack.order)


def test_a_link_keeps_to_its_rate_and_order() -> None:
    link = open_link(CPU, 1e8)
    source, target = torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64)
    mark = link.mark()
    link.compute_waits(mark)  # never recorded: no wait
    link.copy(target, source)
    link.record_copies(mark)
    assert not mark.is_set()
    link.compute_waits(mark)
    assert torch.equal(target, source)
    link.close()


def test_the_cpus_link_needs_a_rate() -> None:
    with pytest.raises(ValueError, match="needs a rate in bytes per second, found None"):
        open_link(CPU, None)


def test_weights_are_made_once_and_mapped(tmp_path: Path) -> None:
    workload = small("wan")
    path = weights.make(workload, tmp_path, CPU)
    stamp = path.stat().st_mtime_ns
    assert weights.make(workload, tmp_path, CPU) == path
    assert path.stat().st_mtime_ns == stamp
    first, second = (weights.load(workload, path) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert len({p.untyped_storage().data_ptr() for p in first.parameters()}) == len(
        list(first.parameters())
    )
    weights.remove(workload, tmp_path)
    assert not path.exists()


def test_a_package_that_is_not_as_pinned_is_named() -> None:
    engine = Engine("none", "none", packages=("torch==0.0.1", "no-such-package==1"))
    text = engine.missing() or ""
    assert "needs torch==0.0.1, found 2." in text
    assert "needs no-such-package==1, found none" in text
    assert ENGINES["ring"].missing() is None

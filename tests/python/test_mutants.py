"""An engine with a wait taken out must be caught by what the other tests look at.

Goal: show that the numerics tests can fail: a result that is right for want of a chance to be wrong
proves nothing.
Method: the engine's own test faults (DGLS_TEST_FAULTS), slow copies or slow blocks, several tries.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import SMALL, Block, budgets, check, inputs, net, same

import dgls_torch

if TYPE_CHECKING:
    from torch import nn

NO_WAIT_FOR_READY, COPIES_TOO_EARLY = "1", "4"
TRIES = 6


class Slow(Block):
    """A block that uses its last weight some time after its first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.norm(x))
        time.sleep(0.002)
        return x + self.down(y)


def wrong_passes(model: nn.Module, vram: int, **options: Any) -> int:
    """How many passes of a stream differ from the resident model's."""
    with torch.inference_mode():
        expected = model(inputs())
        with dgls_torch.stream(model, vram, **(SMALL | options)):
            return sum(not same(model(inputs()), expected) for _ in range(TRIES))


# (fault, budget): with a ring of one block the next copy cannot come too early without a fault.
@pytest.mark.parametrize("budget", [0, 2])
@pytest.mark.parametrize("fault", [NO_WAIT_FOR_READY, COPIES_TOO_EARLY])
def test_a_missing_wait_is_seen(fault: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(block=Slow)
    size = budgets(model)[budget]
    slow = {"copy_bytes_per_s": 4e6} if fault == NO_WAIT_FOR_READY else {}
    assert wrong_passes(model, size, **slow) == 0
    monkeypatch.setenv("DGLS_TEST_FAULTS", fault)
    assert wrong_passes(model, size, **slow) >= TRIES - 1
    monkeypatch.delenv("DGLS_TEST_FAULTS")
    assert wrong_passes(model, size, **slow) == 0


def test_the_helper_that_all_tests_use_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGLS_TEST_FAULTS", NO_WAIT_FOR_READY)
    model = net(block=Slow)
    with pytest.raises(AssertionError, match="pass 0 with"):
        check(model, lambda m: m(inputs()), vram=budgets(model)[:1], copy_bytes_per_s=1e6)


@pytest.mark.parametrize("poison", [True, False])
def test_poison_overwrites_what_a_block_may_not_read_any_more(poison: bool) -> None:
    """A view that is kept beyond the block's forward: wrong at once, and not only some day."""

    class Keeps(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.__dict__["kept"] = self.up.weight.detach().view(-1)
            return super().forward(x)

    model = net(block=Keeps)
    options = {**SMALL, "poison": poison, "copy_bytes_per_s": 1e5}
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **options):
        model.blocks[0](inputs())
        seen = False
        for _ in range(100):
            seen = seen or bool(model.blocks[0].kept.isnan().any())
            time.sleep(0.001)
    assert seen == poison

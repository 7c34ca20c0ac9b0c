"""What streaming adds to the host's time at each call of a block.

Measured with blocks so narrow that the device always waits for the host, but with as many
parameters as FLUX.1's: a streamed stack and a resident one without hooks take turns, and the clock
is read twice in a pass. No profiler runs, and nothing is in the hooks. The fastest tenth of the
passes of each is compared: what else a host does adds time and never takes any, and on virtual
machines the same passes were seen to take twice as long from one second to the next.

Other resident stacks take turns with these two. The hooks of one do nothing: what it adds is
torch's. Those of another make the driver's calls that streaming a block needs, whoever makes them
(bench/needed_calls.py), those of a third as many calls that do nothing, so that Python's part of
making them can be taken off. What the engine's hooks take by themselves is measured afterwards, in
passes of their own.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from bench import measure, weights
from bench.engines import Setup, ours
from bench.hook_clock import around
from bench.stacks import Workload, weight_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import nn

    from bench.needed_calls import NeededCalls

NARROW = Workload("flux", scale=1 / 24, depth=0.5, text_tokens=2)
_SHARE = 0.6
_BLOCKS = 8
_ROUNDS = 81
_UNTIMED = 10
"""Rounds in which a plan is still being looked for."""


class Span:
    """Seconds of the host from before one block's hooks to after another's."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        """Registers two hooks; an engine must have been attached before."""
        self._spans: list[float] = []
        self._begun = 0.0
        self._handles = [
            first.register_forward_pre_hook(self._begin, prepend=True),
            last.register_forward_hook(self._end),
        ]

    def _begin(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self._spans.append(time.perf_counter() - self._begun)

    def close(self) -> list[float]:
        """Takes the hooks off; the span of each pass."""
        for handle in self._handles:
            handle.remove()
        return self._spans


class Ticks:
    """Seconds in the engine's hooks of one block, those before its forward and those after it."""

    def __init__(self, block: nn.Module) -> None:
        """Registers four hooks around the engine's own, which must be there before."""
        self._now = [0.0] * 4
        self.seconds: list[float] = []
        self._handles = around(block, self._tick)

    def _tick(self, index: int) -> Callable[..., None]:
        def tick(*_: Any) -> None:
            self._now[index] = time.perf_counter()
            if index == 3:
                begun, bound, ended, unbound = self._now
                self.seconds.append(bound - begun + unbound - ended)

        return tick

    def close(self) -> list[float]:
        """Takes the hooks off; the sum of both for each call."""
        for handle in self._handles:
            handle.remove()
        return self.seconds


def _tenth(seconds: list[float]) -> float:
    """The time that a tenth of them is within."""
    return statistics.quantiles(seconds, n=10)[0]


def added_host_time(
    folder: Path,
    device: torch.device,
    link_bytes_per_s: float | None = None,
    calls: NeededCalls | None = None,
) -> dict[str, Any]:
    """Seconds added at each call of a block: the mean of a pass, and of each kind of block.

    Double blocks have 24 parameters, single ones 8; FLUX.1 has twice as many of these. Means over
    all blocks: `hooks_s` of what the engine's hooks take by themselves, `idle_hooks_s` of what two
    hooks that do nothing add, and `needed_s`, if there are ``calls``, of what two hooks add that
    make them.
    """
    path = weights.make(NARROW, folder, device)
    streamed, bare = stacks = [weights.load(NARROW, path) for _ in range(2)]
    bare.to(device)
    makes = [_nothing] if calls is None else [_nothing, calls.make, calls.make_none]
    stacks += [_hooked(weights.load(NARROW, path).to(device), make) for make in makes]
    budget = int(_SHARE * weight_bytes(streamed))
    attached = ours.attach(Setup(streamed, budget, device, link_bytes_per_s))
    firsts = (0, len(bare.order) - _BLOCKS)  # of double blocks, of single ones
    spans = [
        [Span(stack.order[first], stack.order[first + _BLOCKS - 1]) for first in firsts]
        for stack in stacks
    ]
    x, c = NARROW.inputs(NARROW.least_tokens(), device)
    for _ in range(_ROUNDS):
        for stack in stacks:
            measure.timed(stack, x, c, 1)
    of_streamed, of_bare, *others = (
        [_tenth(span.close()[_UNTIMED:]) / _BLOCKS for span in pair] for pair in spans
    )
    ticks = [Ticks(block) for block in streamed.order]
    for _ in range(_ROUNDS - _UNTIMED):
        measure.timed(streamed, x, c, 1)
    hooks_s = statistics.mean(_tenth(each.close()) for each in ticks)
    attached.close()
    doubles = sum(type(block) is type(bare.order[0]) for block in bare.order)
    share = doubles / len(bare.order)

    def mean(of_kinds: list[float]) -> float:
        return share * of_kinds[0] + (1 - share) * of_kinds[1]

    idle_s = mean(others[0]) - mean(of_bare)
    found = {
        "double_call_s": of_streamed[0] - of_bare[0],
        "single_call_s": of_streamed[1] - of_bare[1],
        "call_s": mean(of_streamed) - mean(of_bare),
        "double_bare_s": of_bare[0],
        "single_bare_s": of_bare[1],
        "hooks_s": hooks_s,
        "idle_hooks_s": idle_s,
    }
    if calls is not None:
        found["needed_s"] = idle_s + mean(others[1]) - mean(others[2])
    weights.remove(NARROW, folder)
    return found


def _hooked(stack: Any, make: Callable[..., None]) -> Any:
    """The stack, with a hook before each block that does nothing and one after it that makes."""
    for block in stack.order:
        block.register_forward_pre_hook(_nothing)
        block.register_forward_hook(lambda *_: make())
    return stack


def _nothing(*_: Any) -> None:
    pass

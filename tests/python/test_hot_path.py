"""What a block call costs besides time, and what its short cuts must not lose.

Goal: a call allocates nothing once it is warm; the tensors that the hooks hold for speed follow
their parameters, keep nothing alive after a detach, and stand in the way of nothing but a swap.
Method: a library that counts the calls of malloc in a process of its own; torch's counts of
references; every way to put another tensor into a parameter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import SMALL, budgets, inputs, net, same, settle
from torch import nn

import dgls_torch

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNTER = """
#include <errno.h>
#include <stddef.h>

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

static __thread unsigned long count __attribute__((tls_model("initial-exec")));

unsigned long allocations(void) { return count; }
void *malloc(size_t bytes) { return ++count, __libc_malloc(bytes); }
void *calloc(size_t number, size_t bytes) { return ++count, __libc_calloc(number, bytes); }
void *realloc(void *old, size_t bytes) { return ++count, __libc_realloc(old, bytes); }
void *aligned_alloc(size_t to, size_t bytes) { return ++count, __libc_memalign(to, bytes); }
int posix_memalign(void **made, size_t to, size_t bytes) {
  *made = aligned_alloc(to, bytes);
  return *made == NULL ? ENOMEM : 0;
}
"""

COUNT = """
import ctypes, gc, sys
import torch, dgls_torch
from compress_cases import LINK, ON, may_lock, passes, run, wide
from compress_cases import x as wide_inputs
from helpers import SMALL, Pair, budgets, inputs, net
from torch import nn

torch.set_num_threads(1)
library = ctypes.CDLL(sys.argv[1])
allocations = library.allocations
allocations.restype = ctypes.c_ulong
before = allocations()
bytearray(5000)
assert allocations() > before, "the counter does not count"

def measure(model, x):
    args = (x,)
    hooks = [
        (block, *block._forward_pre_hooks.values(), *block._forward_hooks.values())
        for block in model.blocks
    ]
    found = []
    for _ in range(10):
        before = allocations()
        for block, pre, post in hooks:
            pre(block, args)
            post(block, args, x)
        found.append(allocations() - before)
    return found

gc.disable()
for kind in ("plain", "wrapped"):
    model, x = net().requires_grad_(False), inputs()
    for block in model.blocks if kind == "wrapped" else []:
        payload = torch.randint(-9, 9, (32, 32), dtype=torch.int8)
        block.norm = nn.Linear(32, 32)
        block.norm.weight = nn.Parameter(Pair(payload, torch.rand(32, 1)), requires_grad=False)
    with dgls_torch.stream(model, budgets(model)[0], trace_passes=2, adapt=False, **SMALL):
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                for _ in range(3):
                    model(x)
                if any(found := measure(model, x)[2:]):
                    print(kind, mode.__name__, found)

model, options = wide(), {"trace_passes": 2, "adapt": False} | ON
with dgls_torch.stream(model, budgets(model, **LINK)[3], **options) as s, torch.inference_mode():
    if may_lock():
        passes(s, lambda: run(model), run(model))
    if any(found := measure(model, wide_inputs())[2:]):
        print("encoded", found)
"""


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that counts, to be loaded before all others."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("NOT TESTED: counting allocations needs a C compiler, and glibc")
    folder = tmp_path_factory.mktemp("counter")
    source, library = folder / "counter.c", folder / "counter.so"
    source.write_text(COUNTER)
    command = [compiler, "-O1", "-fno-builtin", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True)
    return library


def test_a_warm_block_call_allocates_nothing(counter: Path) -> None:
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {"LD_PRELOAD": str(counter), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, counter],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def use_counts(model: nn.Module) -> list[int]:
    return [parameter._use_count() for parameter in model.parameters()]


def test_after_detach_nothing_holds_a_weight() -> None:
    model, x = net(), inputs()
    before = use_counts(model)
    with torch.inference_mode():
        for replan in (False, True):
            with dgls_torch.stream(model, budgets(model)[0], **SMALL) as s:
                assert min(use_counts(model.blocks)) > 1, "the hooks hold none: why test this?"
                model(x)
                if replan:
                    s.replan(vram=budgets(net())[1])
                    model(x)
            assert use_counts(model) == before
    block = model.blocks[3]
    weights = [weakref.ref(parameter) for parameter in block.parameters()]
    attached = dgls_torch.stream(model, 1 << 30, **SMALL)
    with torch.inference_mode():
        model(x)
    del attached, block, model
    settle()
    assert {weight() for weight in weights} == {None}


def test_hooks_that_someone_kept_hold_nothing() -> None:
    model, x = net(), inputs()
    before = use_counts(model)
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **SMALL) as s:
        model(x)
        arena = s._parts.engine._arena.untyped_storage()
        kept = [
            hook
            for block in model.blocks
            for hooks in (block._forward_pre_hooks, block._forward_hooks)
            for hook in hooks.values()
        ]
    assert len(kept) == 12
    assert use_counts(model) == before
    assert torch._C._storage_Use_Count(arena._cdata) == 1


def test_a_weight_that_is_replaced_and_put_back() -> None:
    """`.data` may be set as often as one likes: what counts is where it points at the next use."""
    model, x = net(), inputs()
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **SMALL):
        expected = model(x)
        for weight in (model.blocks[2].up.weight, model.blocks[5].down.bias):
            master = weight.data
            for other in (master.clone(), master.double()):
                weight.data = other
                with pytest.raises(RuntimeError, match="was replaced by another tensor"):
                    model(x)
            weight.data = master
            assert same(model(x), expected)


class Own(nn.Parameter):
    """A parameter of another class, which the hooks ask in Python."""

    asked = 0

    def data_ptr(self) -> int:
        Own.asked += 1
        return super().data_ptr()


def test_parameters_of_other_classes_are_asked_themselves() -> None:
    model, x = net(), inputs()
    weight = model.blocks[2].up.weight
    model.blocks[2].up.weight = Own(weight.data.clone(), requires_grad=False)
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **SMALL):
        expected = model(x)
        asked = Own.asked
        assert same(model(x), expected)
        assert Own.asked == asked + 1
        model.blocks[2].up.weight.data = weight * 2
        with pytest.raises(RuntimeError, match=r"blocks\.2' was replaced by another tensor"):
            model(x)


@pytest.fixture
def _swapping() -> Iterator[None]:
    """Conversions swap what parameters are made of, instead of setting their data."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("_swapping")
@pytest.mark.parametrize("trains", [False, True])
def test_weights_are_not_swapped_while_they_stream(trains: bool) -> None:
    """A swapped parameter is another tensor, which the hooks would not look at: torch refuses."""

    def convert(module: nn.Module) -> Any:
        return module.half()

    model, twin, x = net().requires_grad_(trains), net(), inputs()
    if trains:
        model(x).sum().backward()  # the gradients' nodes hold the parameters as well
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model)[0], **SMALL):
        expected = model(x)
        for block in model.blocks:
            with pytest.raises(RuntimeError, match="Couldn't swap"):
                convert(block)
        assert same(model(x), expected)
    for block in model.blocks:
        block.zero_grad()
        convert(block)
        assert block.up.weight.dtype == torch.float16
        block.float()
    with torch.inference_mode():
        assert same(model.blocks[2](x), twin.half().float().blocks[2](x))


def test_what_is_handed_over_has_to_be_all() -> None:
    """A block would look at another one's parameters."""
    ops, capsule = torch.ops.dgls, dgls_torch._C
    model = net()
    with dgls_torch.stream(model, 1 << 30, **SMALL) as s:
        number = s._parts.engine.number
        weight = model.blocks[0].up.weight
        target = (weight, None, weight.data, [weight], False, True)
        ops._hand_over(number, [])
        with pytest.raises(RuntimeError, match="fewer tensors were handed over than announced"):
            capsule.make_hooks(number, 0, "b", model, [target], settle, settle)

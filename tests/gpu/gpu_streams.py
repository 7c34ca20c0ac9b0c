"""Binding, streams, the driver, mutants and torch.compile."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from gpu_base import DEVICE, budgets, case, check, compare, environment, make

import dgls_torch


@check("1. rebinding CPU to CUDA from the C hook and back, weights page-locked")
def rebind_pinned() -> str:
    return compare(pinned="4GiB", poison=True)


@check("1. the same through staging chunks (nothing page-locked)")
def rebind_staged() -> str:
    return compare(pinned=0, staging="8MiB", poison=True)


@check("2. stream symbol names torch's current stream")
def stream_symbol() -> str:
    seen = []
    for stream in (
        torch.cuda.default_stream(),
        torch.cuda.Stream(),
        torch.cuda.Stream(priority=-1),
    ):
        with torch.cuda.stream(stream):
            found = torch.ops.dgls._current_stream(0)
        if found != stream.cuda_stream:
            raise AssertionError(f"{found:#x}, not {stream.cuda_stream:#x}")
        seen.append(found)
    return f"{len(set(seen))} streams, default and side"


@check("2. side streams, changed in every pass")
def side_streams() -> str:
    model, x, expected = case(1024, 10)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    with dgls_torch.stream(model, vram=list(budgets(model))[1], poison=True):
        outs = []
        for i in range(9):
            with torch.cuda.stream(streams[i % 3]), torch.inference_mode():
                outs.append(model(x))
        torch.cuda.synchronize()
    if not all(torch.equal(out, expected) for out in outs):
        raise AssertionError("differs")
    return "9 passes on 3 streams identical"


@check("3. one libcuda in the process, the one torch mapped")
def one_driver() -> str:
    torch.ops.dgls.driver_version()
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = {line.split()[-1] for line in lines if "libcuda.so" in line}
    if len({os.path.realpath(path) for path in found}) != 1:
        raise AssertionError(f"{found}")
    return Path(found.pop()).name


@check("4. the retained primary context is torch's current one")
def primary_context() -> str:
    torch.zeros(1, device=DEVICE)
    driver = ctypes.CDLL("libcuda.so.1")
    current, primary = ctypes.c_void_p(), ctypes.c_void_p()
    driver.cuCtxGetCurrent(ctypes.byref(current))
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(primary), 0)
    driver.cuDevicePrimaryCtxRelease_v2(0)
    if current.value != primary.value or not current.value:
        raise AssertionError(f"{current.value} and {primary.value}")
    return f"{current.value:#x}"


def wrong_with(faults: int) -> str:
    """With a wait taken out, poison on and little to compute, some output must be wrong."""
    model, x, expected = case(2048, 12, 512)
    with (
        environment(DGLS_TEST_FAULTS=str(faults)),
        dgls_torch.stream(model, vram=next(budgets(model)), pinned="4GiB", poison=True),
        torch.inference_mode(),
    ):
        wrong = sum(not torch.equal(model(x), expected) for _ in range(12))
        torch.cuda.synchronize()
    if wrong == 0:
        raise AssertionError("no output was wrong: the checks above prove nothing")
    return f"{wrong} of 12 passes wrong, as they should be"


@check("5. mutant: no wait for ready")
def mutant_ready() -> str:
    return wrong_with(1)


@check("5. mutant: no wait for done")
def mutant_done() -> str:
    return wrong_with(2)


@check("7. torch.compile (inductor): two slot addresses, no recompile")
def compiled() -> str:
    import torch._dynamo as dynamo

    model = make(512, 6)
    x = torch.randn(1, 64, 512, dtype=torch.bfloat16, device=DEVICE)
    dynamo.reset()
    model.to(DEVICE)
    fast = torch.compile(model)
    with torch.inference_mode():
        expected = fast(x)
    model.to("cpu")
    dynamo.reset()
    with dgls_torch.stream(model, vram=next(budgets(model))), torch.inference_mode():
        fast = torch.compile(model)
        out = fast(x)
        fast(x)
        before = dict(dynamo.utils.counters["stats"])
        with dynamo.config.patch(error_on_recompile=True):
            same = [torch.allclose(fast(x), expected, rtol=0.05, atol=0.05) for _ in range(4)]
        after = dict(dynamo.utils.counters["stats"])
    if not all(same) or not torch.allclose(out, expected, rtol=0.05, atol=0.05):
        raise AssertionError("differs")
    if before != after:
        raise AssertionError(f"compiled again: {before} -> {after}")
    return f"{after.get('unique_graphs')} graphs, none compiled again"

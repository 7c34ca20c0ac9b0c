"""What only a GPU can show: run with ``make gpu-check``, writes docs/gpu-check.md.

Each check prints one line, OK or FAILED with what was seen; the exit status is 1 if one failed.
``--quick`` leaves out what is slow, for a run under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import dgls_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
DEVICE = torch.device("cuda", 0)
_checks: list[tuple[str, Callable[[], str]]] = []


def check(title: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Registers a check under its title; it returns what it saw and raises when that is wrong."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        _checks.append((title, function))
        return function

    return register


class Block(nn.Module):
    """Attention-free, but of several tensors and of some work."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(1, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def make(width: int, blocks: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model on the CPU with blocks, and weights outside of them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(width, width), nn.Sequential(*[Block(width) for _ in range(blocks)])
    )
    return model.to(dtype).eval().requires_grad_(False)


def reference(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of the fully resident model."""
    model.to(DEVICE)
    with torch.inference_mode():
        out = model(x)
    model.to("cpu")
    return out


def budgets(model: nn.Module) -> Iterator[int]:
    """From the smallest that works to all that fits."""
    with dgls_torch.stream(model, vram="64GiB") as s:
        least, total = s.plan.least_vram_bytes, s.plan.outside_bytes + s.plan.arena_bytes
    for share in (0.0, 0.15, 0.4, 0.75, 1.0):
        yield int(least + share * (total - least)) + 4096


def compare(**fields: object) -> str:
    """Runs a model under several budgets, several passes each; every output must be identical."""
    model = make(1024, 12)
    x = torch.randn(1, 64, 1024, dtype=torch.bfloat16, device=DEVICE)
    expected = reference(model, x)
    pointers = [p.data_ptr() for p in model.parameters()]
    passes = 0
    for vram in budgets(model):
        with dgls_torch.stream(model, vram=vram, **fields) as s, torch.inference_mode():
            for _ in range(4):
                out = model(x)
                passes += 1
                if not torch.equal(out, expected):
                    raise AssertionError(f"differs at vram={vram}: {(out - expected).abs().max()}")
            if s.report().errors:
                raise AssertionError("device errors")
        if [p.data_ptr() for p in model.parameters()] != pointers:
            raise AssertionError("masters were not restored")
    return f"{passes} passes identical"


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
    model = make(1024, 10)
    x = torch.randn(1, 64, 1024, dtype=torch.bfloat16, device=DEVICE)
    expected = reference(model, x)
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
    model = make(2048, 12)
    x = torch.randn(1, 512, 2048, dtype=torch.bfloat16, device=DEVICE)
    expected = reference(model, x)
    os.environ["DGLS_TEST_FAULTS"] = str(faults)
    try:
        with (
            dgls_torch.stream(model, vram=next(budgets(model)), pinned="4GiB", poison=True),
            torch.inference_mode(),
        ):
            wrong = sum(not torch.equal(model(x), expected) for _ in range(12))
            torch.cuda.synchronize()
    finally:
        del os.environ["DGLS_TEST_FAULTS"]
    if wrong == 0:
        raise AssertionError("no output was wrong: the checks above prove nothing")
    return f"{wrong} of 12 passes wrong, as they should be"


@check("5. mutant: no wait for ready")
def mutant_ready() -> str:
    return wrong_with(1)


@check("5. mutant: no wait for done")
def mutant_done() -> str:
    return wrong_with(2)


@check("6. page-lock in place: torch tensors, and a mapped safetensors file")
def page_lock() -> str:
    from safetensors.torch import load_file, save_file

    model = make(1024, 8)
    x = torch.randn(1, 64, 1024, dtype=torch.bfloat16, device=DEVICE)
    expected = reference(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_file(dict(model.state_dict()), path)
        mapped = make(1024, 8)
        mapped.load_state_dict(load_file(path), assign=True)
        mapped.requires_grad_(False)
        texts = []
        for kind, streamed in (("tensors", model), ("mapped file", mapped)):
            vram = list(budgets(streamed))[1]
            with (
                dgls_torch.stream(streamed, vram=vram, pinned="4GiB") as s,
                torch.inference_mode(),
            ):
                same = all(torch.equal(streamed(x), expected) for _ in range(3))
                report = s.report()
            if not same:
                raise AssertionError(f"{kind}: differs")
            if report.pinned_bytes == 0:
                raise AssertionError(f"{kind}: nothing was page-locked")
            texts.append(
                f"{kind}: {report.pinned_bytes / MIB:.0f} MiB, {report.pin_failures} refused"
            )
    return "; ".join(texts)


@check("6. source=file: read in chunks, model on meta")
def file_source() -> str:
    from safetensors.torch import save_file

    model = make(1024, 8)
    x = torch.randn(1, 64, 1024, dtype=torch.bfloat16, device=DEVICE)
    expected = reference(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_file(dict(model.state_dict()), path)
        meta = make(1024, 8).to("meta")
        with (
            dgls_torch.stream(meta, vram=list(budgets(model))[1], source=path, poison=True),
            torch.inference_mode(),
        ):
            same = [torch.equal(meta(x), expected) for _ in range(3)]
    if not all(same):
        raise AssertionError("differs")
    return "3 passes identical"


@check("6. tiers: of a file page-locked, in RAM and read in every pass; memory is given back")
def tiers() -> str:
    from safetensors.torch import save_file

    model = make(2048, 12)
    x = torch.randn(1, 64, 2048, dtype=torch.bfloat16, device=DEVICE)
    expected = reference(model, x)
    vram = next(budgets(model))
    os.environ["DGLS_TEST_GUARD_S"] = "0.01"
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(dict(model.state_dict()), str(path))
        for ram in ("48MiB", "256MiB", "auto"):
            os.environ["DGLS_TEST_AVAILABLE"] = str(2**40)
            meta = make(2048, 12).to("meta")
            options = {"source": path, "ram": ram, "staging": "32MiB", "poison": True}
            with dgls_torch.stream(meta, vram, **options) as s, torch.inference_mode():
                same = [torch.equal(meta(x), expected) for _ in range(6)]
                host = s.report().host
                if ram != "48MiB":
                    os.environ["DGLS_TEST_AVAILABLE"] = "0"
                    same += given_back(s, meta, x, expected)
            if not all(same):
                raise AssertionError(f"ram={ram}: differs")
            cached, read = host.cached_bytes / MIB, host.file_bytes / MIB
            texts.append(f"ram={ram}: {cached:.0f} MiB in RAM, {read:.0f} read in a pass")
    del os.environ["DGLS_TEST_GUARD_S"], os.environ["DGLS_TEST_AVAILABLE"]
    return "; ".join(texts)


def given_back(
    s: dgls_torch.Stream, model: nn.Module, x: torch.Tensor, expected: torch.Tensor
) -> list[bool]:
    """Runs passes until host memory was given back; whether each was right."""
    same = []
    for _ in range(2000):
        same.append(torch.equal(model(x), expected))
        if s.report().host.given_back:
            return same
    raise AssertionError("no memory was given back")


def is_told(model: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a pass ended with the words of `verify`; one that comes to its end must be right."""
    try:
        out = model(x)
    except RuntimeError as error:
        if "arrived with other bytes" not in str(error):
            raise
        return True
    if not torch.equal(out, expected):
        raise AssertionError("a wrong output came through")
    return False


@check("6. verify=True: right bytes pass; planted ones are told and fetched again")
def verify() -> str:
    model = make(1024, 8)
    x = torch.randn(1, 64, 1024, dtype=torch.bfloat16, device=DEVICE)
    expected = reference(model, x)
    vram = list(budgets(model))[1]
    for pinned in (0, "4GiB"):
        with (
            dgls_torch.stream(model, vram, verify=True, pinned=pinned) as s,
            torch.inference_mode(),
        ):
            same = [torch.equal(model(x), expected) for _ in range(3)]
            report = s.report()
        if not all(same) or report.mismatches or not report.verified_bytes:
            raise AssertionError(f"pinned={pinned}: {same}, {report}")
    os.environ["DGLS_TEST_FAULTS"] = "8"
    try:
        with dgls_torch.stream(model, vram, verify=True) as s, torch.inference_mode():
            told = sum(is_told(model, x, expected) for _ in range(40))
    finally:
        del os.environ["DGLS_TEST_FAULTS"]
    if told == 0:
        raise AssertionError("no planted byte was found")
    return f"{report.verified_bytes / MIB:.0f} MiB compared; {told} planted bytes told"


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


@check("budget: torch never allocates more for the weights than vram")
def exact_budget() -> str:
    model = make(2048, 16)
    x = torch.randn(1, 8, 2048, dtype=torch.bfloat16, device=DEVICE)
    texts = []
    for vram in budgets(model):
        gc.collect()
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
        with dgls_torch.stream(model, vram=vram), torch.inference_mode():
            held = torch.cuda.memory_allocated() - base
            model(x)
            model(x)
        rounding = 512 * 40
        if held > vram + rounding:
            raise AssertionError(f"{held} bytes held with a budget of {vram}")
        texts.append(f"{held / vram:.3f}")
    return "held / vram: " + " ".join(texts)


@check("errors: out of memory at set-up leaves the model as it was")
def out_of_memory() -> str:
    model = make(1024, 8)
    pointers = [p.data_ptr() for p in model.parameters()]
    gc.collect()
    torch.cuda.empty_cache()
    hog = torch.empty(torch.cuda.mem_get_info()[0] - 64 * MIB, dtype=torch.uint8, device=DEVICE)
    try:
        dgls_torch.stream(model, vram="100MiB")
    except torch.OutOfMemoryError as error:
        text = str(error).split("(")[0].strip()
    else:
        raise AssertionError("it was not refused")
    finally:
        del hog
        torch.cuda.empty_cache()
    if [p.data_ptr() for p in model.parameters()] != pointers or model._forward_pre_hooks:
        raise AssertionError("the model was changed")
    return text


class Hungry(nn.Module):
    """Takes device memory of its own in the middle of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bytes:
            torch.empty(self.bytes, dtype=torch.uint8, device=x.device)
        return x


@check("errors: out of memory in a pass; with vram=auto the next one has more room")
def out_of_memory_in_a_pass() -> str:
    model = make(2048, 12)
    model.insert(1, hungry := Hungry())
    x = torch.randn(1, 8, 2048, dtype=torch.bfloat16, device=DEVICE)
    expected = reference(model, x)
    gc.collect()
    torch.cuda.empty_cache()
    weights = sum(p.nbytes for p in model.parameters())
    free, total = torch.cuda.mem_get_info()
    reserve = total // 8 + total // 16  # what the planner leaves for activations and others
    hog = torch.empty(free - reserve - 2 * weights, dtype=torch.uint8, device=DEVICE)
    try:
        with dgls_torch.stream(model, vram="auto") as s, torch.inference_mode():
            same = [torch.equal(model(x), expected)]
            first, failed = s.plan.vram_bytes, 0
            torch.cuda.empty_cache()
            hungry.bytes = torch.cuda.mem_get_info()[0] + s.plan.arena_bytes // 3
            while failed < 10:
                try:
                    same.append(torch.equal(model(x), expected))
                    break
                except torch.OutOfMemoryError as error:
                    if "call the model again" not in str(error):
                        raise
                    failed += 1
            last = s.plan.vram_bytes
    finally:
        del hog
        torch.cuda.empty_cache()
    if not all(same) or not 0 < failed < 10 or last >= first:
        raise AssertionError(f"{same}, {failed} failures, {first} -> {last} bytes")
    return f"{failed} failures, then right: {first / MIB:.0f} -> {last / MIB:.0f} MiB"


def main() -> int:
    """Runs the checks, prints a line for each, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="for compute-sanitizer")
    parser.add_argument("--only", default="", help="checks whose names contain this")
    parser.add_argument("--out", default="docs/gpu-check.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device and torch sees none", file=sys.stderr)
        return 2
    slow = {"compiled", "out_of_memory", "out_of_memory_in_a_pass", "mutant_ready", "mutant_done"}
    lines, failed = [], 0
    for title, function in _checks:
        name = function.__name__
        if options.only not in name or (options.quick and name in slow):
            continue
        begun = time.monotonic()
        try:
            state, text = "OK", function()
        except Exception as error:
            traceback.print_exc()
            state, text, failed = "FAILED", f"{type(error).__name__}: {error}", failed + 1
        took = time.monotonic() - begun
        print(f"{state:6} {title}: {text} ({took:.1f} s)", flush=True)
        lines.append(f"| {title} | {state} | {text} |")
    facts = {
        "GPU": torch.cuda.get_device_name(0),
        "driver": torch.ops.dgls.driver_version(),
        "torch": torch.__version__,
        "Python": sys.version.split()[0],
        "dgls_torch": dgls_torch.__version__,
    }
    head = ", ".join(f"{name} {value}" for name, value in facts.items())
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(
        f"# GPU checks\n\n{head}\n\n| check | result | seen |\n|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )
    print(json.dumps(facts))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Page-locks, files, tiers of host memory, budgets, and memory that runs out."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gpu_base import DEVICE, MIB, budgets, case, check, environment, make, reference
from torch import nn

import dgls_torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def saved(model: nn.Module) -> Iterator[Path]:
    """A safetensors file of a model's weights, for as long as it is open."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(dict(model.state_dict()), str(path))
        yield path


@check("6. page-lock in place: torch tensors, and a mapped safetensors file")
def page_lock() -> str:
    from safetensors.torch import load_file

    model, x, expected = case(1024, 8)
    with saved(model) as path:
        mapped = make(1024, 8)
        mapped.load_state_dict(load_file(str(path)), assign=True)
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
    model, x, expected = case(1024, 8)
    with saved(model) as path:
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
    model, x, expected = case(2048, 12)
    vram = next(budgets(model))
    texts = []
    with (
        saved(model) as path,
        environment(DGLS_TEST_GUARD_S="0.01", DGLS_TEST_AVAILABLE=""),
    ):
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
    model, x, expected = case(1024, 8)
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
    with (
        environment(DGLS_TEST_FAULTS="8"),
        dgls_torch.stream(model, vram, verify=True),
        torch.inference_mode(),
    ):
        told = sum(is_told(model, x, expected) for _ in range(40))
    if told == 0:
        raise AssertionError("no planted byte was found")
    return f"{report.verified_bytes / MIB:.0f} MiB compared; {told} planted bytes told"


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

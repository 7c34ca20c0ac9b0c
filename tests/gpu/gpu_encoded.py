"""Weights that go over the link encoded and are decoded by the kernel."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_base import MIB, case, check, reference
from torch import nn

import dgls_torch

_MOST_PASSES = 200


class _Fp8(nn.Linear):
    """A layer whose weight is cast at each use."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def _in_fp8(model: nn.Module) -> nn.Module:
    """The model with one of the two large weights of each block in fp8."""
    for block in model[1]:
        block.up.__class__ = _Fp8
        block.up.weight = nn.Parameter(block.up.weight.to(torch.float8_e4m3fn), False)
    return model


def _negate(weight: torch.Tensor) -> None:
    """In place, as torch counts it: not through a view, which in inference mode it does not."""
    other = weight.clone()
    other.view(torch.uint8)[..., weight.itemsize - 1 :: weight.itemsize].bitwise_xor_(0x80)
    weight.copy_(other)


def _encoded(
    model: nn.Module,
    x: torch.Tensor,
    expected: torch.Tensor,
    compress: str = "on",
    **fields: Any,
) -> str:
    """Runs passes until all that is to be encoded is, and some more; all identical."""
    blocks = sum(p.nbytes for p in model[1].parameters())
    with (
        dgls_torch.stream(model, vram=blocks // 4 + 96 * MIB, compress=compress, **fields) as s,
        torch.inference_mode(),
    ):
        last, settled = 0, 0
        for number in range(_MOST_PASSES):
            if not torch.equal(model(x), expected):
                raise AssertionError(f"pass {number} differs")
            report = s.report()
            settled = settled + 1 if report.encoded_held_bytes == last > 0 else 0
            last = report.encoded_held_bytes
            if settled == 8:
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"not encoded in {_MOST_PASSES} passes: {report}")
        _negate(model[1][0].up.weight)
        changed = model(x)
        _negate(model[1][0].up.weight)
        again = model(x)
    if torch.equal(changed, expected) or not torch.equal(again, expected):
        raise AssertionError("a change in place was not followed")
    if report.errors or report.mismatches:
        raise AssertionError(f"{report.errors} errors, {report.mismatches} mismatches")
    share = report.encoded_bytes_total / report.decoded_bytes_total
    return f"{number + 3} passes identical, {100 * share:.1f} % on the link"


@check("8. weights encoded on the link, changed in place meanwhile")
def encoded() -> str:
    return _encoded(*case(3072, 12))


@check("8. the same, every byte compared with its source")
def encoded_verified() -> str:
    return _encoded(*case(2048, 6), verify=True)


@check("8. the same by layers, beside GEMMs that fill the device")
def encoded_layers() -> str:
    return _encoded(*case(3072, 8, 8192), unit="layer")


@check("8. the same with fp8 weights beside those in bf16")
def encoded_fp8() -> str:
    model, x, _ = case(3072, 12)
    return _encoded(_in_fp8(model), x, reference(model, x))


@check("8. the same where copies decide, once passes have shown it")
def encoded_by_times() -> str:
    return _encoded(*case(3072, 12), compress="auto")

"""Weights that go over the link encoded and are decoded by the kernel."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from gpu_base import MIB, case, check

import dgls_torch

if TYPE_CHECKING:
    from torch import nn

_MOST_PASSES = 200


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
        weight = model[1][0].up.weight
        before = weight.clone()
        weight.mul_(-1)
        changed = model(x)
        weight.copy_(before)
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


@check("8. the same where copies decide, once passes have shown it")
def encoded_by_times() -> str:
    return _encoded(*case(3072, 12), compress="auto")

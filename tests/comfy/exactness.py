"""Bit-exactness in a real ComfyUI: what is streamed is what was never streamed, for every model."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch
from server import PromptError
from workflows import lora, node, original, reported, sampled, stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from server import Server

SHARES = (25, 50, 75)
Latents = dict[str, torch.Tensor]


def latent(server: Server, workflow: dict[str, Any]) -> torch.Tensor:
    made = server.run(workflow)["save"]
    assert isinstance(made, torch.Tensor)
    assert torch.isfinite(made).all(), "the latent is not finite"
    return made


def golden(server: Server, entry: dict[str, Any], weight_dtype: str) -> Latents:
    """What ComfyUI makes without this pack: plain, LoRA baked in, LoRA on the fly."""
    kind = {"weight_dtype": weight_dtype}
    return {
        "plain": latent(server, sampled(entry, **kind)),
        "baked": latent(server, sampled(entry, lora(entry["lora"]), **kind)),
        "on the fly": latent(
            server, sampled(entry, lora(entry["lora"]), node("DGLSTestPartly"), **kind)
        ),
    }


class Exactness:
    """The checks of one model in one server; each says yes or why not."""

    def __init__(
        self,
        server: Server,
        entry: dict[str, Any],
        expected: Latents,
        weight_dtype: str,
        numbers_bytes: float,
    ) -> None:
        self.server, self.entry, self.expected = server, entry, expected
        self.kind = {"weight_dtype": weight_dtype}
        self.total = int(entry["numbers"] * numbers_bytes)
        self.results: dict[str, str] = {}

    def run(self, *, full: bool = True) -> dict[str, str]:
        for share in SHARES:
            self.check(f"{share} %", lambda share=share: self.streamed(share))
        if full:
            lora_node = lora(self.entry["lora"])
            half = stream(self.least_or(50))
            fly, baked = self.expected["on the fly"], self.expected["baked"]
            self.check("LoRA before", lambda: self.same(fly, lora_node, half))
            self.check("LoRA after", lambda: self.same(fly, half, lora_node))
            self.check("LoRA baked", lambda: self.baked(baked))
            self.check("LoRA gone", lambda: self.same(self.expected["plain"], half))
            self.check("plain after", lambda: self.same(self.expected["plain"]))
            self.check("plain LoRA after", lambda: self.same(baked, lora_node))
        return self.results

    def check(self, name: str, body: Callable[[], str]) -> None:
        try:
            self.results[name] = body()
        except (PromptError, AssertionError) as error:
            self.results[name] = f"failed: {error}"[:400]

    def same(self, expected: torch.Tensor, *chain: dict[str, Any]) -> str:
        return compared(expected, latent(self.server, sampled(self.entry, *chain, **self.kind)))

    def streamed(self, share: int) -> str:
        """Streams with a share of all weights, or with the least that the model works with."""
        vram = self.least_or(share)
        workflow = reported(sampled(self.entry, stream(vram), **self.kind))
        outputs = self.server.run(workflow)
        data = json.loads(outputs["report"]["dgls_report"][0])
        assert data["reason"] is None, data["reason"]
        assert data["streamed_bytes"] > 0
        assert data["uses"] > 0
        return compared(self.expected["plain"], outputs["save"])

    def least_or(self, share: int) -> int:
        """A share of the weights in bytes, or the smallest budget where that is too little."""
        vram = self.total * share // 100
        try:
            self.server.run(sampled(self.entry, stream(vram), steps=1, **self.kind))
        except PromptError as error:
            found = re.search(r"at least .* \((\d+) bytes\)", str(error))
            if found is None:
                raise
            return int(found[1])
        return vram

    def baked(self, expected: torch.Tensor) -> str:
        """A LoRA after the original's loader, baked in, as ComfyUI does when it loads all."""
        vram = str(self.least_or(50))
        workflow = original(self.entry, vram=vram, lora="baked")
        if self.kind["weight_dtype"] != "default":
            workflow["loader"]["inputs"]["cast_dtype"] = self.kind["weight_dtype"]
        workflow["lora"] = lora(self.entry["lora"])
        workflow["lora"]["inputs"]["model"] = ["swap", 0]
        workflow["sample"]["inputs"]["model"] = ["lora", 0]
        return compared(expected, latent(self.server, workflow))


def compared(expected: torch.Tensor, found: torch.Tensor) -> str:
    if torch.equal(expected, found) and expected.dtype == found.dtype:
        return "yes"
    return f"no: differs by {(expected.double() - found.double()).abs().max():.3g}"

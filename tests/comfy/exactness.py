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
    from ways import Way

SHARES = (25, 50, 75)
Latents = dict[str, torch.Tensor]


def latent(server: Server, workflow: dict[str, Any]) -> torch.Tensor:
    made = server.run(workflow)["save"]
    assert isinstance(made, torch.Tensor)
    assert torch.isfinite(made).all(), "the latent is not finite"
    return made


def golden(server: Server, entry: dict[str, Any], way: Way) -> Latents | str:
    """What ComfyUI makes without this pack: plain, with a LoRA, that baked in and on the fly.

    Where ComfyUI itself cannot, a word of why: there is nothing to compare with.
    """
    kind = {"weight_dtype": way.weight_dtype}
    file = lora(entry["lora"])
    chains: dict[str, list[Any]] = {"plain": []}
    if way.is_full:
        chains |= {"LoRA": [file], "baked": [file, node("DGLSTestWhole")]}
        chains |= {"on the fly": [file, node("DGLSTestPartly")]}
    try:
        return {k: latent(server, sampled(entry, *c, **kind)) for k, c in chains.items()}
    except (PromptError, AssertionError) as error:
        return f"ComfyUI without the pack cannot: {error}"[:200]


class Exactness:
    """The checks of one model in one server; each says yes or why not."""

    def __init__(
        self,
        server: Server,
        entry: dict[str, Any],
        expected: Latents,
        way: Way,
    ) -> None:
        self.server, self.entry, self.expected = server, entry, expected
        self.kind = {"weight_dtype": way.weight_dtype}
        self.total, self.least, self.blocks = way.bytes(entry), 0, 0
        self.results: dict[str, str] = {}

    def run(self, *, full: bool = True) -> dict[str, str]:
        for share in SHARES:
            self.check(f"{share} %", lambda share=share: self.streamed(share))
        self.check("layers", self.layers)
        if full:
            lora_node = lora(self.entry["lora"])
            half = stream(self.half)
            fly, baked = self.expected["on the fly"], self.expected["baked"]
            self.check("LoRA before", lambda: self.same(fly, lora_node, half))
            self.check("LoRA after", lambda: self.same(fly, half, lora_node))
            self.check("LoRA baked", lambda: self.baked(baked))
            self.check("LoRA gone", lambda: self.same(self.expected["plain"], half))
            self.check("plain after", lambda: self.same(self.expected["plain"]))
            self.check("plain LoRA after", lambda: self.same(self.expected["LoRA"], lora_node))
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
        vram = max(self.least, self.total * share // 100)
        try:
            outputs = self.server.run(self.reported(vram))
        except PromptError as error:
            found = re.search(r"at least .* \((\d+) bytes\)", str(error))
            if found is None:
                raise
            self.least = int(found[1])
            outputs = self.server.run(self.reported(self.least))
        data = json.loads(outputs["report"]["dgls_report"][0])
        assert data["reason"] is None, data["reason"]
        assert data["streamed_bytes"] > 0
        assert data["uses"] > 0
        self.blocks = len(data["blocks"])
        return compared(self.expected["plain"], outputs["save"])

    def layers(self) -> str:
        """Streams layer by layer with less than blocks need, or with a quarter of all weights.

        Weights may go encoded, which they do on a GPU alone.
        """
        vram = max(self.total // 4, self.least - 1)
        streamed = stream(vram, unit="layer", compress="auto")
        workflow = reported(sampled(self.entry, streamed, **self.kind))
        outputs = self.server.run(workflow)
        data = json.loads(outputs["report"]["dgls_report"][0])
        assert data["reason"] is None, data["reason"]
        assert data["streamed_bytes"] > 0
        assert len(data["blocks"]) > self.blocks
        return compared(self.expected["plain"], outputs["save"])

    def reported(self, vram: int) -> dict[str, Any]:
        return reported(sampled(self.entry, stream(vram), **self.kind))

    @property
    def half(self) -> int:
        return max(self.least, self.total // 2)

    def baked(self, expected: torch.Tensor) -> str:
        """A LoRA after the original's loader, baked in, as ComfyUI does when it loads all."""
        vram = str(self.half)
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

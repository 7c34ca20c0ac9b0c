"""What other nodes and packs do to a model that is streamed: each runs as without the pack.

What cannot be streamed is passed through, and the report says why in one clear sentence.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from exactness import compared
from scenarios import Scenarios
from workflows import lora, node, reported, sampled

if TYPE_CHECKING:
    import torch


class Others(Scenarios):
    """More stories; see `Scenarios`."""

    def torch_compile(self) -> None:
        """ComfyUI's own node, before and after: compiled, not streamed."""
        sd3 = self.entries["sd3"]
        compiled = node("TorchCompileModel", backend="inductor")
        half = self.share(sd3, 0.5)
        expected = self.latent(sampled(sd3, compiled))
        for chain in ([compiled, half], [half, compiled]):
            self.passed(reported(sampled(sd3, *chain)), expected, "torch.compile")
        plain = self.latent(sampled(sd3))
        self.streams(reported(sampled(sd3, half)), plain)

    def weight_hooks(self) -> None:
        """A LoRA hooked to the conditioning, its strength changed by keyframes."""
        expected = self.latent(self.hooked())
        assert compared(self.plain, expected) != "yes", "the hooks do nothing"
        self.passed(reported(self.hooked(self.half)), expected, "weight hooks")
        self.streams(reported(sampled(self.wan, self.half)), self.plain)
        assert compared(expected, self.latent(self.hooked())) == "yes"

    def hooked(self, *chain: dict[str, Any]) -> dict[str, Any]:
        made = sampled(self.wan, *chain, steps=4)
        first, last = {"strength_mult": 1.0, "start_percent": 0.0}, {"strength_mult": 0.3}
        made["early"] = node("CreateHookKeyframe", **first)
        made["late"] = node(
            "CreateHookKeyframe", **last, start_percent=0.5, prev_hook_kf=["early", 0]
        )
        made["hook"] = node(
            "CreateHookLoraModelOnly", lora_name=self.wan["lora"], strength_model=1.0
        )
        made["keyed"] = node("SetHookKeyframes", hooks=["hook", 0], hook_kf=["late", 0])
        made["with_hooks"] = node(
            "ConditioningSetProperties",
            cond_NEW=["positive", 0],
            hooks=["keyed", 0],
            strength=1.0,
            set_cond_area="default",
        )
        made["sample"]["inputs"]["positive"] = ["with_hooks", 0]
        return made

    def gguf(self) -> None:
        """A model with a patcher and tensors of its own, in the shape of the GGUF pack's."""
        foreign = node("DGLSTestForeign")
        expected = self.latent(sampled(self.wan, foreign))
        found = reported(sampled(self.wan, foreign, self.half))
        self.passed(found, expected, "GGUFModelPatcher")
        file = lora(self.wan["lora"])
        expected = self.latent(sampled(self.wan, foreign, file))
        self.passed(
            reported(sampled(self.wan, foreign, self.half, file)), expected, "GGUFModelPatcher"
        )
        self.streams(reported(sampled(self.wan, self.half)), self.plain)

    def multigpu(self) -> None:
        """The nodes that split work over GPUs, and that choose one; there is one device here."""
        split = node("MultiGPU_WorkUnits", max_gpus=2)
        for chain in ([split, self.half], [self.half, split]):
            self.streams(reported(sampled(self.wan, *chain)), self.plain)
        # A model of its own for each device is made out of the file; see DGLSTestDeepClone.
        copied = node("DGLSTestDeepClone")
        self.streams(reported(sampled(self.wan, self.half, copied)), self.plain)
        self.same(sampled(self.wan))

    def model_patches(self) -> None:
        """Nodes that patch the model: sampling shifts, guidance, skipped and repeated blocks."""
        for name, inputs in (
            ("ModelSamplingSD3", {"shift": 5.0}),
            ("RescaleCFG", {"multiplier": 0.6}),
            ("PerturbedAttentionGuidance", {"scale": 2.0}),
            ("EasyCache", dict(_EASY)),
            (
                "SkipLayerGuidanceDiT",
                {
                    **{"double_layers": "1,3", "single_layers": "", "scale": 2.0},
                    **{"start_percent": 0.0, "end_percent": 1.0, "rescaling_scale": 0.0},
                },
            ),
        ):
            patch = node(name, **inputs)
            entry = self.entries["sd15"] if name == "PerturbedAttentionGuidance" else self.wan
            half = self.share(entry, 0.6)
            expected = self.latent(sampled(entry, patch, steps=4))
            for chain in ([patch, half], [half, patch]):
                self.streams(reported(sampled(entry, *chain, steps=4)), expected)

    def encoded(self) -> None:
        """Copies take longer than a GPU computes: weights go encoded once steps have shown it."""
        wide = self.entries["flux_wide"]
        expected = self.latent(sampled(wide, steps=_MANY))
        for unit in ("block", "layer"):
            streamed = self.share(wide, 0.35, unit=unit, compress="auto")
            outputs = self.server.run(reported(sampled(wide, streamed, steps=_MANY)))
            assert compared(expected, outputs["save"]) == "yes", f"by {unit}s"
            text = outputs["report"]["text"][0]
            assert "of their size on the link" in text, f"by {unit}s: {text}"

    def streams(self, workflow: dict[str, Any], expected: torch.Tensor) -> None:
        """The workflow's latent is as expected, and its model was streamed."""
        outputs = self.server.run(workflow)
        assert compared(expected, outputs["save"]) == "yes"
        data = json.loads(outputs["report"]["dgls_report"][0])
        assert data["reason"] is None, data["reason"]
        assert data["uses"] > 0

    def passed(self, workflow: dict[str, Any], expected: torch.Tensor, words: str) -> None:
        """The workflow's latent is as expected, and the report says why it was not streamed."""
        outputs = self.server.run(workflow)
        found = compared(expected, outputs["save"])
        assert found == "yes", found
        text = outputs["report"]["text"][0]
        assert "is not streamed" in text, text
        assert words in text, text
        assert len(text.strip().splitlines()) == 1, text


_MANY = 150
_EASY = {
    **{"reuse_threshold": 0.2, "start_percent": 0.0, "end_percent": 1.0, "verbose": False},
}

"""What users do to a running ComfyUI: interrupt, free, two models, mistakes."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exactness import compared, latent
from server import PromptError
from workflows import lora, node, original, reported, sampled, stream, tail

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from server import Server

_MIB = 1 << 20


class Scenarios:
    """Each method is one story; it returns yes, or raises AssertionError."""

    def __init__(self, server: Server, entries: dict[str, Any], number_bytes: int = 4) -> None:
        self.server, self.entries, self.number_bytes = server, entries, number_bytes
        self.wan, self.fp8 = entries["wan21_t2v"], entries["wan21_t2v_fp8"]
        self.half = self.share(self.wan, 0.55)
        self.plain = latent(server, sampled(self.wan))

    def share(self, entry: dict[str, Any], share: float, **inputs: str) -> dict[str, Any]:
        """A streaming node with so much of a model's weights."""
        return stream(f"{entry['numbers'] * self.number_bytes * share:.0f}", **inputs)

    def same(self, workflow: dict[str, Any]) -> None:
        found = compared(self.plain, latent(self.server, workflow))
        assert found == "yes", found

    def latent(self, workflow: dict[str, Any]) -> torch.Tensor:
        return latent(self.server, workflow)

    def interrupt(self) -> None:
        prompt = self.server.queue(sampled(self.wan, self.half, steps=10000))
        time.sleep(4)
        self.server.interrupt()
        history = self.server.wait(prompt)
        names = [m[0] for m in history["status"]["messages"]]
        assert "execution_interrupted" in names, names
        self.same(sampled(self.wan))
        self.same(sampled(self.wan, self.half))

    def free(self) -> None:
        self.same(sampled(self.wan, self.half))
        self.server.free()
        self.same(sampled(self.wan, self.half))
        self.server.free()
        self.same(sampled(self.wan))

    def high_and_low(self) -> None:
        """Two models in one workflow, one after the other on the same latent, as WAN 2.2."""

        def workflow(high: list[dict[str, Any]], low: list[dict[str, Any]]) -> dict[str, Any]:
            made = sampled(self.wan, *high)
            other = sampled(self.fp8, *low)
            for name in ("loader", *(f"chain{n}" for n in range(len(low)))):
                part = other[name]
                inputs = part["inputs"]
                if "model" in inputs:
                    inputs["model"] = [f"low_{inputs['model'][0]}", 0]
                made[f"low_{name}"] = part
            first = made["sample"]["inputs"]
            second = {**first, "latent_image": ["sample", 0], "denoise": 0.6}
            second["model"] = ["low_" + other["sample"]["inputs"]["model"][0], 0]
            made["sample2"] = {"class_type": "KSampler", "inputs": second}
            made["save"]["inputs"]["samples"] = ["sample2", 0]
            for name, sampler in (("report", first), ("report2", second)):
                made[name] = node("DGLSReport", model=sampler["model"], after=["sample2", 0])
            return made

        plain = workflow([], [])
        expected = latent(self.server, plain)
        # As read from the file; ComfyUI makes the rest of it larger where it computes in f32.
        low = stream(int(self.fp8["bytes"] * (1.1 if self.number_bytes == 4 else 0.75)))
        for _ in range(2):
            outputs = self.server.run(workflow([self.half], [low]))
            found = compared(expected, outputs["save"])
            assert found == "yes", found
            for name in ("report", "report2"):
                data = json.loads(outputs[name]["dgls_report"][0])
                assert data["reason"] is None, data["reason"]
                assert data["uses"] > 0

    def one_file_twice(self) -> None:
        """Streamed and plain branches of one loader in one workflow, in both orders."""
        made = sampled(self.wan, self.half)
        plain = {**made["sample"]["inputs"], "model": ["loader", 0]}
        made["plain"] = {"class_type": "KSampler", "inputs": plain}
        made["save2"] = node("SaveLatent", samples=["plain", 0], filename_prefix="tiny")
        outputs = self.server.run(made)
        for name in ("save", "save2"):
            found = compared(self.plain, outputs[name])
            assert found == "yes", f"{name}: {found}"

    def lora_strength(self) -> None:
        """A LoRA added, changed, taken away, added twice: each as without the pack."""
        file = self.wan["lora"]
        for strengths in ([1.0], [0.5], [], [1.0], [0.7, 0.4], [-1.0], []):
            loras = [lora(file, strength) for strength in strengths]
            partly = node("DGLSTestPartly")
            expected = latent(self.server, sampled(self.wan, *loras, partly))
            for chain in ([*loras, self.half], [self.half, *loras]):
                found = compared(expected, latent(self.server, sampled(self.wan, *chain)))
                assert found == "yes", f"strengths {strengths}: {found}"

    def fits(self) -> None:
        workflow = reported(sampled(self.wan, stream("1TiB")))
        outputs = self.server.run(workflow)
        data = json.loads(outputs["report"]["dgls_report"][0])
        assert "fits" in (data["reason"] or ""), data
        assert compared(self.plain, outputs["save"]) == "yes"
        self.same(sampled(self.wan, stream("auto")))

    def original_nodes(self) -> None:
        """The original's nodes with its documented inputs, and each of them set."""
        self.same(original(self.wan))
        vram = self.half["inputs"]["vram"]
        self.same(original(self.wan, vram=vram))
        for indices in ("0", "0,2,5", " 3 , 1 ", "0,1,2,3,4,5"):
            for prefetch in (0, 1, 100):
                self.same(original(self.wan, gpu_layer_indices=indices, prefetch=prefetch))
        switches = dict.fromkeys(("cpu_threading", "cuda_streams", "cuda_graphs", "verbose"), True)
        self.same(original(self.wan, vram=vram, lora_size_mb=100, **switches))
        self.same(original(self.wan, vram=vram, clear_model_cache=True))
        self.same(original(self.wan, vram=vram, model_type="hunyuan"))
        self.same(original(self.wan, vram=vram, model_type="unet"))
        self.same(original(self.wan, vram=vram, nuke_all_caches=True))

    def saved_workflow(self) -> None:
        """A workflow that was saved with the original, in API format, without new inputs."""
        text = (Path(__file__).parent / "saved" / "original_api.json").read_text()
        made = json.loads(text.replace("MODEL.safetensors", self.wan["file"]))
        made |= tail(self.wan, ["2", 0])
        self.same(made)

    def cleanup(self) -> None:
        for clear in (True, False):
            made = sampled(self.wan, self.half)
            made["clean"] = node("DGLSCleanup", trigger=["sample", 0], use_comfy_clear=clear)
            made["save"]["inputs"]["samples"] = ["clean", 0]
            self.same(made)
        self.same(sampled(self.wan, self.half))

    def casts(self) -> None:
        """Casts make the blocks smaller, change pictures little, and no one else's."""
        vram = self.half["inputs"]["vram"]
        whole = self.block_bytes(original(self.wan, vram=vram), 0)
        # The file's numbers are bf16, of which f16 holds all but the smallest.
        has_nf4 = importlib.util.find_spec("bitsandbytes") is not None
        sizes = {"bf16": (0.51, 0.0), "f16": (0.51, 0.01)}
        sizes["nf4"] = (0.2, 0.9) if has_nf4 else (0.51, 0.0)
        sizes |= {"f8_e4m3": (0.27, 0.5), "fp4": (0.2, 0.9)}
        for name, (share, error) in sizes.items():
            workflow = original(self.wan, vram="auto", gpu_layer_indices="0", prefetch=1)
            workflow["swap"]["inputs"]["cast_target"] = f"bf16 f16, f32 {name}"
            found = self.block_bytes(workflow, error)
            assert found < share * whole * 5 / 6, f"{name}: {found} of {whole} bytes"
            self.same(original(self.wan, vram=vram))
        errors = {"fp16": 0.01, "bf16": 0.0, "fp8_e4m3": 0.5, "fp4": 0.9}
        errors["nf4"] = 0.9 if has_nf4 else 0.0
        for name, error in errors.items():
            workflow = original(self.wan, gpu_layer_indices="0", full_cast=name)
            assert self.block_bytes(workflow, error) < 0.51 * whole, name
        for name in ("fp16", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"):
            latent(self.server, original(self.wan, vram="5MiB", cast_dtype=name))
        self.same(sampled(self.wan))

    def block_bytes(self, workflow: dict[str, Any], most: float) -> int:
        """The bytes of the blocks that the engine has; the picture may be so far off."""
        outputs = self.server.run(reported(workflow))
        data = json.loads(outputs["report"]["dgls_report"][0])
        assert data["reason"] is None, data["reason"]
        error = (outputs["save"] - self.plain).abs().max() / self.plain.abs().max()
        assert error <= most, f"differs by {error:.3f} of the largest value"
        assert most < 0.1 or error > 0, "had no effect"
        return sum(kept + moved for _, kept, moved in data["blocks"])

    def mistakes(self) -> None:
        """Each is a node's error that names the input, its value and what is allowed."""
        folder = Path(self.server.base) / "models" / "diffusion_models"
        made = {
            "broken.safetensors": (folder / self.wan["file"]).read_bytes()[: 5 * _MIB],
            "words.safetensors": b"no model at all",
        }
        for name, data in made.items():
            (folder / name).write_bytes(data)
        sd3 = self.entries["sd3"]
        foreign = original(self.wan)
        foreign["other"] = original(sd3)["loader"]
        foreign["swap"]["inputs"]["layers"] = ["other", 1]
        lora_file = folder / "lora.safetensors"
        lora_file.write_bytes((folder.parent / "loras" / self.wan["lora"]).read_bytes())
        cases: list[tuple[dict[str, Any], list[str]]] = [
            (original(self.wan | {"file": "missing.safetensors"}), ["model_name", "missing"]),
            (original(self.wan | {"file": "broken.safetensors"}), ["model_name", "broken"]),
            (original(self.wan | {"file": "words.safetensors"}), ["model_name", "words"]),
            (original(self.wan | {"file": "lora.safetensors"}), ["model_name", "lora"]),
            (foreign, ["layers", "OpenAISignatureMMDITWrapper", "WanModel"]),
            (original(self.wan, gpu_layer_indices="0,6"), ["gpu_layer_indices", "[6]", "0-5"]),
            (original(self.wan, gpu_layer_indices="-1"), ["gpu_layer_indices", "[-1]", "0-5"]),
            (original(self.wan, gpu_layer_indices="a"), ["gpu_layer_indices", "[a]", "0-5"]),
            (original(self.wan, cast_target="f32 f12"), ["cast_target", "f12", "bf16"]),
            (original(self.wan, cast_target="f32"), ["cast_target", "'f32'", "FROM TO"]),
            (original(self.wan, prefetch=101), ["prefetch", "101", "100"]),
            (sampled(self.wan, stream("-1GiB")), ["vram", "-1GiB", "auto"]),
            (sampled(self.wan, stream("8 apples")), ["vram", "apples", "8GiB"]),
            (sampled(self.wan, stream("1e40")), ["vram", "1e40", "auto"]),
            (sampled(self.wan, stream("4")), ["vram", "4", "64 KiB"]),
            (sampled(self.wan, stream("2MiB")), ["vram", "2.00 MiB", "at least"]),
        ]
        problems = [text for workflow, words in cases for text in self.refused(workflow, words)]
        for name in (*made, "lora.safetensors"):
            (folder / name).unlink()
        assert not problems, "\n".join(problems)
        self.same(sampled(self.wan, self.half))

    def refused(self, workflow: dict[str, Any], words: list[str]) -> list[str]:
        """What is wrong with the error that a workflow ends with."""
        try:
            self.server.run(workflow)
        except PromptError as error:
            return [f"{word!r} is not in: {error}" for word in words if word not in str(error)]
        return [f"{words} was accepted"]


STORIES = [
    *("interrupt", "free", "high_and_low", "one_file_twice", "lora_strength", "fits"),
    *("original_nodes", "saved_workflow", "cleanup", "casts", "mistakes"),
    *("torch_compile", "weight_hooks", "gguf", "multigpu", "model_patches"),
]


def run_scenarios(
    server: Server,
    entries: dict[str, Any],
    names: list[str] | None = None,
    number_bytes: int = 4,
) -> dict[str, str]:
    """Every story, one after the other in one server: what one leaves behind the next finds."""
    from others import Others

    scenarios = Others(server, entries, number_bytes)
    results: dict[str, str] = {}
    for name in names or STORIES:
        story: Callable[[], None] = getattr(scenarios, name)
        shown = name.replace("_", " ")
        try:
            story()
            results[shown] = "yes"
        except (AssertionError, PromptError) as error:
            results[shown] = f"failed: {error}"[:2000]
        print(f"{shown}: {results[shown]}", flush=True)
    return results

"""Test-only nodes for a real ComfyUI: conditioning and latents without encoders, tiny files.

ComfyUI hard-wires some dimensions of some architectures. A file whose metadata carries
``dgls_test`` is detected as if it had the ``match`` values, and its network is built with the
``build`` values; every other file is detected as always.
"""

from __future__ import annotations

import json

import comfy.model_detection
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import ComfyExtension, io

_MARK = "dgls_test_shim"


def _plain(values):
    return {k: tuple(v["tuple"]) if isinstance(v, dict) else v for k, v in values.items()}


def install_shim():
    """Lets ComfyUI detect tiny files of architectures with hard-wired dimensions."""
    detection = comfy.model_detection
    if hasattr(detection, _MARK):
        return
    detect, build = detection.detect_unet_config, detection.model_config_from_unet

    def detect_unet_config(state_dict, key_prefix, metadata=None):
        config = detect(state_dict, key_prefix, metadata=metadata)
        if config is not None and "dgls_test" in (metadata or {}):
            config.update(_plain(json.loads(metadata["dgls_test"])["match"]))
        return config

    def model_config_from_unet(state_dict, prefix, use_base_if_no_match=False, metadata=None):
        config = build(state_dict, prefix, use_base_if_no_match, metadata=metadata)
        if config is not None and "dgls_test" in (metadata or {}):
            config.unet_config.update(_plain(json.loads(metadata["dgls_test"])["build"]))
        return config

    detection.detect_unet_config = detect_unet_config
    detection.model_config_from_unet = model_config_from_unet
    setattr(detection, _MARK, True)


install_shim()


class TestConditioning(io.ComfyNode):
    """Seeded random conditioning: {"cross_attn": {"shape": [...]}, ...}."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DGLSTestConditioning",
            category="testing",
            inputs=[
                io.String.Input("spec", multiline=True),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1),
                io.Int.Input("nonce", default=0, min=0, max=2**31 - 1),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, spec, seed, nonce):
        generator = torch.Generator("cpu").manual_seed(seed)
        made = {}
        for name, value in sorted(json.loads(spec).items()):
            if value.get("kind") == "ones":
                made[name] = torch.ones(value["shape"], dtype=getattr(torch, value["dtype"]))
            else:
                made[name] = torch.randn(value["shape"], generator=generator)
        return io.NodeOutput([[made.pop("cross_attn"), made]])


class TestLatent(io.ComfyNode):
    """An empty latent of any shape."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DGLSTestLatent",
            category="testing",
            inputs=[io.String.Input("shape", default="1,4,16,16")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, shape):
        return io.NodeOutput({"samples": torch.zeros([int(n) for n in shape.split(",")])})


class _PartlyLoaded(ModelPatcher):
    """ComfyUI's own partial loading, forced: every weight is offloaded, LoRAs are on the fly.

    A weight that is no operation of ComfyUI's (HiDream's MoEGate) cannot be patched at use; partial
    loading without room for it drops its patch. It is patched here, as with room.
    """

    def load(
        self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False
    ):
        super().load(device_to, 0.1, force_patch_weights, False)
        for *_, name, module, params in self._load_list():
            if not hasattr(module, "comfy_cast_weights"):
                for param in params:
                    self.patch_weight_to_device(f"{name}.{param}", device_to)


class _Through(io.ComfyNode):
    """A MODEL in and out."""

    NODE_ID = ""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=cls.NODE_ID,
            category="testing",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
        )


def _static_clone(model):
    """A clone for ComfyUI's loader without dynamic VRAM."""
    return model.clone(disable_dynamic=True) if model.is_dynamic() else model.clone()


class TestPartly(_Through):
    """The reference for LoRA maths that is done on the fly."""

    NODE_ID = "DGLSTestPartly"

    @classmethod
    def execute(cls, model):
        import uuid

        made = _static_clone(model)
        made.__class__ = _PartlyLoaded
        made.patches_uuid = uuid.uuid4()
        return io.NodeOutput(made)


class TestWhole(_Through):
    """The reference for LoRA maths that is baked in: ComfyUI's loader without dynamic VRAM."""

    NODE_ID = "DGLSTestWhole"

    @classmethod
    def execute(cls, model):
        made = _static_clone(model)
        return io.NodeOutput(made)


class GGUFModelPatcher(ModelPatcher):
    """In the shape of the GGUF pack's: it bakes nothing, and moves nothing of its own accord.

    LoRAs ride on the weights, and every layer casts at use; a subclass by name, as that pack's.
    """

    patch_on_device = False

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, **_):
        return None

    def load(self, *args, force_patch_weights=False, **kwargs):
        super().load(*args, force_patch_weights=True, **kwargs)
        for _, module in self.model.named_modules():
            if not hasattr(module, "comfy_cast_weights"):
                continue
            module.comfy_cast_weights = True

    def clone(self, *args, **kwargs):
        made = super().clone(*args, **kwargs)
        made.patch_on_device = self.patch_on_device
        return made


class TestForeign(_Through):
    """A MODEL with another pack's patcher."""

    NODE_ID = "DGLSTestForeign"

    @classmethod
    def execute(cls, model):
        made = _static_clone(model)
        made.__class__ = GGUFModelPatcher
        return io.NodeOutput(made)


class TestDeepClone(_Through):
    """What ComfyUI's multi-GPU nodes make for another device, of which there is none here."""

    NODE_ID = "DGLSTestDeepClone"

    @classmethod
    def execute(cls, model):
        return io.NodeOutput(model.deepclone_multigpu(new_load_device=model.load_device))


class TestExtension(ComfyExtension):
    """The nodes above."""

    async def get_node_list(self):
        return [
            *(TestConditioning, TestLatent, TestPartly, TestWhole, TestForeign),
            TestDeepClone,
        ]


async def comfy_entrypoint():
    return TestExtension()

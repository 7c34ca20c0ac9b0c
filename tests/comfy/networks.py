"""Every network class of comfy/ldm by itself: streamed, its forward gives the same bits as plain.

``networks.py COMFYUI_DIR RESULTS.json [--device cuda] [CLASS ...]``, run by ComfyUI's own Python.
Tiny networks with seeded weights are loaded by ComfyUI's model management and called with seeded
arguments, streamed by blocks and by layers. Each container of the table of blocks has to have run a
streamed block. On a GPU a weight that a layer's owner uses by itself would be on the host.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
WAYS = (("block", 0.25), ("block", 0.5), ("block", 0.75), ("layer", 0.25))


def prepare(comfyui: str, device: str) -> None:
    sys.path.insert(0, comfyui)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    args.use_pytorch_cross_attention = True


def network(path: str, build: dict[str, Any]) -> Any:
    import comfy.ops
    import torch
    from models import _weight

    module, _, name = f"comfy.ldm.{path}".rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    known = inspect.signature(kind).parameters
    options = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        options = {k: v for k, v in options.items() if k in known}
    with torch.no_grad():
        net = kind(**build, **options)
        state = {k: _weight(k, v) for k, v in net.state_dict().items()}
        net.load_state_dict(state)
    return net.requires_grad_(False).eval()


def patcher(net: Any, device: str) -> Any:
    import torch
    from comfy.model_patcher import ModelPatcher

    class Base(torch.nn.Module):
        """What a patcher holds."""

        def __init__(self) -> None:
            super().__init__()
            self.diffusion_model = net
            self.device, self.manual_cast_dtype, self.current_patcher = None, None, None

    return ModelPatcher(Base(), torch.device(device), torch.device("cpu"))


def run(model: Any, call: Any) -> list[Any]:
    """Two forwards with the same arguments, as a sampler would run them; or one of each."""
    import comfy.model_management as mm
    import torch

    getattr(model.model.diffusion_model, "clear_kv_cache", lambda: None)()
    with torch.inference_mode():
        mm.load_models_gpu([model])
        model.pre_run()
        try:
            calls = call if isinstance(call, tuple) else (call, call)
            return [leaf for one in calls for leaf in tensors(forward(model, one))]
        finally:
            model.cleanup()


def forward(model: Any, call: Any) -> Any:
    import torch
    from torch.utils._pytree import tree_map_only

    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    arguments = tree_map_only(torch.Tensor, lambda t: t.to(model.load_device), call(random))
    arguments.setdefault("transformer_options", {})
    net = model.model.diffusion_model
    known = inspect.signature(net.forward).parameters
    if "transformer_options" not in known and not any(
        p.kind is p.VAR_KEYWORD for p in known.values()
    ):
        del arguments["transformer_options"]
    return net(**arguments)


def tensors(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [leaf for v in values for leaf in tensors(v)] if values is not None else []


def watched(net: Any) -> set[str]:
    """The names of the blocks that ran with weights that are not their masters, from now on."""
    from dgls_torch.comfy.containers import network_blocks

    seen: set[str] = set()

    def watch(name: str, block: Any) -> None:
        masters = {n: p.data_ptr() for n, p in block.named_parameters()}

        def look(module: Any, *_: Any) -> None:
            if any(p.data_ptr() != masters[n] for n, p in module.named_parameters()):
                seen.add(name)

        block.register_forward_pre_hook(look)

    for name, block in network_blocks(net):
        watch(name, block)
    return seen


def checked(spec: dict[str, Any], device: str) -> str:
    """Yes, or what is wrong."""
    import torch
    from comfy.model_management import unload_all_models

    from dgls_torch.comfy.attach import stream_model
    from dgls_torch.comfy.containers import CONTAINERS
    from dgls_torch.comfy.residency import Residency, sizes_of
    from dgls_torch.comfy.settings import Settings

    name = spec["net"].rpartition(".")[2]
    model = patcher(network(spec["net"], spec["build"]), device)
    expected = run(model, spec["call"])
    if not all(torch.isfinite(t).all() for t in expected) or not any(t.any() for t in expected):
        return "failed: the plain result is nothing to compare with"
    seen = watched(model.model.diffusion_model)
    for unit, share in WAYS:
        sizes = sizes_of(model.model, Settings(unit=unit))
        vram = max(sizes.least_bytes, int(share * sizes.total_bytes))
        stream = stream_model(model, Settings(vram_bytes=vram, unit=unit))
        found = run(stream, spec["call"])
        latest = Residency.of(model.model).latest
        if latest is None:
            return f"failed: not streamed: {Residency.of(model.model).passed_by}"
        report = latest.report()
        if len(found) != len(expected) or not all(map(torch.equal, expected, found)):
            return f"failed: differs by {unit}s at {share:.0%}"
        if report.plan.streamed_bytes == 0 and vram < sizes.total_bytes:
            return f"failed: nothing was streamed by {unit}s at {share:.0%}"
    idle = [
        path
        for path in CONTAINERS[name]
        if path not in spec.get("idle", {}) and not any(s.startswith(path) for s in seen)
    ]
    after = run(model, spec["call"])
    unload_all_models()
    if idle:
        return f"failed: no block of {', '.join(idle)} was run by the stream"
    return "yes" if all(map(torch.equal, expected, after)) else "failed: plain afterwards differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comfyui")
    parser.add_argument("results", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("names", nargs="*", metavar="CLASS", help="all if not given")
    options = parser.parse_args()
    prepare(options.comfyui, options.device)
    from more_network_specs import SPECS as MORE
    from network_specs import SPECS
    from specs import SPECS as SERVED

    done = {spec["net"].rpartition(".")[2] for spec in SERVED.values()}
    found: dict[str, str] = {}
    for name, spec in (SPECS | MORE).items():
        if options.names and name not in options.names:
            continue
        assert name not in done, f"{name} is checked over HTTP already"
        began = time.monotonic()
        try:
            found[name] = checked(spec, options.device)
        except Exception:
            found[name] = "failed: " + "".join(traceback.format_exc().splitlines(True)[-7:])
        print(f"network {name}: {found[name]} ({time.monotonic() - began:.0f} s)", flush=True)
    options.results.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

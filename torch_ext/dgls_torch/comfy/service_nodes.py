"""The nodes beside the streaming ones: DGLS Cleanup, DGLS Report."""

from __future__ import annotations

import gc
import json
import logging
from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from dgls_torch.comfy import loading, tooltips
from dgls_torch.comfy.nodes import CATEGORY
from dgls_torch.comfy.patcher import StreamPatcher
from dgls_torch.comfy.report_view import report_data, report_text
from dgls_torch.comfy.residency import Residency
from dgls_torch.units import format_bytes

log = logging.getLogger("dgls_torch")


class DGLSCleanup(io.ComfyNode):  # type: ignore[misc]
    """Gives device memory back in the middle or at the end of a workflow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Anything through, as the original's."""
        tips = tooltips.CLEANUP
        return io.Schema(
            node_id="DGLSCleanup",
            display_name="DGLS Cleanup",
            category=CATEGORY,
            description="Gives back what DGLS holds on the device, and unloads ComfyUI's models.",
            search_aliases=["free memory", "unload models"],
            inputs=[
                io.AnyType.Input("trigger", tooltip=tips["trigger"]),
                io.Boolean.Input(
                    "use_comfy_clear", default=True, optional=True, tooltip=tips["use_comfy_clear"]
                ),
                io.Boolean.Input("verbose", default=True, optional=True, tooltip=tips["verbose"]),
            ],
            outputs=[io.AnyType.Output("output", display_name="output")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, trigger: Any, use_comfy_clear: bool = True, verbose: bool = True
    ) -> io.NodeOutput:
        """Frees what DGLS holds, then everything else if that is asked for."""
        freed = 0
        for patcher in mm.loaded_models():
            if isinstance(patcher, StreamPatcher):
                freed += patcher.partially_unload(patcher.offload_device, float(1 << 62))
        if use_comfy_clear:
            loading.clear_memory()
        else:
            gc.collect()
            mm.soft_empty_cache()
        if verbose:
            log.info("DGLS: %s of weights given back%s", format_bytes(freed), _in_use())
        return io.NodeOutput(trigger)


def _in_use() -> str:
    if not torch.cuda.is_available():
        return ""
    device = mm.get_torch_device()
    used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    count = len(mm.loaded_models())
    return (
        f"; on {device} {format_bytes(used)} in use, {format_bytes(held)} reserved, {count} models"
    )


class DGLSReport(io.ComfyNode):  # type: ignore[misc]
    """Shows what was planned and what was measured."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """A streamed MODEL in; the report as text, and as a panel in the node."""
        tips = tooltips.REPORT
        return io.Schema(
            node_id="DGLSReport",
            display_name="DGLS Report",
            category=CATEGORY,
            description="Shows plan, residency, timeline and rates of a streamed model.",
            search_aliases=["vram", "profile", "block swap report", "timeline"],
            inputs=[
                io.Model.Input("model", tooltip=tips["model"]),
                io.AnyType.Input("after", optional=True, tooltip=tips["after"]),
            ],
            outputs=[io.String.Output("text", display_name="text")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """Never the same: each prompt is reported."""
        return float("nan")

    @classmethod
    def execute(cls, model: Any, after: Any = None) -> io.NodeOutput:
        """Reads the report of the model's last run; never waits for the device."""
        residency, name = Residency.of(model.model), type(model.model).__name__
        text = report_text(name, residency)
        data = json.dumps(report_data(name, residency))
        return io.NodeOutput(text, ui={"text": [text], "dgls_report": [data]})

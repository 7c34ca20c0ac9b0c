"""What ComfyUI is given: the list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from dgls_torch.comfy.nodes import DGLSModelLoader, DGLSStream, DynamicSwappingLoader
from dgls_torch.comfy.service_nodes import DGLSCleanup, DGLSReport


class DGLSExtension(ComfyExtension):  # type: ignore[misc]
    """The DGLS nodes."""

    async def get_node_list(self) -> list[type]:
        """The nodes, in the order of a workflow."""
        return [DGLSModelLoader, DynamicSwappingLoader, DGLSStream, DGLSReport, DGLSCleanup]

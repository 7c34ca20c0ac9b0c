"""DGLS nodes for ComfyUI: this folder in custom_nodes and the dgls_torch wheel are all it takes."""

import logging
import sys

__version__ = "0.1.0"  # for ComfyUI's registry
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Gives ComfyUI the nodes; without the wheel none, and the command that installs it."""
    try:
        from dgls_torch.comfy.extension import DGLSExtension
    except ImportError as error:
        from comfy_api.latest import ComfyExtension

        class DGLSExtension(ComfyExtension):
            """No nodes."""

            async def get_node_list(self):
                """None of them."""
                return []

        logging.getLogger("dgls_torch").error(
            'DGLS: the dgls_torch package is missing or does not load (%s); run "%s" -m pip '
            "install dgls_torch and restart ComfyUI.",
            error,
            sys.executable,
        )
    return DGLSExtension()

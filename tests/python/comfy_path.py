"""Puts a ComfyUI on the path, before anything imports a part of it.

Goal: tests of dgls_torch.comfy need no ComfyUI, and run unchanged against a real one.
Method: `comfy_fake` is put on the path; with DGLS_REAL_COMFY=1 the checkout in COMFYUI_DIR is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

IS_REAL = os.environ.get("DGLS_REAL_COMFY", "0") == "1"


def put_on_path() -> None:
    """Chooses the ComfyUI of this process."""
    if not IS_REAL:
        sys.path.insert(0, str(Path(__file__).parent / "comfy_fake"))
        return
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = True

"""Checks torch and loads the extension module: one clear sentence instead of a linker's."""

from __future__ import annotations

import re
import sys
from importlib import import_module, metadata

OLDEST_TORCH = (2, 10)

try:
    __version__ = metadata.version("dgls_torch")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"


def check_torch() -> None:
    """Raises ImportError when torch is missing or too old, saying what was found."""
    needed = "dgls_torch needs PyTorch 2.10 or newer"
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{needed}, and none is installed for {sys.executable}; install the build for your "
            "GPU as pytorch.org says (dgls_torch never installs one itself)"
        ) from error
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise ImportError(f"{needed}, found {torch.__version__}")


def load() -> None:
    """Loads ``dgls_torch._C``, which registers ``torch.ops.dgls``, and the ops' fake kernels."""
    check_torch()
    try:
        import_module("dgls_torch._C")
    except ImportError as error:
        raise ImportError(
            f"dgls_torch's extension module does not load here ({error}); reinstall with "
            f'"{sys.executable}" -m pip install --force-reinstall --no-deps dgls_torch'
        ) from error
    import_module("dgls_torch.ops")

"""The contract with a ComfyUI checkout: what the fake promises, the real one keeps.

Goal: a change of ComfyUI that would break the nodes is seen by a test, not by a user.
Method: signatures and network classes are compared as text; the tests that run against the fake are
run against the checkout's code, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_path import IS_REAL

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.needs_comfy,
    pytest.mark.skipif(IS_REAL, reason="this is the process that the test below starts"),
]


def test_signatures_and_networks() -> None:
    command = [sys.executable, str(ROOT / "tests" / "comfy" / "contract.py")]
    done = subprocess.run(
        [*command, os.environ["COMFYUI_DIR"]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_contract_with_the_real_code() -> None:
    """COMFYUI_PYTHON is a Python with ComfyUI's requirements, pytest and the wheel."""
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    names = ("patcher", "limits", "regressions", "quantized")
    files = [str(Path(__file__).parent / f"test_comfy_{name}.py") for name in names]
    command = [python, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"DGLS_REAL_COMFY": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

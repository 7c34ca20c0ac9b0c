"""What all tests share.

Goal: results do not depend on the number of cores, a skip for want of hardware is loud and can be
made a failure, and the fake CUDA driver is built once.
Method: hooks and fixtures of pytest.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from comfy_path import put_on_path
from processes import Processes

if TYPE_CHECKING:
    from collections.abc import Iterator

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has it that starts tests in the background; some of them send it to themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)
put_on_path()
ROOT = Path(__file__).resolve().parents[2]


def _comfy() -> bool:
    folder = os.environ.get("COMFYUI_DIR")
    return folder is not None and (Path(folder) / "comfy" / "model_patcher.py").exists()


NEEDS = {
    "needs_cuda": ("FAIL_WITHOUT_CUDA", "a CUDA device", torch.cuda.is_available),
    "needs_comfy": ("FAIL_WITHOUT_COMFY", "a ComfyUI checkout named by COMFYUI_DIR", _comfy),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, (variable, what, is_there) in NEEDS.items():
        if item.get_closest_marker(marker) is None or is_there():
            continue
        if os.environ.get(variable, "0") not in ("", "0"):
            pytest.fail(f"needs {what}, and {variable} is set", pytrace=False)
        pytest.skip(f"NOT TESTED: needs {what}")


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """In ComfyUI's modules no collection looks at objects of before: a third of a second each.

    They are most of all torch's compiler, once a test has imported it, and nodes collect often.
    """
    if not request.module.__name__.startswith("test_comfy"):
        yield
        return
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Runs scripts in processes of their own."""
    server = Processes()
    yield server
    server.close()


@pytest.fixture(scope="session")
def fake_driver() -> Path:
    """The library that answers as a CUDA driver, built by cargo."""
    return build_fake_driver()


@pytest.fixture(scope="session")
def fake_driver_without_symbols() -> Path:
    """The same without two functions, as an old driver would be."""
    return build_fake_driver("missing-symbol")


def build_fake_driver(*features: str) -> Path:
    named = os.environ.get("DGLS_FAKE_DRIVER")
    if named and not features:
        return Path(named)
    cargo = shutil.which("cargo") or shutil.which("cargo", path=Path.home() / ".cargo" / "bin")
    if cargo is None:
        pytest.skip("NOT TESTED: the CUDA path, since the fake driver needs cargo to be built")
    command = [cargo, "build", "--locked", "--package", "fakecuda", "--message-format=json"]
    environment = dict(os.environ)
    if features:
        command += ["--features", ",".join(features)]
        target = Path(environment.get("CARGO_TARGET_DIR", ROOT / "target"))
        environment["CARGO_TARGET_DIR"] = str(target / "-".join(features))
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    made = [
        Path(name)
        for message in messages
        if message.get("target", {}).get("name") in ("fakecuda", "cuda")
        for name in message.get("filenames", [])
        if Path(name).name == "libcuda.so"
    ]
    assert made, f"cargo made no libcuda.so: {built.stdout[-2000:]}"
    return made[0]

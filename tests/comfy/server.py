"""A headless ComfyUI server of one's own: started, talked to over HTTP, ended by its process id."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

# Attention that does not choose its chunks by free memory, and deterministic kernels.
# On a GPU the latter would switch copies beside computing off.
EXACT = {
    "cpu": ("--cpu", "--use-pytorch-cross-attention", "--deterministic"),
    "cuda": ("--use-pytorch-cross-attention",),
}


class PromptError(RuntimeError):
    """A prompt that was refused, or a node of it that failed."""


class Server:
    """``with Server(...) as server: server.run(workflow)``."""

    def __init__(
        self,
        base: Path,
        packs: dict[str, Path],
        *,
        comfyui: Path,
        python: str,
        arguments: tuple[str, ...] = EXACT["cpu"],
        environment: dict[str, str] | None = None,
    ) -> None:
        self.base, self.packs, self.comfyui, self.python = base, packs, comfyui, python
        self.arguments, self.environment = arguments, environment or {}

    def __enter__(self) -> Server:
        self.folder = Path(tempfile.mkdtemp(prefix="dgls_comfy_"))
        packs = self.folder / "custom_nodes"
        self.output = self.folder / "output"
        for path in (packs, self.output, self.base / "custom_nodes", self.base / "input"):
            path.mkdir(parents=True, exist_ok=True)
        for name, pack in self.packs.items():
            (packs / name).symlink_to(pack)
        paths = self.folder / "paths.yaml"
        paths.write_text(f"run:\n  custom_nodes: {json.dumps(str(packs))}\n")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            *(self.python, str(self.comfyui / "main.py"), "--listen", "127.0.0.1"),
            *("--port", str(self.port), "--base-directory", str(self.base)),
            *("--output-directory", str(self.output), "--temp-directory", str(self.folder)),
            *("--extra-model-paths-config", str(paths), "--database-url", "sqlite:///:memory:"),
            *("--disable-auto-launch", "--disable-api-nodes", "--dont-print-server"),
            *self.arguments,
        ]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"OMP_NUM_THREADS": "2"} | self.environment
        self._log = (self.folder / "log.txt").open("wb")
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, cwd=self.comfyui, env=environment
        )
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError):
                self.get("/system_stats", timeout=5)
                return self
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = self.log()
                self.__exit__()
                raise RuntimeError(f"ComfyUI did not start:\n{log[-4000:]}")
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        for number, patience in ((signal.SIGINT, 20), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            if self.process.poll() is not None:
                break
            self.process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def log(self) -> str:
        """All that the server has written so far."""
        return (self.folder / "log.txt").read_text(errors="replace")

    def get(self, path: str, timeout: float = 60) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            return json.load(response)

    def post(self, path: str, data: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            raise PromptError(f"{error.code} {error.read().decode(errors='replace')}") from None
        return json.loads(body) if body else None

    def queue(self, workflow: dict[str, Any]) -> str:
        data = {"prompt": workflow, "client_id": uuid.uuid4().hex}
        return str(self.post("/prompt", data)["prompt_id"])

    def wait(self, prompt: str, patience: float = 900) -> dict[str, Any]:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended:\n{self.log()[-4000:]}")
            found = self.get(f"/history/{prompt}").get(prompt)
            if found is not None:
                return dict(found)
            time.sleep(0.05)
        raise TimeoutError(self.log()[-4000:])

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Runs a workflow; the outputs of its nodes, latents as tensors.

        Raises:
            PromptError: With the node's type and its message.
        """
        from safetensors.torch import load_file

        history = self.wait(self.queue(workflow))
        if history["status"]["status_str"] != "success":
            ends = ("execution_error", "execution_interrupted")
            errors = [m[1] for m in history["status"]["messages"] if m[0] in ends]
            first = errors[0] if errors else {}
            raise PromptError(f"{first.get('node_type')}: {first.get('exception_message')}")
        outputs = dict(history["outputs"])
        for node, value in outputs.items():
            for file in value.get("latents", []):
                path = self.output / file["subfolder"] / file["filename"]
                outputs[node] = load_file(path)["latent_tensor"]
        return outputs

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def free(self) -> None:
        """Unloads all models and drops all cached outputs, as the Manager's button does."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.5)  # it is done between prompts, by the server's own loop

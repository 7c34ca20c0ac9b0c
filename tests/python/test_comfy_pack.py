"""The node pack's folder: what ComfyUI and its registry read there.

Goal: importing the pack does nothing; without the wheel it says one sentence; help pages, tooltips,
locales and examples are complete.
Method: the entry point in processes of its own; files compared with the schemas.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comfy_path import IS_REAL

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).parent / "comfy_fake"
pytestmark = pytest.mark.skipif(IS_REAL, reason="about the pack's own files")
LOAD = """
import importlib.util, sys, asyncio, logging
logging.basicConfig(format="%(message)s")
sys.path.insert(0, {fake!r})
{before}
spec = importlib.util.spec_from_file_location("pack", {pack!r})
pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
assert not sys.modules.get("dgls_torch") and "torch" not in sys.modules, "import did work"
nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
print(len(nodes), "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized())
"""


def run(before: str = "") -> subprocess.CompletedProcess[str]:
    code = LOAD.format(fake=str(FAKE), pack=str(ROOT / "__init__.py"), before=before)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=FAKE
    )


def nodes() -> dict[str, Any]:
    from dgls_torch.comfy.extension import DGLSExtension

    found = asyncio.run(DGLSExtension().get_node_list())
    return {n.define_schema().node_id: n.define_schema().fields for n in found}


def test_importing_the_pack_does_no_work_and_no_cuda() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "False"]


def test_without_the_wheel_one_sentence_names_the_command() -> None:
    done = run("sys.modules['dgls_torch'] = None")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "0"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert f'run "{sys.executable}" -m pip install dgls_torch and restart ComfyUI' in lines[0]


def test_locales_are_complete() -> None:
    english = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8"))
    chinese = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))
    for name, schema in nodes().items():
        tips = {field.id: field.options["tooltip"] for field in schema["inputs"]}
        assert english[name]["display_name"] == schema["display_name"]
        written = {key: value["tooltip"] for key, value in english[name]["inputs"].items()}
        assert written == tips, "run scripts/locales.py"
        assert list(chinese[name]["inputs"]) == list(tips)
        texts = [
            chinese[name]["description"],
            *(v["tooltip"] for v in chinese[name]["inputs"].values()),
        ]
        assert all(re.search("[\u4e00-\u9fff]", text) for text in texts)
    assert set(english) == set(chinese) == set(nodes())


def test_every_node_has_a_help_page_that_names_its_inputs() -> None:
    for name, schema in nodes().items():
        page = (ROOT / "web" / "docs" / f"{name}.md").read_text("utf-8")
        assert page.startswith(f"# {schema['display_name']}\n")
        table = "\n".join(line for line in page.splitlines() if line.startswith("|"))
        for field in schema["inputs"]:
            assert re.search(rf"\b{field.id}\b", table), f"{name}: {field.id}"


def test_examples_use_inputs_that_exist_and_have_pictures() -> None:
    known = nodes()
    seen = set()
    for file in (ROOT / "example_workflows").glob("*.json"):
        assert file.with_suffix(".png").stat().st_size > 10_000
        for node in json.loads(file.read_text())["nodes"]:
            if node["type"] not in known:
                continue
            seen.add(node["type"])
            fields = known[node["type"]]["inputs"]
            widgets = [f for f in fields if "default" in f.options or "options" in f.options]
            assert len(node["widgets_values"]) == len(widgets), f"{file.name}: {node['type']}"
    assert seen >= {"DGLSStream", "DGLSModelLoader", "DynamicSwappingLoader", "DGLSReport"}


def test_the_panel_draws_no_canvas_and_polls_nothing() -> None:
    text = (ROOT / "web" / "dgls_report.js").read_text("utf-8")
    for word in ("getContext", "onDraw", "setInterval", "requestAnimationFrame", "innerHTML"):
        assert word not in text
    assert "onExecuted" in text


def test_the_packs_requirements_never_name_torch() -> None:
    lines = (ROOT / "requirements.txt").read_text().split()
    assert lines == ["dgls_torch"]


def test_the_registry_is_told_what_it_needs() -> None:
    """Its own parser of pyproject.toml takes no dynamic version but by a path to a file."""
    text = (ROOT / "pyproject.toml").read_text()
    name = re.search(r'^name = "([A-Za-z][\w.-]{0,98})"$', text, re.MULTILINE)
    assert name is not None
    assert "comfyui" not in name[1].lower()
    comfy = text[text.index("[tool.comfy]") :]
    assert 'DisplayName = "' in comfy
    assert 'requires-comfyui = ">=0.33"' in comfy
    assert "web =" not in comfy  # WEB_DIRECTORY says it; both would load every script twice
    path = re.search(r'\[tool\.comfy\.version\]\npath = "([^"]+)"', comfy)
    assert path is not None
    version = re.search(r'^__version__ = "(\d+\.\d+\.\d+)"', (ROOT / path[1]).read_text(), re.M)
    cargo = re.search(r'^version = "([^"]+)"', (ROOT / "Cargo.toml").read_text(), re.M)
    assert version is not None
    assert cargo is not None
    assert version[1] == cargo[1]
    for classifier in ("Operating System :: POSIX :: Linux", "Environment :: GPU :: NVIDIA CUDA"):
        assert f'"{classifier}"' in text

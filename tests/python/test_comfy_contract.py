"""The script that compares with a ComfyUI checkout sees what is missing.

Goal: a network class that a newer ComfyUI brings makes `make comfy-check` fail until it is served.
Method: checkouts of a few lines, with such a class.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

BASE = """
class {name}(BaseModel):
    def __init__(self, config{argument}):
        super().__init__(config{given})
"""


def loaded() -> Any:
    """The script, without its folder on the path: names there stand for parts of ComfyUI too."""
    file = Path(__file__).resolve().parents[1] / "comfy" / "contract.py"
    spec = importlib.util.spec_from_file_location("comfy_contract", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = loaded()


@pytest.mark.parametrize(
    ("argument", "given"),
    [("", ", unet_model=comfy.ldm.new.NewNet"), (", unet_model=comfy.ldm.new.NewNet", "")],
)
def test_a_network_that_is_not_served(tmp_path: Path, argument: str, given: str) -> None:
    folder = tmp_path / "comfy" / "ldm"
    folder.mkdir(parents=True)
    (folder / "new.py").write_text("class NewNet(nn.Module):\n    pass\n")
    text = BASE.format(name="New", argument=argument, given=given)
    (tmp_path / "comfy" / "model_base.py").write_text(text)
    problems = contract.check_networks(tmp_path)
    assert "containers: NewNet of comfy/model_base.py is not in the table" in problems
    assert not any(problem.startswith("specs:") for problem in problems)


def test_a_table_entry_that_no_network_was_tried_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "UNTRIED", {})
    fake = Path(__file__).parent / "comfy_fake"
    monkeypatch.setattr(contract, "networks", lambda _: set())
    assert "specs: no tiny MiniMaxMusic3DiT" in contract.check_networks(fake)

"""The parts of the check, each as a table of what was checked and whether it held."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs import SPECS

if TYPE_CHECKING:
    from check import Check

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PARTS = ("contract", "networks", "models", "scenarios", "browser")
#: Columns that tell something, rather than whether it held.
TOLD = {"left out"}


def tiny_models(
    comfyui: Path, python: str, work: Path, more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Writes the tiny models, and ``more``, where they are not there or were made otherwise."""
    models = work / "models"
    sources = [HERE / name for name in ("specs.py", "models.py")]
    words = " ".join(more).encode()
    made_of = hashlib.sha256(b"".join([*(s.read_bytes() for s in sources), words])).hexdigest()
    mark = models / "made_of"
    if not mark.exists() or mark.read_text() != made_of:
        names = [*SPECS, *more]
        command = [python, str(HERE / "models.py"), str(comfyui), str(models), *names]
        subprocess.run(command, check=True)
        mark.write_text(made_of)
    return dict(json.loads((models / "manifest.json").read_text()))


def contract(comfyui: Path, python: str) -> dict[str, str]:
    """What the nodes rely on is there, and the tests of the fake hold with the real code."""
    test = ROOT / "tests" / "python" / "test_comfy_real.py"
    environment = os.environ | {
        "COMFYUI_DIR": str(comfyui),
        "COMFYUI_PYTHON": python,
        "FAIL_WITHOUT_COMFY": "1",
    }
    command = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--color=no", str(test)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    found = re.findall(r"::test_(\w+) (PASSED|FAILED|ERROR|SKIPPED)", done.stdout)
    results = {n.replace("_", " "): "yes" if how == "PASSED" else how for n, how in found}
    if done.returncode != 0 or not results:
        results["pytest"] = f"failed: {done.stdout[-3000:]}{done.stderr[-1000:]}"
    print(f"contract: {results}", flush=True)
    return results


def networks(comfyui: Path, python: str, work: Path) -> dict[str, str]:
    """Each network class of comfy/ldm by itself, in a process of ComfyUI's Python."""
    file = work / "networks.json"
    file.unlink(missing_ok=True)
    command = [python, str(HERE / "networks.py"), str(comfyui), str(file)]
    done = subprocess.run(command, check=False)
    if not file.exists():
        return {"networks": f"failed: the process ended with {done.returncode}"}
    return dict(json.loads(file.read_text()))


def scenarios(check: Check, names: str | None) -> dict[str, str]:
    """All that users do to one running server, one after the other."""
    from scenarios import run_scenarios

    chosen = names.split(",") if names else None
    with check.start() as server:
        return run_scenarios(server, check.entries, chosen)


def browser(comfyui: Path, python: str, work: Path) -> dict[str, str]:
    """The front end, where there is a browser to look with."""
    if importlib.util.find_spec("selenium") is None or shutil.which("chromedriver") is None:
        return {"left out": "there is no selenium or no chromedriver"}
    command = [python, str(HERE / "browser.py"), str(comfyui), "--python", python]
    done = subprocess.run(
        [*command, "--work", str(work)], capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr[-2000:], flush=True)
    found = re.findall(r"^BROWSER (.+): (.+)$", done.stdout, re.MULTILINE)
    results = dict(found) or {"browser": f"failed: {done.stderr[-500:]}"}
    if done.returncode != 0 and set(results.values()) == {"yes"}:
        results["browser"] = f"failed: {done.stdout[-500:]}"
    return results

"""Looks at the nodes in a real browser: ``browser.py COMFYUI_DIR --work DIR --picture FILE``.

Needs selenium, chromium and chromedriver. A workflow that was saved with the original in the UI's
format is loaded by the front end and must become the same prompt; then a streamed model is sampled
from the UI, the report's panel has to show it, and a picture of the page is taken. With
``--examples FOLDER`` a picture of each example workflow is written beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

sys.path.insert(0, str(Path(__file__).parent))
from exactness import compared, latent
from server import Server
from workflows import reported, sampled, stream, tail

HERE = Path(__file__).parent
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
EXAMPLE_FILES = [
    *(("diffusion_models", "flux1-dev.safetensors"), ("vae", "ae.safetensors")),
    *(("text_encoders", n) for n in ("clip_l.safetensors", "t5xxl_fp16.safetensors")),
]
READY = "return !!(window.comfyAPI?.app?.app?.graph && document.querySelector('canvas'))"
PROMPT = """
const done = arguments[1];
const app = window.comfyAPI.app.app;
(async () => {
  await app.loadGraphData(JSON.parse(arguments[0]));
  return (await app.graphToPrompt()).output;
})().then((out) => done(JSON.stringify(out)), (error) => done("failed: " + error));
"""
QUEUE = """
const done = arguments[1];
const app = window.comfyAPI.app.app;
(async () => {
  await app.loadApiJson(JSON.parse(arguments[0]), "check");
  app.graph.arrange();
  await app.queuePrompt(0);
})().then(() => done("queued"), (error) => done("failed: " + error));
"""
PANEL = """
const panel = document.querySelector(".dgls");
if (!panel) return null;
return { text: panel.innerText, bars: panel.querySelectorAll("rect").length,
  canvases: panel.querySelectorAll("canvas").length };
"""
SHOW = """
const app = window.comfyAPI.app.app;
const node = app.graph._nodes.find((n) => n.comfyClass === "DGLSReport");
const canvas = app.canvas;
canvas.ds.scale = arguments[0];
const [x, y] = node ? node.pos : [0, 0];
canvas.ds.offset = [-x + arguments[1], -y + arguments[2]];
canvas.setDirty(true, true);
"""
FIT = """
const app = window.comfyAPI.app.app;
const nodes = app.graph._nodes;
const left = Math.min(...nodes.map((n) => n.pos[0]));
const top = Math.min(...nodes.map((n) => n.pos[1]));
const right = Math.max(...nodes.map((n) => n.pos[0] + n.size[0]));
const bottom = Math.max(...nodes.map((n) => n.pos[1] + n.size[1]));
const scale = Math.min(window.innerWidth / (right - left + 220),
  window.innerHeight / (bottom - top + 320));
app.canvas.ds.scale = scale;
app.canvas.ds.offset = [-left + 110, -top + 180];
app.canvas.setDirty(true, true);
"""


def browser() -> Any:
    options = webdriver.ChromeOptions()
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
        *("--window-size=1500,950", "--force-device-scale-factor=1", "--use-gl=swiftshader"),
    ):
        options.add_argument(argument)
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
    driver.set_script_timeout(120)
    return driver


def wait_for(what: Any, patience: float = 240) -> Any:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.5)
    raise TimeoutError("the browser did not get there")


def check_saved(driver: Any, server: Any, entry: dict[str, Any]) -> str:
    """The original's saved workflow, through the front end: inputs, and the picture."""
    text = (HERE / "saved" / "original_ui.json").read_text()
    made = driver.execute_async_script(PROMPT, text.replace("MODEL.safetensors", entry["file"]))
    assert not made.startswith("failed"), made
    prompt = json.loads(made)
    old = json.loads((HERE / "saved" / "original_api.json").read_text())
    for node in ("1", "2"):
        inputs = prompt[node]["inputs"]
        missing = {k for k in old[node]["inputs"] if k not in inputs}
        assert not missing, f"lost inputs: {missing}"
    assert prompt["2"]["inputs"]["gpu_layer_indices"] == "0,1"
    assert prompt["2"]["inputs"]["vram"] == "auto"
    plain = latent(server, sampled(entry))
    return compared(plain, latent(server, prompt | tail(entry, ["2", 0])))


def check_panel(driver: Any, entry: dict[str, Any]) -> str:
    vram = int(entry["numbers"] * 4 * 0.5)
    workflow = reported(sampled(entry, stream(vram), steps=4))
    made = driver.execute_async_script(QUEUE, json.dumps(workflow))
    assert made == "queued", made
    found = wait_for(lambda: (p := driver.execute_script(PANEL)) and "Residency" in p["text"] and p)
    assert found["bars"] > 20, found
    assert found["canvases"] == 0, found
    assert "streamed in each pass" in found["text"], found
    return "yes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--examples", type=Path)
    options = parser.parse_args()
    entries = json.loads((options.work / "models" / "manifest.json").read_text())
    models, present = options.work / "models", []
    for folder, name in EXAMPLE_FILES if options.examples else ():
        file = models / folder / name  # else the pictures show that they are missing
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            present.append(file)
    packs = {"dgls_test_pack": HERE / "pack", "dgls": HERE.parents[1]}
    comfyui, work = options.comfyui.resolve(), options.work.resolve()
    with Server(work, packs, comfyui=comfyui, python=options.python) as server:
        driver = browser()
        try:
            server.post("/settings", SETTINGS)
            driver.get(server.url)
            wait_for(lambda: driver.execute_script(READY))
            time.sleep(3)
            if options.examples:
                for file in sorted(options.examples.glob("*.json")):
                    driver.execute_async_script(PROMPT, file.read_text())
                    driver.execute_script(FIT)
                    time.sleep(2)
                    driver.save_screenshot(str(file.with_suffix(".png")))
            results = {
                "saved workflow": check_saved(driver, server, entries["wan21_t2v"]),
                "panel": check_panel(driver, entries["sd15"]),
            }
            if options.picture:
                driver.execute_script(SHOW, 1.15, 420, 130)
                time.sleep(2)
                driver.save_screenshot(str(options.picture))
            errors = [e["message"] for e in driver.get_log("browser") if "dgls" in e["message"]]
        finally:
            driver.quit()
            for file in present:
                file.unlink()
    print(*(f"BROWSER {what}: {found}" for what, found in results.items()), *errors, sep="\n")
    return 1 if errors or set(results.values()) != {"yes"} else 0


if __name__ == "__main__":
    sys.exit(main())

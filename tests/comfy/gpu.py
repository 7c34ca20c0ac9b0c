"""The check on a machine with an NVIDIA GPU: ``gpu.py COMFYUI_DIR --work DIR [--report FILE.md]``.

A few tiny models, in servers with ComfyUI's dynamic VRAM and without: streamed at 25, 50 and 75 %
of their weights and with LoRAs, each compared bit for bit with servers that never had the pack;
then what users do to a running server, and weights of a larger model that go encoded; then flags
that keep models on the GPU. Guidance is off, as
ComfyUI decides by free memory whether it batches both halves. Parts may run one after the other
with ``--only``: the page holds what ``gpu.json`` in the folder ``--work`` has.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import check as cpu
from markdown import as_markdown, said, state_of_the_code
from others import Others
from scenarios import run_scenarios
from specs import WIDE
from steps import TOLD
from ways import Way
from workflows import reported, sampled

MODELS = ["flux", "flux_fp8", "wan21_t2v", "wan21_t2v_fp8", "sd15", "qwen_image"]
STATIC = ("--disable-dynamic-vram",)
WAYS = [
    Way("GPU, dynamic VRAM", number_bytes=2, is_full=True),
    Way("GPU, no dynamic VRAM", STATIC, number_bytes=2, is_full=True),
]
STORIES = [
    *("interrupt", "free", "high_and_low", "one_file_twice", "lora_strength", "fits"),
    *("original_nodes", "cleanup", "weight_hooks", "gguf", "multigpu", "encoded"),
]
KEPT = ("--gpu-only", "--highvram")


def kept_on_the_gpu(check: cpu.Check) -> dict[str, str]:
    """Flags under which ComfyUI keeps models on the GPU: left to it, and the report says so."""
    found = {}
    for flag in KEPT:
        with check.start(flag) as server:
            stories = Others(server, check.entries, 2)
            workflow = reported(sampled(stories.wan, stories.half))
            try:
                stories.passed(workflow, stories.plain, "keep models on the GPU")
                found[flag] = "yes"
            except (AssertionError, RuntimeError) as error:
                found[flag] = f"failed: {error}"[:500]
    return found


def main() -> int:
    options, began, commit = cpu.parsed(), time.monotonic(), state_of_the_code()
    options.models, options.jobs = options.models or ",".join(MODELS), 1
    check = cpu.Check(options, tuple(WIDE))
    check.device, check.rounds = "cuda", 1
    if importlib.util.find_spec("comfyui_frontend_package") is None:  # it takes much to carry
        front = check.work / "front"
        front.mkdir(parents=True, exist_ok=True)
        (front / "index.html").touch()
        check.always = ("--front-end-root", str(front))
    for entry in check.entries.values():
        entry["sampler"]["cfg"] = 1.0
    parts = options.only.split(",") if options.only else ["models", "scenarios", "flags"]
    if "models" in parts:
        check.models(WAYS)
    if "scenarios" in parts:
        chosen = options.stories.split(",") if options.stories else STORIES
        for title, arguments in (("dynamic VRAM", ()), ("no dynamic VRAM", STATIC)):
            with check.start(*arguments) as server:
                names = chosen if not arguments else chosen[:2]
                found = run_scenarios(server, check.entries, names, number_bytes=2)
            check.results[f"scenarios, {title}"] = found
    if "flags" in parts:
        check.results["flags"] = kept_on_the_gpu(check)
    kept = check.work / "gpu.json"
    before = json.loads(kept.read_text()) if kept.exists() else {"minutes": 0.0, "results": {}}
    check.results = before["results"] | check.results
    minutes = before["minutes"] + (time.monotonic() - began) / 60
    kept.write_text(json.dumps({"minutes": minutes, "results": check.results}, indent=1))
    wrong = {
        f"{where}: {what}": value
        for where, found in check.results.items()
        for what, value in found.items()
        if value != "yes" and what not in TOLD
    }
    checks = sum(len(found) for found in check.results.values())
    print(f"{checks} checks, {len(wrong)} wrong, {minutes:.0f} minutes", *wrong.items(), sep="\n")
    if options.report:
        gpu = said(options.python, "-c", "import torch; print(torch.cuda.get_device_name())")
        page = as_markdown(
            check.results, check.comfyui, options.python, commit, minutes, gpu.strip()
        )
        options.report.write_text(page)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

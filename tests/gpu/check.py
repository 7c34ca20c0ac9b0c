"""What only a GPU can show: run with ``make gpu-check``, writes docs/gpu-check.md.

Each check prints one line, OK or FAILED with what was seen; the exit status is 1 if one failed.
``--quick`` leaves out what is slow, for a run under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import gpu_encoded  # noqa: F401 - registers its checks
import gpu_memory  # noqa: F401
import gpu_streams  # noqa: F401
import torch
from gpu_base import CHECKS

import dgls_torch


def main() -> int:
    """Runs the checks, prints a line for each, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="for compute-sanitizer")
    parser.add_argument("--only", default="", help="checks whose names contain this")
    parser.add_argument("--out", default="docs/gpu-check.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device and torch sees none", file=sys.stderr)
        return 2
    slow = {"compiled", "out_of_memory", "out_of_memory_in_a_pass", "mutant_ready", "mutant_done"}
    lines, failed = [], 0
    for title, function in sorted(CHECKS):
        name = function.__name__
        if options.only not in name or (options.quick and name in slow):
            continue
        begun = time.monotonic()
        try:
            state, text = "OK", function()
        except Exception as error:
            traceback.print_exc()
            state, text, failed = "FAILED", f"{type(error).__name__}: {error}", failed + 1
        took = time.monotonic() - begun
        print(f"{state:6} {title}: {text} ({took:.1f} s)", flush=True)
        lines.append(f"| {title} | {state} | {text} |")
    facts = {
        "GPU": torch.cuda.get_device_name(0),
        "driver": torch.ops.dgls.driver_version(),
        "torch": torch.__version__,
        "Python": sys.version.split()[0],
        "dgls_torch": dgls_torch.__version__,
    }
    head = ", ".join(f"{name} {value}" for name, value in facts.items())
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(
        f"# GPU checks\n\n{head}\n\n| check | result | seen |\n|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )
    print(json.dumps(facts))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

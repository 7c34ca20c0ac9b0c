"""The promises of docs/reliability.md.

Goal: each promise names a test that exists; streaming writes nothing, so a full disk cannot hurt.
Method: the document is read; a process that may not write a single byte to a file streams a model.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from processes import Processes

NAMED = re.compile(r"`((?:tests|src)/[\w/]+\.(?:py|rs))::(\w+)`")


def test_each_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    tables = text.split("## All at once")[0]
    rows = [line for line in tables.splitlines() if line.startswith("| ") and "|---" not in line]
    promises = [row for row in rows if not row.startswith("| what happens")]
    assert len(promises) > 20
    for row in promises:
        assert NAMED.search(row), f"no test: {row}"
        assert row.count("|") == 5, row
    missing = []
    for file, name in NAMED.findall(text):
        source = (ROOT / file).read_text()
        rust = rf"^ *#\[test\]\n(?: *#\[.*\n)* *fn {name}\("
        opens = rf"^def {name}\(" if file.endswith(".py") else rust
        if not re.search(opens, source, re.MULTILINE):
            missing.append(f"{file}::{name}")
    assert not missing


def test_nothing_is_written(processes: Processes, tmp_path: Path) -> None:
    done = processes.run(f"""
import os, resource, signal, sys, torch, dgls_torch
from helpers import SMALL, budgets, inputs, net, same
from safetensors.torch import save_file
path = {str(tmp_path)!r} + "/net.safetensors"
model = net()
save_file(model.state_dict(), path)
with torch.inference_mode():
    expected = model(inputs())
opened = []
def audit(event, arguments):
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        opened.append(arguments)
sys.addaudithook(audit)
# From here on the system ends whoever makes a file longer.
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
for source in ("tensors", path):
    for size in budgets(net(), source=source)[::2]:
        with dgls_torch.stream(model, size, source=source, **SMALL) as s:
            for _ in range(4):
                with torch.inference_mode():
                    assert same(model(inputs()), expected)
            s.replan()
            str(s.report())
assert not opened, opened
os._exit(7)
""")
    assert (done.code, done.err) == (7, "")

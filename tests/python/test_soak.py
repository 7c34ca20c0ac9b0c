"""The soak, for some seconds.

Goal: `make soak` runs, meets faults of many kinds on both devices, and ends with nothing left.
Method: `soak.py` in a process of its own, as the command runs it; what it does is said there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = Path(__file__).parent


def soak(
    arguments: Sequence[str], fake_driver: Path, script: str = "", before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("DGLS_")}
    environment |= {"FAKE": str(fake_driver), "PYTHONPATH": str(FOLDER)}
    what = ["-c", script] if script else [str(FOLDER / "soak.py")]
    command = [*before, sys.executable, *what, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_soak_of_some_seconds(fake_driver: Path) -> None:
    done = soak(["--seconds", "12", "--faults", "150"], fake_driver)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-3000:]
    for part in ("wrong results 0", "0 arenas, 0 threads, 0 files, 0 page-locks"):
        assert part in done.stdout
    faults = int(re.findall(r"; (\d+) faults", done.stdout)[0])
    kinds = re.findall(r"(\D[^,:;]*) \d+[,;]", done.stdout.split("errors told:")[1])
    assert faults >= 150
    assert int(re.findall(r"(\d+) decoded", done.stdout)[0]) > 0
    assert len(kinds) >= 9, kinds


def test_a_wrong_result_would_be_seen(fake_driver: Path) -> None:
    """With `verify` taken out of it and a byte of some copies changed, it fails and says where."""
    spoilt = (FOLDER / "soak.py").read_text().replace('"verify": True', '"verify": False')
    done = soak(["--seconds", "60"], fake_driver, spoilt)
    assert done.returncode == 1
    assert re.search(r"soak: seed \d+ failed", done.stderr)
    assert "AssertionError: a wrong result" in done.stderr


def test_a_soak_that_a_script_started_in_the_background(fake_driver: Path) -> None:
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    done = soak(["--seconds", "2"], fake_driver, before=ignoring)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-3000:]

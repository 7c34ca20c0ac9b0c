"""Starts and ends the processes of a run."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import IO


def start(python: str, words: list[str], log: IO[str]) -> subprocess.Popen[str]:
    """Starts ``python -m bench`` with ``words``; it prints to ``log`` and waits for its input."""
    return subprocess.Popen(
        [python, "-m", "bench", *words],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=Path(__file__).resolve().parents[1],
        # A profiler that stays attached makes each later call of the driver twice as slow.
        env=os.environ | {"PYTHONUNBUFFERED": "1", "TEARDOWN_CUPTI": "1"},
        text=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    """Kills it if it still runs; blocks until it has ended."""
    process.kill()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    process.wait()

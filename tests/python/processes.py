"""Runs scripts in processes of their own that begin with torch imported already.

Goal: what happens once per process (driver probing, limits, interpreter exit) is tested in a
fraction of a second, not in the seconds that an import of torch takes.
Method: a server process that imports and then forks for each script, before it has made a thread.
The script runs as ``__main__`` and ends the way a script ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SERVER = """
import ctypes, json, os, signal, sys, tempfile, time
import torch
torch.set_num_threads(1)
import dgls_torch, helpers

def serve():
    for line in sys.stdin:
        request = json.loads(line)
        files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
        child = os.fork()
        if child == 0:
            for number, file in enumerate(files, 1):
                os.dup2(file.fileno(), number)
                file.close()
            sys.stdin = open(os.devnull)
            os.dup2(sys.stdin.fileno(), 0)
            os.environ.update(request["environment"])
            return request["script"]
        left = request["seconds"] * 100
        while left and not (found := os.waitpid(child, os.WNOHANG))[0]:
            time.sleep(0.01)
            left -= 1
        if not left:
            os.kill(child, signal.SIGKILL)
            found = os.waitpid(child, 0)
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        code = os.waitstatus_to_exitcode(found[1])
        print(json.dumps([code if left else 124, *texts]), flush=True)

_script = serve()
if _script is not None:
    exec(compile(_script, "<script>", "exec"))
"""


@dataclass(frozen=True)
class Done:
    """How a script ended; ``code`` is 124 after a time limit, negative after a signal."""

    code: int
    out: str
    err: str


class Processes:
    """The server; one for a session of tests."""

    def __init__(self) -> None:
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *, seconds: int = 60, **environment: str) -> Done:
        """Runs a script with changes of the environment."""
        request = {"script": script, "environment": environment, "seconds": seconds}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, "the server of test processes ended; its last words are above"
        return Done(*json.loads(answer))

    def close(self) -> None:
        """Ends the server."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._server.communicate(timeout=10)
        self._server.kill()
        self._server.wait()

"""The reference's process: the resident run of a bed, which answers while engines are measured.

Between its turns it holds the weights and the memory of the link's probe, and nothing more.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bench import measure
from bench.cells import Point
from bench.engines import ENGINES, Engine
from bench.worker import Job, Worker, start_job

if TYPE_CHECKING:
    from bench.measure import Timing

_COPIES = 4
_SHORT_PASS_S = 0.1
"""Below it a second pass goes before the timed ones: one more request for memory would show."""


class Reference(Worker):
    """A resident stack on the device."""

    def __init__(self, job: Job, engine: Engine, out: IO[str]) -> None:
        """Loads the weights and takes a turn at each point, so that later ones leave nothing."""
        super().__init__(job, engine, out)
        self._attached, self._stack, _ = self.attach(0)
        on_cuda = job.device.type == "cuda"
        self._probe = measure.LinkProbe(job.device) if on_cuda else None
        for point in job.points:
            self.turn(point, 1, 1)

    def turn(self, point: Point, lead: int, passes: int) -> dict[str, Any]:
        """The link's rate and seconds of passes; blocks until it is done.

        The worker that asks keeps up the bed's load meanwhile. ``lead`` passes, at least one, go
        before the timed ones.
        """
        rate = self._rate()
        timing = self._time(point, lead, passes)
        row = {"link_bytes_per_s": rate, "passes_s": timing.passes}
        self.empty_cache()
        return row

    def _rate(self) -> float:
        if self._probe is None:
            return measure.link_rate(self.job.device, self.job.link_bytes_per_s)
        self._probe.rate(1)
        return self._probe.rate(_COPIES)

    def _time(self, point: Point, lead: int, passes: int) -> Timing:
        """Passes after some that are not timed: the first asks for the memory given back."""
        self._stack.pace(point.pace_s)
        x, c = self.job.bed.workload.inputs(point.tokens, self.job.device)
        step = self._attached.step
        is_short = measure.timed(step, x, c, 1).median_s < _SHORT_PASS_S
        first = max(lead - 1, 1 if is_short else 0)
        timing = measure.timed(step, x, c, first + passes)
        return measure.Timing(timing.passes[first:], timing.enqueue_s, timing.host_cpu_s)

    def answer(self, line: str) -> dict[str, Any]:
        """A turn, or ``failed`` with the reason; either way the memory is given back.

        Nothing is the answer to nothing: it tells a worker that no turn is under way.
        """
        try:
            question = json.loads(line)
            if not question:
                return {}
            point = Point(**question["point"])
            return self.turn(point, question["lead"], question["passes"])
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        self.empty_cache()
        return {"failed": text}

    def serve(self, address: Path) -> None:
        """Says that it is ready, then answers one worker after the other; never returns."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen()
            self.write({"kind": "ready"})
            while True:
                connection, _ = listener.accept()
                with contextlib.suppress(OSError):  # a worker that was killed
                    self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rw") as lines:
            for line in lines:
                lines.write(json.dumps(self.answer(line)) + "\n")
                lines.flush()


def _end_with_input() -> None:
    """Ends the process when nobody holds its input any more."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)


def main(argv: list[str]) -> int:
    """``reference JOB OUT SOCKET``: waits for a line, loads the job's bed and answers.

    It ends when its input does. What keeps it from getting ready is a line of ``OUT``.
    """
    job_path, out_path, address = map(Path, argv)
    engine = ENGINES["resident"]
    engine.prepare()
    if not sys.stdin.readline():
        return 0  # nobody needed it
    threading.Thread(target=_end_with_input, name="bench-input", daemon=True).start()
    with out_path.open("w") as out:
        try:
            Reference(start_job(job_path), engine, out).serve(address)
        except Exception as error:
            traceback.print_exc()
            reason = f"the reference failed: {type(error).__name__}: {error}".splitlines()[0]
            out.write(json.dumps({"status": "failed", "reason": reason[:300]}) + "\n")
            return 1
    return 0

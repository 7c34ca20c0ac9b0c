"""The worker's side of the reference: it is asked for a turn whenever the engine rests.

A GPU's clock drifts with its heat, the link has slow passes and the host's speed changes from one
second to the next. So the limit of a cell is taken from turns between the rounds of its passes.
One line of JSON is a question, one the answer, over a Unix socket.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import statistics
from typing import TYPE_CHECKING, Any

from bench import measure

if TYPE_CHECKING:
    import torch

    from bench.cells import Point
    from bench.measure import Effort

_PATIENCE_S = 15.0
"""A turn may take this and ten times what its passes took before."""
_TIMES = 10.0


class Beside:
    """A connection to the reference; it is lost once and for all."""

    def __init__(self, given: dict[str, Any] | None, device: torch.device) -> None:
        """Connects; blocks until the reference is at rest, which it is not after a worker's end.

        Args:
            given: ``address`` and ``pid`` of a reference that has settled, or ``failed`` with the
                reason why there is none; ``None`` where none is wanted.
            device: What both use.
        """
        self.is_wanted, self._device = given is not None, device
        self.failed: str | None = (given or {}).get("failed")
        self._pid = (given or {}).get("pid")
        self._left_bytes: int | None = 0
        self._socket: socket.socket | None = None
        self._lines: Any = None
        if given is None or self.failed is not None:
            return
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(_PATIENCE_S)
            self._socket.connect(given["address"])
            self._lines = self._socket.makefile("rw")
            self._exchange({})
        except OSError as error:
            self._lose(error)

    @property
    def is_on(self) -> bool:
        """Whether it can be asked."""
        return self._lines is not None

    def ask(self, question: dict[str, Any], patience_s: float) -> dict[str, Any]:
        """Blocks until the reference has had its turn, at most ``patience_s``.

        Raises:
            ValueError: It answers that it failed, and why. It may be asked again.
            OSError: It died or gave no answer in time; then it is killed, so that nothing uses the
                device beside the engine, and `is_on` turns false.
        """
        before = measure.used_bytes(self._device)
        try:
            assert self._socket is not None
            self._socket.settimeout(patience_s)
            answer = self._exchange(question)
        except OSError as error:
            self._lose(error)
            raise
        after = measure.used_bytes(self._device)
        if before is not None and after is not None and self._left_bytes is not None:
            self._left_bytes += after - before
        if "failed" in answer:
            raise ValueError(answer["failed"])
        return answer

    def _exchange(self, question: dict[str, Any]) -> dict[str, Any]:
        self._lines.write(json.dumps(question) + "\n")
        self._lines.flush()
        line = self._lines.readline()
        if not line:
            raise ConnectionResetError("it ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _lose(self, error: OSError) -> None:
        self.failed = f"the reference was lost: {type(error).__name__}: {error}"[:200]
        self._left_bytes = None
        self.close()
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Lets go of the reference; it waits for the next worker."""
        lines, self._lines = self._lines, None
        if lines is not None:
            with contextlib.suppress(OSError):
                lines.close()
        if self._socket is not None:
            self._socket.close()

    def base_bytes(self, base_bytes: int | None) -> int | None:
        """Memory in use without the engine, of which ``base_bytes`` were there at the start.

        With what turns left on the device, such as kernels that were first needed then. ``None``
        where the reference was lost: nobody knows when its memory was free.
        """
        if base_bytes is None or self._left_bytes is None:
            return None
        return base_bytes + self._left_bytes


class Turns:
    """The reference's turns in one cell."""

    def __init__(
        self,
        beside: Beside,
        point: Point,
        effort: Effort,
        compute_s: float,
    ) -> None:
        """Asks nothing yet.

        Args:
            beside: The connection.
            point: What the cell computes.
            effort: How many passes a turn has, timed and before those.
            compute_s: What one took before, 0 where not known.
        """
        self._beside = beside
        lead, passes = effort.passes_of_lead(compute_s), effort.beside
        self._question = {"point": dataclasses.asdict(point), "lead": lead, "passes": passes}
        self._patience_s = _PATIENCE_S + _TIMES * (lead + passes + 1) * compute_s
        self._failed = beside.failed
        self._rounds: list[dict[str, Any]] = []

    @property
    def are_on(self) -> bool:
        """Whether there are any to take."""
        return self._beside.is_on and self._failed is None

    def take(self) -> None:
        """Blocks while the reference has its turn; after one that failed it does nothing."""
        if not self.are_on:
            return
        try:
            self._rounds.append(self._beside.ask(self._question, self._patience_s))
        except (OSError, ValueError) as error:
            self._failed = self._beside.failed or str(error)

    def row(self) -> dict[str, Any]:
        """The limit that was found, or why there is none, as a part of the cell's row."""
        if not self._beside.is_wanted:
            return {}
        if self._failed is not None:
            return {"beside_failed": self._failed}
        passes = [seconds for turn in self._rounds for seconds in turn["passes_s"]]
        rates = [turn["link_bytes_per_s"] for turn in self._rounds]
        return {
            "beside_limit": {
                "compute_s": statistics.median(passes),
                "link_bytes_per_s": statistics.median(rates),
                "rounds": self._rounds,
            }
        }

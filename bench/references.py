"""The run's side of references: at most one is at work, and one more may be getting ready.

A reference is the resident run of a bed in a process of its own. It stays while the engines of the
bed are measured and takes turns with them, so that a cell's limit is measured beside it.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from bench import processes

if TYPE_CHECKING:
    from pathlib import Path

_READY_S = 90.0
"""How long the weights may take to the device, with a pass at each point."""
_POLL_S = 0.02


class Reference:
    """A process that has been started and waits."""

    def __init__(self, bed: str, python: str, scratch: Path, number: int, log: Path) -> None:
        """Starts it; it imports torch and then waits for `settle`."""
        self.bed = bed
        self._job, self._out = scratch / f"ref{number}.json", scratch / f"ref{number}.jsonl"
        self._address = scratch / f"ref{number}.socket"
        self._log = log.open("a")
        words = ["reference", str(self._job), str(self._out), str(self._address)]
        self._process = processes.start(python, words, self._log)

    def settle(self, job: dict[str, Any], deadline: float) -> str | None:
        """Has it load the weights; blocks until its memory is as it stays, or says why not."""
        self._job.write_text(json.dumps(job))
        assert self._process.stdin is not None
        try:
            # Its input stays open: it ends when that does, whatever becomes of this process.
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self.death() or "the reference took no job"
        until = min(time.time() + _READY_S, deadline)
        while time.time() < until:
            text = self._out.read_text() if self._out.exists() else ""
            if text.endswith("\n"):
                said: str | None = json.loads(text.splitlines()[-1]).get("reason")
                return said
            if (reason := self.death()) is not None:
                return reason
            time.sleep(_POLL_S)
        return "the reference was not ready in time"

    def death(self) -> str | None:
        """Says how it ended, or None while it runs."""
        code = self._process.poll()
        return None if code is None else f"the reference ended with status {code}"

    def given(self) -> dict[str, Any]:
        """What a worker needs to reach it."""
        return {"address": str(self._address), "pid": self._process.pid}

    def end(self) -> None:
        """Kills it if it still runs; blocks until it has ended."""
        processes.end(self._process)
        self._log.close()


class References:
    """Keeps the reference of the bed that is being measured."""

    def __init__(self, python: str, scratch: Path, log: Path) -> None:
        """Starts nothing; sockets go to ``scratch``."""
        self._python, self._scratch, self._log = python, scratch, log
        self._number = 0
        self._now: Reference | None = None
        self._ahead: Reference | None = None
        self._failed: dict[str, str] = {}

    def prepare(self, bed: str) -> None:
        """Starts the process of a bed that is about to be measured."""
        if bed in self._failed or any(r and r.bed == bed for r in (self._now, self._ahead)):
            return
        if self._ahead is not None:
            self._ahead.end()
        self._ahead = self._start(bed)

    def _start(self, bed: str) -> Reference:
        self._number += 1
        return Reference(bed, self._python, self._scratch, self._number, self._log)

    def of(self, bed: str, job: dict[str, Any], deadline: float) -> dict[str, Any]:
        """How a worker reaches the reference of a bed, or why there is none.

        Blocks until it has settled, at most until ``deadline``, seconds since the epoch. One that
        failed is not started again.
        """
        if self._now is not None and self._now.bed != bed:
            self.rest()
        if self._now is None and bed not in self._failed:
            self._settle(bed, job, deadline)
        if self._now is not None and (reason := self._now.death()) is not None:
            self._give_up(bed, reason)
        if self._now is None:
            return {"failed": self._failed[bed]}
        return self._now.given()

    def _settle(self, bed: str, job: dict[str, Any], deadline: float) -> None:
        begun = time.time()
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.bed != bed:
            ahead.end()
            ahead = None
        self._now = ahead or self._start(bed)
        reason = self._now.settle(job, deadline)
        if reason is not None:
            self._give_up(bed, reason)
        spent = time.time() - begun
        print(f"{bed:24} {'reference':20} {spent:6.1f} s  {(reason or '')[:140]}", flush=True)

    def _give_up(self, bed: str, reason: str) -> None:
        self._failed[bed] = reason
        self.rest()

    def rest(self) -> None:
        """Ends the one at work: its memory is free afterwards."""
        now, self._now = self._now, None
        if now is not None:
            now.end()

    def end(self) -> None:
        """Ends all."""
        self.rest()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.end()

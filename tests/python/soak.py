"""Runs random models with faults of all kinds for a bounded time: `make soak`.

Goal: whatever fails, a pass returns the resident model's result or raises; afterwards the model is
whole, and no arena, page-lock, thread or file is left.
Method: by seed, models with random budgets, sources, replans, faults and interrupts, on the host
device and on the fake driver (FAKE), with `verify` on; the results are compared bit for bit. Some
models are in bf16 and stream their weights encoded, down to the smallest.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from helpers import Net, Pair, Snapshot, budgets, inputs, net, same, settle, threads, told
from safetensors.torch import save_file
from torch import nn

import dgls_torch
from dgls_torch import encoding
from dgls_torch.pass_hooks import PassHooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KNOBS = {
    "copy refused": "fail_copy_in",
    "record refused": "fail_record_in",
    "wait refused": "fail_wait_in",
    "pin refused": "fail_register_in",
    "chunk refused": "fail_alloc_in",
    "byte flipped": "flip_copy_in",
    "stream refused": "fail_stream_create",
    "launch refused": "fail_launch_in",
}
# More tries than any fault that is set once can spoil.
TRIES = 40


class Driver:
    """The fake driver, or none."""

    def __init__(self, path: str | None) -> None:
        self._library = None if path is None else ctypes.CDLL(path)

    def __bool__(self) -> bool:
        return self._library is not None

    def put(self, key: str, value: int) -> None:
        assert self._library is not None
        assert self._library.fakecuda_set(key.encode(), ctypes.c_int64(value)) == 0, key

    def get(self, key: str) -> int:
        assert self._library is not None
        value = ctypes.c_int64(-1)
        assert self._library.fakecuda_get(key.encode(), ctypes.byref(value)) == 0, key
        return value.value

    def held(self) -> dict[str, int]:
        if self._library is None:
            return {}
        names = ("used", "pinned", "host_ranges", "refs", "streams", "events", "modules")
        return {name: self.get(name) for name in names if self.get(name)}


class Sums:
    """What all models came to."""

    def __init__(self) -> None:
        self.models = self.passes = self.blocks = self.told = 0
        self.moved = self.decoded = self.verified = 0
        self.faults: collections.Counter[str] = collections.Counter()
        self.arenas: list[weakref.ref[torch.Tensor]] = []

    def add(self, report: dgls_torch.Report) -> None:
        self.blocks += report.uses
        self.moved += report.h2d_bytes_total
        self.verified += report.verified_bytes
        self.decoded += report.decoded_bytes_total


class Round:
    """One model from its attach to its detach."""

    def __init__(self, seed: int, sums: Sums, driver: Driver, folder: Path) -> None:
        self.chance, self.sums = random.Random(seed), sums
        self.driver = driver if driver and self.chance.random() < 0.5 else Driver(None)
        os.environ |= {"DGLS_TEST_DRIVER": "auto", "DGLS_TEST_FAULTS": "0"}
        self.dtype = self.chance.choice((torch.float32, torch.float32, torch.bfloat16))
        self.model = self._model(seed)
        self.expected = self._run()
        self.file = folder / "weights.safetensors"
        self.options = self._options()
        buffer = encoding.BUFFER_LEAST if self.driver and "compress" in self.options else 0
        self.sizes = [size + buffer for size in budgets(self.model, **self.options)]
        self.before = Snapshot(self.model)
        self.is_lost = False

    def _model(self, seed: int) -> Net:
        model = net(self.chance.randrange(2, 9), self.chance.choice((8, 32, 48)), seed)
        is_paired = self.dtype == torch.float32 and self.chance.random() < 0.2
        for block in model.blocks if is_paired else ():
            payload, scale = block.up.weight.detach(), torch.rand(1)
            block.up.weight = nn.Parameter(Pair(payload, scale), requires_grad=False)
        return model.to(self.dtype)

    def _run(self, order: list[int] | None = None) -> torch.Tensor:
        with torch.inference_mode():
            x = inputs(self.model.first.in_features).to(self.dtype)
            result: torch.Tensor = self.model(x, order)
            return result

    def _options(self) -> dict[str, Any]:
        pick = self.chance.choice
        options: dict[str, Any] = {
            "device": "cpu",
            "verify": True,
            "min_stream_bytes": pick((0, 0, 500)),
            "poison": pick((True, False)),
            "adapt": pick((True, False)),
            "trace_passes": pick((0, 8)),
            "prefetch": pick((None, None, 0, 2)),
            "pinned": pick((0, 8 * 4096, "1GiB")),
            "staging": pick(("64KiB", "1MiB")),
        }
        if self.dtype == torch.bfloat16:
            # The rate is for the CPU: without a link nothing is encoded.
            options |= {"compress": pick(("auto", "on", "on")), "copy_bytes_per_s": 1e9}
        plain = not any(isinstance(p, Pair) for p in self.model.parameters())
        if plain and self.chance.random() < 0.4:
            save_file(self.model.state_dict(), self.file)
            options["source"] = self.file
        return options

    def run(self) -> None:
        """Attaches, does some things that may fail, and detaches."""
        self.sums.models += 1
        os.environ["DGLS_TEST_DRIVER"] = "cuda" if self.driver else "auto"
        os.environ["DGLS_TEST_FAULTS"] = "8" if self.chance.random() < 0.2 else "0"
        if self.driver:
            self.driver.put("reset", 0)
            self.driver.put("lat_us", self.chance.choice((0, 20)))
        stream = self._attached()
        try:
            acts = [self.plain, self.another_order, self.replan, self.suspend, self.exception]
            acts += [self.interrupt, self.shortage, self.file_changes, self.fork]
            acts += [self.driver_fault] * 6 if self.driver else []
            for _ in range(self.chance.randrange(4, 12)):
                self.chance.choice(acts)(stream)
                if self.is_lost:
                    break
                self.settled()
        finally:
            self._end(stream)

    def _attached(self) -> dgls_torch.Stream:
        """A stream, at the second try where a fault is set at the first."""
        size = self.chance.choice(self.sizes)
        if self.driver and self.chance.random() < 0.3:
            kind = self.chance.choice([*KNOBS])
            self._set(kind)
            with contextlib.suppress(RuntimeError):
                made = dgls_torch.stream(self.model, size, **self.options)
                self._counted(kind)
                return made
            self.sums.told += 1
            self._counted(kind)
            self.driver.put("sticky", 0)  # a spoilt byte loses a device that decodes it
            self.before.check(self.model)
        return dgls_torch.stream(self.model, size, **self.options)

    def _end(self, stream: dgls_torch.Stream) -> None:
        engine = stream._engine
        if engine is not None:
            self.sums.arenas.append(weakref.ref(engine._arena))
        with self._may_be_refused():  # of a device that is lost, though no pass has met it yet
            stream.detach()
        if self.driver:
            self.driver.put("sticky", 0)
        self.sums.add(stream.report())
        self.sums.faults["byte changed"] += stream.report().mismatches
        self.before.check(self.model)
        assert same(self._run(), self.expected)

    def settled(self) -> None:
        """Passes until one comes to its end; each that does is right."""
        text: str | None = ""
        for _ in range(TRIES):
            text = told(self._right)
            if text is None:
                self.sums.passes += 1
                return
            self.sums.told += 1
            assert len(text) > 20, text
            if "the engine stopped after an earlier error" in text:
                self.is_lost = True
                return
        raise AssertionError(f"no pass came to its end: {text}")

    def _right(self) -> None:
        assert same(self._run(), self.expected), "a wrong result"

    def plain(self, _: dgls_torch.Stream) -> None:
        self.settled()

    def another_order(self, _: dgls_torch.Stream) -> None:
        order = self.chance.choices(range(len(self.model.blocks)), k=self.chance.randrange(12))
        for _ in range(TRIES):
            with contextlib.suppress(RuntimeError):
                self._run(order)
                return

    def replan(self, stream: dgls_torch.Stream) -> None:
        with self._may_be_refused():
            stream.replan(self.chance.choice(self.sizes))

    def suspend(self, stream: dgls_torch.Stream) -> None:
        with self._may_be_refused():
            stream.suspend()
        assert same(self._run(), self.expected)
        with self._may_be_refused():
            stream.resume()

    def exception(self, _: dgls_torch.Stream) -> None:
        kind = self.chance.choice((ValueError, KeyboardInterrupt, SystemExit, GeneratorExit))
        self.sums.faults["exception in a block"] += 1
        self._raises(kind)

    def shortage(self, stream: dgls_torch.Stream) -> None:
        self.sums.faults["out of memory in a block"] += 1
        self._raises(torch.OutOfMemoryError)

    def _raises(self, kind: type[BaseException]) -> None:
        def stop(*_: object) -> None:
            raise kind

        hook = self.chance.choice(self.model.blocks).up.register_forward_hook(stop)
        try:
            with contextlib.suppress(kind, RuntimeError):
                self._run()
        finally:
            hook.remove()

    def interrupt(self, stream: dgls_torch.Stream) -> None:
        """SIGINT, some time soon, while the stream is used and changed."""
        self.sums.faults["SIGINT"] += 1
        delay = self.chance.expovariate(1 / 0.002)
        timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while True:
                with contextlib.suppress(RuntimeError):
                    self._right()
                    stream.replan(self.chance.choice(self.sizes))
        except KeyboardInterrupt:
            pass
        finally:
            with contextlib.suppress(KeyboardInterrupt):  # none comes later, whatever ended this
                timer.cancel()
                timer.join()

    def file_changes(self, _: dgls_torch.Stream) -> None:
        if "source" not in self.options:
            return
        status, contents = self.file.stat(), self.file.read_bytes()
        if self.chance.random() < 0.5:
            self.sums.faults["file truncated"] += 1
            os.truncate(self.file, len(contents) // 2)
        else:
            self.sums.faults["file rewritten"] += 1
            self.file.write_bytes(bytes(len(contents)))
        os.utime(self.file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        for _ in range(2):
            text = told(self._right)
            if text is not None:
                self.sums.told += 1
                assert "changed while in use" in text or "earlier error" in text, text
        self.file.write_bytes(contents)
        os.utime(self.file, ns=(status.st_atime_ns, status.st_mtime_ns))

    def fork(self, _: dgls_torch.Stream) -> None:
        if self.chance.random() < 0.7:
            return
        self.sums.faults["fork"] += 1
        with warnings.catch_warnings():
            # Python 3.12 warns of forks in processes with threads: that is what this is about.
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                self._run()
            except RuntimeError as error:
                os._exit(0 if "fork" in str(error) else 1)
            os._exit(2)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0, f"the fork ended with {code}"

    def driver_fault(self, _: dgls_torch.Stream) -> None:
        if self.chance.random() < 0.03:
            self.sums.faults["device lost"] += 1
            self.driver.put("sticky", 719)
            self.settled()
            return
        kind = self.chance.choice([kind for kind in KNOBS if kind != "stream refused"])
        self._set(kind)
        self.settled()
        self._counted(kind)

    def _set(self, kind: str) -> None:
        self.driver.put("fail_code", self.chance.choice((1, 2)))
        self.driver.put(KNOBS[kind], self.chance.randrange(1, 12))

    def _counted(self, kind: str) -> None:
        fired = self.driver.get(KNOBS[kind]) == 0
        if kind != "byte flipped":  # counted where it is found
            self.sums.faults[kind] += fired
        self.driver.put(KNOBS[kind], 0)

    @contextlib.contextmanager
    def _may_be_refused(self) -> Iterator[None]:
        """What a fault that is still to come may refuse."""
        try:
            yield
        except RuntimeError:
            self.sums.told += 1
            if PassHooks.of(self.model) is None:
                self.is_lost = True


def soak(seconds: float, faults: int, first: int, driver: Driver) -> tuple[Sums, str]:
    """Runs until the time is over and so many faults were met; returns what there is to say."""
    sums, seed, end = Sums(), first, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        Round(first, Sums(), driver, Path(name)).run()  # what is made once
        settle()
        files = len(os.listdir("/proc/self/fd"))
        while time.monotonic() < end or sums.faults.total() < faults:
            _named(seed, Round(seed, sums, driver, Path(name)).run)
            seed += 1
        settle()
        left = {
            "arenas": sum(arena() is not None for arena in sums.arenas),
            "threads": len(threads()),
            "files": len(os.listdir("/proc/self/fd")) - files,
            "page-locks and objects of the driver": sum(driver.held().values()),
        }
    kinds = ", ".join(f"{kind} {count}" for kind, count in sums.faults.most_common() if count)
    text = (
        f"soak: seeds {first}..{seed}, {sums.models} models, {sums.passes} passes, {sums.blocks} "
        f"blocks streamed, {sums.moved} bytes copied, {sums.decoded} decoded, {sums.verified} "
        "verified; "
        f"{sums.faults.total()} faults, {sums.told} errors told: {kinds}; wrong results 0; left: "
        + ", ".join(f"{count} {what}" for what, count in left.items())
    )
    assert not any(left.values()), text
    return sums, text


def _named(seed: int, call: Callable[[], None]) -> None:
    try:
        call()
    except BaseException:
        print(f"soak: seed {seed} failed", file=sys.stderr)
        raise


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--faults", type=int, default=0, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    encoding.LEAST_BYTES = 2048  # a tile
    # A shell that starts it in the background has it ignore SIGINT, which it sends to itself.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.set_threshold(200)  # finalizers run at random moments as well
    if fake := os.environ.get("FAKE"):
        os.environ["DGLS_ALLOW_FAKE"] = "1"
    print(soak(parsed.seconds, parsed.faults, parsed.seed, Driver(fake))[1])


if __name__ == "__main__":
    main()

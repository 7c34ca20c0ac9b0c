"""Where weights come from: what staging and reading from a file cost, as ratios within one run.

``python -m dgls_torch.bench.host`` runs this alone. The first part copies a model that is
page-locked and the same one through the staging chunks, by turns. The second streams a file bigger
than the memory that its process may have, and sets the rate against that of reading the same file
from one end to the other; the process is held to its memory by a cgroup where one can be made, and
is measured where not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import dgls_torch
from dgls_torch.blocks import compute_device
from dgls_torch.cgroup import read_text
from dgls_torch.units import GIB, MIB, format_bytes, format_rate, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dgls_torch.report import Report, Use

_BLOCK_BYTES = 64 * MIB
_TENSORS = 4
_LINK = 2e9
_CHUNK = 4 * MIB


class Block(nn.Module):
    """A block whose kernels take next to no time: a pass takes as long as its copies."""

    def __init__(self, size: int = _BLOCK_BYTES) -> None:
        """Makes the weights, which take ``size`` bytes together."""
        super().__init__()
        for number in range(_TENSORS):
            weight = torch.empty(size // _TENSORS // 2, dtype=torch.bfloat16)
            self.register_parameter(f"w{number}", nn.Parameter(weight, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds a few elements of each weight."""
        for weight in self.parameters():
            x = x + weight[:: weight.numel() // 64][:64].float()
        return x


class Digest(Block):
    """A block that reads every byte of its weights: the sum of all that they hold, as integers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sums the weights, each by its place."""
        for place, weight in enumerate(self.parameters(), 1):
            x = 31 * x + place * weight.view(torch.int64).sum()
        return x


def staged(device_name: str | None, blocks: int, passes: int) -> float:
    """Prints and returns the staged rate as a share of the pinned one; on the CPU over a link."""
    device = compute_device(device_name)
    model = nn.Sequential(*(Block() for _ in range(blocks)))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1)
    size = sum(param.nbytes for param in model.parameters())
    rates: dict[str, list[float]] = {"pinned": [], "staged": []}
    last: dict[str, Report] = {}
    link = _LINK if device.type == "cpu" else None
    x = torch.zeros(64, device=device)
    for _ in range(3):
        for way, pinned in (("pinned", 2 * size), ("staged", 0)):
            options: dict[str, Any] = {"pinned": pinned, "copy_bytes_per_s": link, "adapt": False}
            vram = 4 * _BLOCK_BYTES
            with dgls_torch.stream(model, vram, device=str(device), **options) as s:
                seconds = _seconds(model, x, device, passes)
                last[way] = s.report()
                rates[way].append(s.plan.streamed_bytes / seconds)
    pinned_rate, staged_rate = (statistics.median(rates[way]) for way in ("pinned", "staged"))
    ratio = staged_rate / pinned_rate
    where = f"{device}, link held to {format_rate(link)}" if link else str(device)
    print(f"staged copies ({where}; {blocks} blocks of {format_bytes(_BLOCK_BYTES)}, medians of 3)")
    print(f"  page-locked in place {format_rate(pinned_rate)}, staged {format_rate(staged_rate)}")
    print(f"  staged / page-locked: {ratio:.3f}")
    for way in ("pinned", "staged"):
        report = last[way]
        print(
            f"  {way}: link busy {100 * busy_share(report.timeline):.1f} % of a pass, "
            f"{format_bytes(report.pinned_bytes)} page-locked, {report.host.threads} threads read"
        )
    return ratio


def _seconds(model: nn.Module, x: torch.Tensor, device: torch.device, passes: int) -> float:
    """Seconds of a pass, once the residents are there and the readers have settled."""

    def run(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                model(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run(3)
    begun = time.perf_counter()
    run(passes)
    return (time.perf_counter() - begun) / passes


def busy_share(timeline: Sequence[Use]) -> float:
    """The share of the timed passes in which a copy was under way; 1 is a link that never rests.

    From the first copy of a pass to its last: not all passes are timed, and those between are not
    known.
    """
    spans: dict[int, list[tuple[float, float]]] = {}
    for use in timeline:
        if use.pass_number > 0 and use.stretch_bytes:
            spans.setdefault(use.pass_number, []).append((use.copy_start_s, use.copy_end_s))
    busy = whole = 0.0
    for of_pass in spans.values():
        begin = end = min(of_pass)[0]
        for start, stop in sorted(of_pass):
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        whole += end - begin
    return busy / whole if whole else 0.0


def make_file(path: Path, size: int) -> None:
    """Writes a model of blocks as a safetensors file, without ever holding it."""
    blocks = max(2, size // _BLOCK_BYTES)
    header: dict[str, Any] = {}
    each = _BLOCK_BYTES // _TENSORS
    for number in range(blocks * _TENSORS):
        name = f"{number // _TENSORS}.w{number % _TENSORS}"
        offsets = [number * each, (number + 1) * each]
        header[name] = {"dtype": "BF16", "shape": [each // 2], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    seed = torch.Generator().manual_seed(1)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number in range(blocks * _TENSORS):
            part = torch.randint(0, 2**62, (each // 8,), generator=seed) + number
            file.write(part.numpy().tobytes())
        os.fsync(file.fileno())
        _forget(file.fileno())


def _forget(number: int) -> None:
    """Takes a file out of the page cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


def sequential_rate(path: Path, flag: int, most: int) -> float:
    """Bytes per second of reading ``most`` bytes of a file that is in no cache, with one thread."""
    buffer = mmap.mmap(-1, _CHUNK)
    number = os.open(path, os.O_RDONLY | flag)
    try:
        _forget(number)
        begun, total = time.perf_counter(), 0
        while total < most and (count := os.readv(number, [buffer])):
            total += count
            if count % 4096:
                break
        rate = total / (time.perf_counter() - begun)
        _forget(number)
    finally:
        os.close(number)
    return rate


def _faster_way(path: Path) -> int:
    """The flag with which one thread reads a file faster: through the page cache, or past it."""
    rates = {0: sequential_rate(path, 0, 8 * _BLOCK_BYTES)}
    direct = getattr(os, "O_DIRECT", 0)
    with contextlib.suppress(OSError):
        rates[direct] = sequential_rate(path, direct, 8 * _BLOCK_BYTES)
    return max(rates, key=lambda flag: rates[flag])


def stream_file(path: Path, vram: int, ram: int | None, passes: int, device: str) -> dict[str, Any]:
    """Streams a file's model in this process; returns what was measured.

    One pass reads every byte that arrives and sums it; ``passes`` more are timed, each between two
    plain reads of the file.
    """
    torch.set_num_threads(1)
    options: dict[str, Any] = {"device": device, "source": path}
    if ram is not None:
        options["ram"] = ram
    with dgls_torch.stream(_meta(Digest, path), vram, **options):
        pass  # what torch loads of itself on first use is no memory of the stream
    measured: dict[str, Any] = {"before": _peak(), "rates": [], "alone": [], "way": ""}
    model = _meta(Digest, path)
    with dgls_torch.stream(model, vram, **options) as s, torch.inference_mode():
        measured["digest"] = int(model(torch.zeros((), dtype=torch.int64, device=device)))
        measured["streamed"] = s.plan.streamed_bytes
    if passes:
        _time_passes(path, vram, options, passes, measured)
    return measured | {"peak": _peak()}


def _time_passes(
    path: Path, vram: int, options: dict[str, Any], passes: int, measured: dict[str, Any]
) -> None:
    model, x = _meta(Block, path), torch.zeros(64, device=options["device"])
    with dgls_torch.stream(model, vram, **options) as s, torch.inference_mode():
        model(x)
        flag, size = _faster_way(path), path.stat().st_size
        measured["alone"] = [sequential_rate(path, flag, size)]
        for _ in range(passes):
            begun = time.perf_counter()
            float(model(x).sum())  # waits for a GPU
            measured["rates"].append(s.plan.streamed_bytes / (time.perf_counter() - begun))
            measured["alone"].append(sequential_rate(path, flag, size))
        measured["way"] = dict(s.report().host.rows()).get("files are read", "")


def _meta(kind: type[Block], path: Path) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(kind() for _ in range(_count(path))))


def _peak() -> int:
    """The most RAM that this process had; not getrusage, which knows that of its parent too."""
    found = read_text(Path("/proc/self/status")).partition("VmHWM:")[2].split()
    return int(found[0]) * 1024 if found else 0


def _count(path: Path) -> int:
    from dgls_torch.files import SafetensorsFile

    return len(SafetensorsFile(path).tensors) // _TENSORS


def expected_digest(path: Path) -> int:
    """The digest of a file's model, read tensor by tensor."""
    from dgls_torch.files import SafetensorsFile

    file = SafetensorsFile(path)
    x = torch.zeros((), dtype=torch.int64)
    for number in range(len(file.tensors)):
        block, place = divmod(number, _TENSORS)
        weight = file.load_tensor(f"{block}.w{place}")
        x = 31 * x + (place + 1) * weight.view(torch.int64).sum()
    return int(x)


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """A cgroup that may hold ``limit`` bytes; ``None`` where none can be made."""
    own = next(iter(_own_groups()), None)
    folder = None if own is None else own[0] / f"dgls-bench-{os.getpid()}"
    if own is None or folder is None:
        yield None
        return
    try:
        folder.mkdir()
        (folder / own[1]).write_text(str(limit))
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        yield None
        return
    try:
        yield folder
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


def _own_groups() -> Iterator[tuple[Path, str]]:
    for line in read_text(Path("/proc/self/cgroup")).splitlines():
        _, names, path = line.split(":", 2)
        if names == "memory":
            yield Path("/sys/fs/cgroup/memory" + path), "memory.limit_in_bytes"
            yield Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        elif not names and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            yield Path("/sys/fs/cgroup" + path).parent, "memory.max"


def from_file(
    size: int,
    vram: int,
    limit: int,
    ram: int | None,
    passes: int,
    where: str,
    device: str = "cpu",
) -> float:
    """Prints and returns the rate of streaming a file as a share of reading it."""
    with tempfile.TemporaryDirectory(dir=where or None) as folder, memory_group(limit) as group:
        path = Path(folder) / "model.safetensors"
        make_file(path, size)
        arguments = ["--inner", str(path), str(vram), str(ram or 0), str(passes), device]
        command = [sys.executable, "-m", "dgls_torch.bench.host", *arguments]
        if group is not None:
            script = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
            command = ["bash", "-c", script, "bash", *command]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the process with {format_bytes(limit)} failed:\n{done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        peak_group = 0
        if group is not None:
            for name in ("memory.max_usage_in_bytes", "memory.peak"):
                peak_group = max(peak_group, int(read_text(group / name) or 0))
        right = expected_digest(path) == found["digest"]
    rates, alone = found["rates"], found["alone"]
    # Each pass against the reads just before and after it: a shared disk changes by the second.
    pairs = zip(rates, alone, alone[1:], strict=False)
    ratios = sorted(rate * (1 / before + 1 / after) / 2 for rate, before, after in pairs)
    ratio = float(statistics.median(ratios))
    held = f"held to {format_bytes(limit)} by a cgroup" if group else "measured, not held"
    print(f"a file of {format_bytes(size)}, an arena of {format_bytes(vram)} ({device}), {held}")
    print(f"  bits of the file: {'the same' if right else 'WRONG'}")
    print(f"  peak RSS {format_bytes(found['peak'])}, cgroup peak {format_bytes(peak_group)}")
    streamed = format_bytes(found["streamed"])
    rate = format_rate(statistics.median(rates))
    print(f"  streamed {streamed} a pass at {rate}; {found['way']}")
    rate = format_rate(statistics.median(alone))
    print(f"  one reader from end to end, before and after each pass: {rate}")
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    print(f"  streamed / sequential: {ratio:.3f} (median of {len(ratios)}, {spread})")
    if not right or found["peak"] > limit:
        raise RuntimeError("the file part did not keep its promise; see above")
    return ratio


def run(device: str | None, file_bytes: int) -> None:
    """Prints both parts; an arena of a sixth of the file, and 2 GiB for its process."""
    staged(device, 12, 3)
    print()
    from_file(file_bytes, max(file_bytes // 6, 3 * _BLOCK_BYTES), 2 * GIB, None, 5, "")


def main(argv: list[str]) -> int:
    """Runs both parts, or one of them; returns 0."""
    if argv[:1] == ["--inner"]:
        sizes = [int(text) for text in argv[2:5]]
        found = stream_file(Path(argv[1]), sizes[0], sizes[1] or None, sizes[2], argv[5])
        print(json.dumps(found))
        return 0
    parser = argparse.ArgumentParser(prog="python -m dgls_torch.bench.host", description=__doc__)
    parser.add_argument("--device", default=None, help="cpu, cuda; default: CUDA when there is any")
    parser.add_argument("--blocks", type=int, default=12, help="of 64 MiB each; default 12")
    parser.add_argument("--passes", type=int, default=3, help="timed passes; default 3")
    parser.add_argument("--file", default="1GiB", help="size of the file; 0 leaves it out")
    parser.add_argument("--vram", default="512MiB", help="arena of the second part")
    parser.add_argument("--limit", default="2GiB", help="memory of its process")
    parser.add_argument("--ram", default=None, help="ram= of its stream; default auto")
    parser.add_argument("--folder", default="", help="where the file is written")
    parser.add_argument("--staged", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(argv)
    if options.staged:
        staged(options.device, options.blocks, options.passes)
    size = parse_bytes(options.file, "file", least=0)
    if size:
        device = str(compute_device(options.device))
        vram, limit = (parse_bytes(getattr(options, n), n, least=1) for n in ("vram", "limit"))
        ram = None if options.ram is None else parse_bytes(options.ram, "ram", least=1)
        from_file(size, vram, limit, ram, options.passes, options.folder, device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

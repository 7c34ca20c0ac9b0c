"""Memory: what a stream takes of the host, and models that are larger than the memory there is.

Goal: streaming from tensors costs the weights once, the pools that were asked for, and little else;
streaming from a file runs a model in less memory than it has bytes, and gives the right result.
Method: peak memory of a process that does nothing else; a memory cgroup where one can be made, else
a limit of the process, both smaller than the model, against a result from without.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import inputs, net, same
from safetensors.torch import save_file

import dgls_torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import Processes

MIB = 1 << 20
WIDTH, COUNT = 1024, 8  # 16 MiB and a little in each block, 136 MiB in all

COMMON = f"""
import gc, hashlib, os, resource, sys, torch, dgls_torch
from pathlib import Path
from helpers import Net, inputs
def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024
def run(model):
    with torch.inference_mode():
        return model(inputs({WIDTH}))
def make():
    torch.manual_seed(0)
    return Net({COUNT}, {WIDTH}).eval()
def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
def leave():
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A file of weights, their bytes, and the digest of the model's output."""
    import hashlib

    model = net(COUNT, WIDTH)
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    save_file(model.state_dict(), path)
    size = sum(p.nbytes for p in model.parameters())
    with torch.inference_mode():
        out = model(inputs(WIDTH))
    return path, size, hashlib.sha256(out.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("share", [0, 50, 100])
def test_streaming_from_tensors_holds_the_weights_once(processes: Processes, share: int) -> None:
    """The arena is the device's memory, which on the CPU is memory of the process too."""
    done = processes.run(
        COMMON
        + f"""
model = make()
size = sum(p.nbytes for p in model.parameters())
expected = run(model)
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak so far
before = status("VmRSS")
with dgls_torch.stream(model, 40 << 20, device="cpu", staging="4MiB") as s:
    vram = s.plan.least_vram_bytes
    s.replan(vram + (size - vram) * {share} // 100)
    for _ in range(3):
        assert torch.equal(run(model), expected)
    arena = s.plan.arena_bytes
del s
print(status("VmHWM") - before, arena, size)
leave()
"""
    )
    assert (done.code, done.err) == (0, "")
    more, arena, size = map(int, done.out.split())
    assert size > 128 * MIB
    # What the weights took is in `before` already.
    assert more <= arena + size // 10 + 8 * MIB, f"{more >> 20} MiB more, arena {arena >> 20} MiB"


def test_streaming_from_a_file_holds_no_weights(
    processes: Processes, big: tuple[Path, int, str]
) -> None:
    path, size, expected = big
    done = processes.run(
        COMMON
        + f"""
with torch.device("meta"):
    model = make()
run(torch.nn.Linear({WIDTH}, {WIDTH}))
small = Net(4, 64).eval()  # so that the pages of libraries which streaming uses are there before
with dgls_torch.stream(small, "160KiB", device="cpu"), torch.inference_mode():
    small(inputs(64))
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
with dgls_torch.stream(model, 40 << 20, device="cpu", source={str(path)!r}, ram="8MiB") as s:
    for _ in range(2):
        out = run(model)
print(status("VmHWM") - before, digest(out))
leave()
"""
    )
    assert (done.code, done.err) == (0, "")
    more, digest = done.out.split()
    assert digest == expected
    # Layers outside of the blocks are read into memory: 8 MiB, which the budget holds as well.
    assert int(more) <= 40 * MIB + 8 * MIB + 8 * MIB + size // 10


CGROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def cgroup(limit: int) -> Iterator[Path | None]:
    """A memory cgroup of either version; None where none can be made."""
    unified = (CGROUPS / "cgroup.controllers").exists()
    parent = CGROUPS if unified else CGROUPS / "memory"
    group = parent / f"dgls-test-{os.getpid()}"
    made = False
    try:
        group.mkdir()
        made = True
        names = ["memory.max", "memory.swap.max"] if unified else ["memory.limit_in_bytes"]
        (group / names[0]).write_text(str(limit))
        for name in names[1:]:
            with contextlib.suppress(OSError):
                (group / name).write_text("0")
    except OSError:
        yield None
    else:
        yield group
    finally:
        if made:
            with contextlib.suppress(OSError):
                group.rmdir()


STREAM = """
with torch.device("meta"):
    model = make()
with dgls_torch.stream(model, 26 << 20, device="cpu", source=path) as s:
    for _ in range(3):
        out = run(model)
    assert s.plan.streamed_bytes > 100 << 20
print(digest(out))
leave()
"""
LOAD = """
import safetensors.torch
state = safetensors.torch.load_file(path)
print(sum(float(tensor.sum()) for tensor in [t.clone() for t in state.values()]))
leave()
"""


def limited(processes: Processes, path: Path, limit: int, body: str) -> tuple[Any, str]:
    """Runs a script that may take ``limit`` bytes; says by what they were limited."""
    begin = COMMON + f"path = {str(path)!r}\n"
    with cgroup(limit) as group:
        if group is not None:
            enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
            return processes.run(begin + enter + body), "cgroup"
    # Forked from a process that has libraries mapped: only what comes on top counts.
    enter = f"""
limit = status("VmData") + {limit}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
"""
    return processes.run(begin + enter + body), "limit of the process"


def test_a_model_that_is_larger_than_memory(
    processes: Processes, big: tuple[Path, int, str]
) -> None:
    path, size, expected = big
    limit = size * 3 // 4
    done, kind = limited(processes, path, limit, STREAM)
    assert (done.code, done.err) == (0, ""), kind
    assert done.out.strip() == expected
    # The limit is one: to load the file as usual ends the process, or is refused.
    done, kind = limited(processes, path, limit, LOAD)
    assert done.code != 0, kind


def test_what_is_streamed_may_be_larger_than_the_address_space_allows(
    processes: Processes, big: tuple[Path, int, str]
) -> None:
    """No file is mapped as a whole: also 32-bit limits of address space are enough."""
    path, size, expected = big
    done = processes.run(
        COMMON
        + f"""
path = {str(path)!r}
limit = status("VmSize") + {size} // 2
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
{STREAM}"""
    )
    assert (done.code, done.err) == (0, "")
    assert done.out.strip() == expected


def test_a_model_on_the_cpu_streams_from_its_file_without_reading_its_tensors(
    big: tuple[Path, int, str],
) -> None:
    path, _, _ = big
    model = net(COUNT, WIDTH, seed=5)
    with (
        torch.inference_mode(),
        dgls_torch.stream(model, 40 * MIB, device="cpu", source=path) as s,
    ):
        model(inputs(WIDTH))
        assert s.report().h2d_bytes_total >= s.plan.block_bytes
    twin = net(COUNT, WIDTH, seed=5)
    assert same(list(model.parameters()), list(twin.parameters()))

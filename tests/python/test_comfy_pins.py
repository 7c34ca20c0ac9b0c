"""Page-locks are in ComfyUI's own account, within its limit, as long as they are held.

Goal: TOTAL_PINNED_MEMORY says the truth while a model streams, shrinks, is freed, or dies; no more
than MAX_PINNED_MEMORY leaves is locked, after ComfyUI was asked to make room.
Method: the fake driver, which counts what is locked, in a process with the fake ComfyUI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from comfy_path import IS_REAL

if TYPE_CHECKING:
    from pathlib import Path

    from processes import Done, Processes

pytestmark = pytest.mark.skipif(IS_REAL, reason="the fake driver takes the fake ComfyUI")
BEGIN = """
import ctypes, gc, os
from comfy_path import put_on_path
put_on_path()
fake = ctypes.CDLL(os.environ["FAKE"])
def locked():
    value = ctypes.c_int64(-1)
    assert fake.fakecuda_get(b"pinned", ctypes.byref(value)) == 0
    return value.value
def counted(others):
    # Up to the pages that a lock begins and ends in.
    return 0 <= locked() - (mm.TOTAL_PINNED_MEMORY - others) <= 100 * 4096
import comfy.model_management as mm
from comfy_world import *
mm.MAX_PINNED_MEMORY = 1 << 30
"""
END = """
import sys
print("done")
sys.stdout.flush()
os._exit(0)
"""


def run(body: str, processes: Processes, driver: Path) -> None:
    settings = {"FAKE": str(driver), "DGLS_ALLOW_FAKE": "1", "DGLS_TEST_DRIVER": "cuda"}
    done: Done = processes.run(BEGIN + body + END, **settings)
    assert (done.code, done.err) == (0, ""), f"{done.out}\n{done.err}"
    assert done.out.splitlines()[-1] == "done"


def test_what_is_locked_is_counted_until_it_is_given_back(
    processes: Processes, fake_driver: Path
) -> None:
    run(
        """
stream = streamed(patcher(), 0.5)
mm.TOTAL_PINNED_MEMORY = 1000
expected = sample(patcher())
assert same(sample(stream), expected)
assert locked() > 1 << 20
assert counted(1000), (mm.TOTAL_PINNED_MEMORY, locked())
assert same(sample(stream), expected)
assert counted(1000), (mm.TOTAL_PINNED_MEMORY, locked())
stream.partially_unload(CPU, residency(stream).held_bytes // 4)
assert locked() > 1 << 20
assert counted(1000), (mm.TOTAL_PINNED_MEMORY, locked())
free_all()
assert locked() == 0
assert mm.TOTAL_PINNED_MEMORY == 1000
assert same(sample(stream), expected)
assert counted(1000), (mm.TOTAL_PINNED_MEMORY, locked())
mm.current_loaded_models.clear()
del stream
gc.collect()
assert locked() == 0
assert mm.TOTAL_PINNED_MEMORY == 1000
""",
        processes,
        fake_driver,
    )


def test_no_more_is_locked_than_comfyuis_limit_leaves(
    processes: Processes, fake_driver: Path
) -> None:
    run(
        """
stream = streamed(patcher(), 0.5)
blocks = sum(size for _, size in sizes_of(stream.model, Settings()).blocks)
mm.MAX_PINNED_MEMORY, mm.TOTAL_PINNED_MEMORY = 10000 + blocks // 2, 10000
assert same(sample(stream), sample(patcher()))
assert mm.asked_to_unpin == [blocks - blocks // 2], mm.asked_to_unpin
in_place = residency(stream).stream.report().pinned_bytes
assert 0 < in_place <= blocks // 2, (in_place, blocks)
free_all()
mm.MAX_PINNED_MEMORY = -1  # --disable-pinned-memory
assert same(sample(stream), sample(patcher()))
assert residency(stream).stream.report().pinned_bytes == 0
""",
        processes,
        fake_driver,
    )


def test_what_is_locked_of_encoded_weights_is_counted(
    processes: Processes, fake_driver: Path
) -> None:
    """By the node's input, on a link that decides; and given up when another node says off."""
    run(
        """
import time
from dgls_torch.comfy.nodes import DGLSStream
from dgls_torch.comfy.report_view import report_data
from compress_cases import WIDTH as WIDE  # of weights that are worth encoding
assert fake.fakecuda_set(b"bw_mbps", ctypes.c_int64(400)) == 0
class Wide(Flux):
    def __init__(self):
        super().__init__(0)
        self.first, self.last = ops.Linear(WIDTH, WIDE), ops.Linear(WIDE, WIDTH)
        self.double_blocks.extend(Block(WIDE) for _ in range(32))
        self.to(torch.bfloat16)
numbers = torch.randn(3, WIDTH).to(torch.bfloat16)
def sampled(made):
    made = sample(made, passes=4, x=numbers)
    time.sleep(0.01)
    return made
model = patcher(Wide)
expected = sample(patcher(Wide), x=numbers)
vram = str(sizes_of(model.model, Settings()).total_bytes * 3 // 4)  # 32 MiB are the decoder's
made = DGLSStream.execute(model, vram=vram, compress="auto").args[0]
mm.TOTAL_PINNED_MEMORY = 1000
for _ in range(30):
    assert same(sampled(made), expected)
    report = residency(made).stream.report()
    if report.encoded_held_bytes > 4 << 20 and report.decoded_bytes_total > 0:
        break
else:
    raise AssertionError(report)
plan = residency(made).stream.plan
assert plan.decode_bytes == 32 << 20
assert "(32.00 MiB of them to decode from)" in str(plan)
others = sizes_of(made.model, Settings()).outside_bytes
arena = residency(made).stream._engine.arena_bytes  # a plan adopted later may use less of it
assert made.loaded_size() == others + arena + plan.decode_bytes
assert others + plan.arena_bytes + plan.decode_bytes <= made.loaded_size() <= int(vram)
held = lambda: residency(made).stream.report().encoded_held_bytes
for _ in range(30):  # until nothing is being encoded
    before = held()
    assert same(sampled(made), expected)
    if held() == before:
        break
assert locked() > report.pinned_bytes + report.encoded_held_bytes
assert counted(1000), (mm.TOTAL_PINNED_MEMORY, locked())
def summary(made):
    return report_data("wide", residency(made))["summary"]
assert ", encoded to 6" in summary(made), summary(made)
plain = DGLSStream.execute(model, vram=vram).args[0]
assert same(sampled(plain), expected)
report = residency(plain).stream.report()
assert (report.encoded_held_bytes, report.decoded_bytes_total) == (0, 0)
assert "encoded" not in summary(plain)
assert counted(1000), (mm.TOTAL_PINNED_MEMORY, locked())
free_all()
assert locked() == 0
assert mm.TOTAL_PINNED_MEMORY == 1000
""",
        processes,
        fake_driver,
    )

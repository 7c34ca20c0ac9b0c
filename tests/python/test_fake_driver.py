"""The CUDA path without a GPU: the real driver code on a library that plays the driver.

Goal: whole models are bit-identical over page-locked and staged copies and from files, however slow
they are; every driver failure is a Python exception with call and code, after which the process
lives, the model is as it was, and the driver holds nothing of ours.
Method: one process for each scenario, since the driver is looked up once; the arena is CPU memory,
which the fake driver takes for its own; faults and delays by its knobs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from processes import Done, Processes

    Script = Callable[..., list[str]]

BEGIN = """
import ctypes, os, sys, pathlib
fake = ctypes.CDLL(os.environ["FAKE"])
def put(key, value):
    assert fake.fakecuda_set(key.encode(), ctypes.c_int64(value)) == 0, key
def get(key):
    value = ctypes.c_int64(-1)
    assert fake.fakecuda_get(key.encode(), ctypes.byref(value)) == 0, key
    return value.value
def held():
    names = ("used", "pinned", "host_ranges", "refs", "streams", "events", "modules")
    return {name: get(name) for name in names if get(name)}
import torch, dgls_torch
from helpers import SMALL, Snapshot, budgets, check, inputs, net, same, threads
from safetensors.torch import save_file
PINNED, STAGED = {"pinned": "1GiB"}, {"pinned": 0, "staging": "64KiB"}
def run(model):
    with torch.inference_mode():
        return model(inputs())
def failing(call):
    try:
        call()
    except Exception as error:
        assert type(error) is RuntimeError, repr(error)
        print(str(error).splitlines()[0])
    else:
        print("no error")
"""
END = """
assert not held(), held()
assert not threads(), threads()
print("done")
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture
def script(processes: Processes, fake_driver: Path) -> Script:
    """Runs a scenario; returns the lines it printed."""

    def run(body: str, *, library: Path = fake_driver, **environment: str) -> list[str]:
        settings = {"FAKE": str(library), "DGLS_ALLOW_FAKE": "1", "DGLS_TEST_DRIVER": "cuda"}
        done: Done = processes.run(BEGIN + body + END, **(settings | environment))
        assert (done.code, done.err) == (0, ""), f"{done.out}\n{done.err}"
        lines = done.out.splitlines()
        assert lines[-1] == "done"
        return lines[:-1]

    return run


WAYS = {
    "page-locked": "options = PINNED",
    "staged": "options = STAGED",
    "some of each": "options = {'pinned': 8 * 4096, 'staging': '64KiB'}",
    "file": "options = {'source': path, 'ram': '8KiB'}",
    "copies of a file": "options = {'source': path, **PINNED}",
    "a few copies": "options = {'source': path, 'ram': '96KiB', 'staging': '64KiB', 'pinned': 0}",
    "file and memory": "options = {'source': part, **PINNED}",
    "layers": "options = {'unit': 'layer', **PINNED}",
    "no times": "options = {'trace_passes': 0, **STAGED}",
}
DELAYS = {
    "at once": "",
    "late": "put('lat_us', 300)",
    "slow": "put('bw_mbps', 60)",
    "late and slow": "put('lat_us', 100); put('bw_mbps', 200)",
}
FILES = """
folder = pathlib.Path(os.environ["FOLDER"])
path, part = folder / "all.safetensors", folder / "part.safetensors"
state = net().state_dict()
save_file(state, path)
save_file({k: v for k, v in state.items() if "up" in k}, part)
"""


@pytest.mark.parametrize("delay", DELAYS.values(), ids=DELAYS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_whole_models(script: Script, way: str, delay: str, tmp_path: Path) -> None:
    said = script(
        FILES
        + f"{way}; {delay}"
        + """
model = net()
reports = check(model, run, passes=4, **options)
assert get("ncopies") > 0 and get("h2d_bytes") >= reports[0].h2d_bytes_total > 0
assert reports[-1].copies > 0 and not reports[-1].errors
print(reports[0].pinned_bytes > 0, reports[0].staging_bytes > 0, reports[0].pin_failures)
timed = options.get("trace_passes") != 0
assert all(bool(report.timeline) == timed for report in reports)
assert all(use.end_s >= use.start_s >= use.wait_s for use in reports[0].timeline)
""",
        FOLDER=str(tmp_path),
    )
    name = next(name for name, text in WAYS.items() if text == way)
    assert said == {
        "page-locked": ["True False 0"],
        "layers": ["True False 0"],
        "some of each": ["True True 0"],
        "file and memory": ["True True 0"],
        "copies of a file": ["True True 0"],
    }.get(name, ["False True 0"])


def test_big_tensors_through_small_chunks(script: Script) -> None:
    script("""
put("bw_mbps", 2000)
model = net(count=4, width=160)
def call(model):
    with torch.inference_mode():
        return model(inputs(160))
report = check(model, call, vram=budgets(model, **STAGED)[:2], **STAGED)[0]
assert report.staging_bytes == 65536, report
assert get("ncopies") >= report.copies > 3 * 4 * 12, (get("ncopies"), report)
""")


def test_orders_and_changes(script: Script) -> None:
    script("""
import random
chance, x = random.Random(7), inputs()
for options in (PINNED, STAGED):
    put("lat_us", 50)
    model, twin = net(), net()
    with torch.inference_mode(), dgls_torch.stream(model, budgets(model, **options)[2],
                                                   **SMALL, **options) as s:
        for number in range(40):
            order = chance.choices(range(6), k=chance.randrange(12))
            assert same(model(x, order), twin(x, order)), (number, order)
            if number % 7 == 0:
                for one in (model, twin):
                    one.blocks[chance.randrange(6)].up.weight.mul_(1.5)
                    break
                twin.load_state_dict(model.state_dict())
            if number % 11 == 10:
                s.replan(budgets(net())[number % 5])
""")


# Injected once, somewhere in a run that would be right: knob, code, text. A copy fails alone, in
# cuMemcpyHtoDAsync, or in a batch.
FAULTS = {
    "copy": ("fail_copy_in", 1, "Async failed with CUDA error 1 (CUDA_ERROR_INVALID_VALUE)"),
    "copy oom": ("fail_copy_in", 2, "Async failed with CUDA error 2 (CUDA_ERROR_OUT_OF_MEMORY)"),
    "record": ("fail_record_in", 1, "cuEventRecord failed with CUDA error 1 (CUDA_ERROR_INVALID_"),
    "wait": ("fail_wait_in", 400, "cuStreamWaitEvent failed with CUDA error 400 (CUDA_ERROR_INVAL"),
}


@pytest.mark.parametrize("options", ["PINNED", "STAGED"])
@pytest.mark.parametrize(("knob", "code", "text"), FAULTS.values(), ids=FAULTS)
def test_a_failure_at_any_point(
    script: Script,
    knob: str,
    code: int,
    text: str,
    options: str,
) -> None:
    said = script(f"""
model = net()
expected, before = run(model), Snapshot(model)
told = 0
for point in [1, 2, 3, 5, 8, 13, 21, 34]:
    put("fail_code", {code})
    with dgls_torch.stream(model, budgets(model, **{options})[1], **SMALL, **{options}) as s:
        put("{knob}", point)
        for _ in range(4):
            try:
                out = run(model)
            except RuntimeError as error:
                told += 1
                said = str(error).splitlines()[0]
                assert {text!r} in said, said
            else:
                assert same(out, expected), point
        put("{knob}", 0)
        for _ in range(2):
            assert same(run(model), expected), point
        assert s.report().errors <= 2
    before.check(model)
    assert not held(), held()
print(told)
""")
    assert int(said[0]) >= 4, "hardly any failure was told"


@pytest.mark.parametrize("options", ["PINNED", "STAGED"])
@pytest.mark.parametrize("code", [719, 700, 999])
def test_a_lost_device(script: Script, code: int, options: str) -> None:
    said = script(f"""
model = net()
expected, before = run(model), Snapshot(model)
s = dgls_torch.stream(model, budgets(model, **{options})[0], **SMALL, **{options})
assert same(run(model), expected)
put("sticky", {code})
failing(lambda: run(model))
failing(lambda: run(model))
put("sticky", 0)
failing(lambda: run(model))
put("sticky", {code})
failing(s.detach)
put("sticky", 0)
s.detach()
before.check(model)
assert same(run(model), expected)
check(model, run, vram=budgets(model)[:1], **{options})
""")
    assert f"CUDA error {code} (CUDA_ERROR_" in said[0]
    for line in said[1:3]:
        assert "the engine stopped after an earlier error" in line
        assert f"CUDA error {code}" in line
        assert "call detach() and start again" in line


def test_a_device_that_is_full(script: Script) -> None:
    said = script("""
model = net()
expected, before = run(model), Snapshot(model)
put("pin_cap", 0)  # no page-locked memory at all
failing(lambda: dgls_torch.stream(model, 40_000, **SMALL, **STAGED))
before.check(model)
assert not held()
put("pin_cap", 3 * 4096)
failing(lambda: dgls_torch.stream(model, 40_000, **SMALL, **STAGED))
put("pin_cap", 1 << 30)
put("fail_alloc_in", 1)
failing(lambda: dgls_torch.stream(model, 40_000, **SMALL, **STAGED))
before.check(model)
put("fail_alloc_in", 2)  # fewer chunks will do
with dgls_torch.stream(model, 40_000, **SMALL, pinned=0, staging=64 << 20) as s:
    assert same(run(model), expected)
    print(0 < s.report().staging_bytes <= 40_000 // 2)
put("fail_code", 2)
put("fail_register_in", 1)
with dgls_torch.stream(model, 40_000, **SMALL, **PINNED) as s:
    assert same(run(model), expected)
    print(s.report().pin_failures, s.report().pinned_bytes, s.report().staging_bytes > 0)
before.check(model)
""")
    for line in said[:3]:
        assert "page-locking" in line
        assert "bytes failed: cuMemHostAlloc failed with CUDA error 2" in line
    assert said[3] == "True"
    failures, pinned_bytes, staged = said[4].split()
    # One refusal may be about one range: the others are locked all the same, that one is staged.
    assert (failures, staged) == ("1", "True")
    assert int(pinned_bytes) > 0


def test_a_stream_that_cannot_be_made(script: Script) -> None:
    said = script("""
model = net()
before = Snapshot(model)
for knob in ("fail_stream_create", "fail_record_in"):
    put("fail_code", 2)
    put(knob, 1)
    failing(lambda: dgls_torch.stream(model, 40_000, **SMALL, **PINNED))
    before.check(model)
    assert not held(), held()
""")
    assert "cuStreamCreateWithPriority failed with CUDA error 2" in said[0]
    assert "cuEventRecord failed with CUDA error 2" in said[1]


def test_exceptions_in_blocks(script: Script) -> None:
    script("""
class Stop(BaseException): pass
put("lat_us", 100)
for options in (PINNED, STAGED):
    for kind in (ValueError, Stop):
        model = net()
        expected, before = run(model), Snapshot(model)
        with dgls_torch.stream(model, budgets(model, **options)[1], **SMALL, **options):
            for index in (0, 3, 5):
                def stop(*_):
                    raise kind
                hook = model.blocks[index].up.register_forward_hook(stop)
                try: run(model)
                except kind: pass
                hook.remove()
                assert same(run(model), expected)
        before.check(model)
""")


REFUSED = """
failing(lambda: dgls_torch.stream(net(), 40_000, **SMALL))
failing(torch.ops.dgls.driver_version)
"""


def test_a_fake_that_was_not_allowed(processes: Processes, fake_driver: Path) -> None:
    settings = {"FAKE": str(fake_driver), "DGLS_TEST_DRIVER": "cuda"}
    begin = "import os; os.environ.pop('DGLS_ALLOW_FAKE', None)\n"
    done = processes.run(begin + BEGIN + REFUSED + END, **settings)
    assert (done.code, done.err) == (0, "")
    for line in done.out.splitlines()[:2]:
        assert "is a fake for tests; set DGLS_ALLOW_FAKE=1 to use it" in line


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"FAKECUDA_DEVICES": "0"}, "cuInit failed with 100 (CUDA_ERROR_NO_DEVICE)"),
        ({"FAKECUDA_INIT": "999"}, "cuInit failed with 999 (CUDA_ERROR_UNKNOWN)"),
        ({"FAKECUDA_INIT": "34"}, "is the toolkit's stub; remove it from the search path"),
    ],
)
def test_a_driver_of_no_use(script: Script, environment: dict[str, str], text: str) -> None:
    for line in script(REFUSED, **environment):
        assert line.startswith("no usable CUDA driver: ")
        assert text in line


def test_an_old_driver(script: Script, fake_driver_without_symbols: Path) -> None:
    for line in script(REFUSED, library=fake_driver_without_symbols):
        assert "the driver library lacks cuEventRecord; a driver for CUDA 11.2 or newer" in line


def test_version_and_measuring(script: Script) -> None:
    said = script("""
ops = torch.ops.dgls
print(ops.driver_version())
put("bw_mbps", 1000)
for page_locked in (True, False):
    assert 0 < ops.measure_copy(0, 1 << 20, 3, page_locked) < 1.2e9
assert ops.measure_page_lock(0, 1 << 24) > 0
assert not held(), held()
put("fail_code", 719)
put("fail_copy_in", 1)
failing(lambda: ops.measure_copy(0, 1 << 20, 3, True))
failing(lambda: ops.measure_copy(7, 1 << 20, 3, True))
""")
    assert said[0] == "12090"
    assert "cuMemcpyHtoDAsync failed with CUDA error 719" in said[1]
    assert "cuDeviceGet failed with CUDA error 101" in said[2]


@pytest.mark.parametrize("fault", ["1", "4"])
@pytest.mark.parametrize("options", ["PINNED", "STAGED"])
def test_a_missing_wait_is_seen(script: Script, options: str, fault: str) -> None:
    said = script(f"""
import time
put("lat_us", 500)
model = net()
for block in model.blocks if {fault} == 4 else ():
    block.up.register_forward_hook(lambda *_: time.sleep(0.003))
expected = run(model)
os.environ["DGLS_TEST_FAULTS"] = "{fault}"
wrong = 0
with dgls_torch.stream(model, budgets(model, **{options})[0], **SMALL, **{options}):
    for _ in range(5):
        wrong += not same(run(model), expected)
print(wrong)
""")
    assert int(said[0]) >= 4

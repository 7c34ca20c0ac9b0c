"""``compress`` on the CUDA path without a GPU: the real driver code on a library that plays it.

Goal: whole models are bit-identical while their weights are decoded on the device, however slow the
link and the decoder are; the buffer to decode from counts as device memory; every failure of the
driver is told with call and code, and leaves the model as it was and nothing held.
Method: one process for each scenario, as in test_fake_driver; the fake driver decodes with the
emulated kernel, in order with its copies, and fails or takes time by its knobs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from test_fake_driver import script as run_script  # noqa: F401 (a fixture)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from test_fake_driver import Script

BEGIN = """
from compress_cases import MIB, all_held, passes, some_passes, wide, x
from compress_cases import run as run_wide
ON = SMALL | PINNED | {"compress": "on"}
model = wide()
expected, before = run_wide(model), Snapshot(model)
def outside(**options):
    with dgls_torch.stream(model, 256 * MIB, **SMALL | PINNED | options) as s:
        return s.plan.outside_bytes
BUFFER = outside(compress="on") - outside()  # the same for all budgets up to this one
def sizes(model, **options):
    buffer = BUFFER if options.pop("compress", "on") != "off" else 0
    return [size + buffer for size in budgets(model, **options)]
def call():
    return run_wide(model)
def gone():
    before.check(model)
    assert not held(), held()
    assert not threads(), threads()
"""


@pytest.fixture
def script(run_script: Script) -> Callable[..., list[str]]:  # noqa: F811
    """As in test_fake_driver, with a model in bf16."""
    return lambda body, **environment: run_script(BEGIN + body, **environment)


WAYS = {
    "page-locked": "options, refused = {}, 0",
    "some staged": "options, refused = {'staging': '64KiB'}, 2",
    "layers": "options, refused = {'unit': 'layer'}, 0",
    "file": "options, refused = {'source': path, 'ram': '68KiB', 'staging': '64KiB'}, 0",
    "copies of a file": "options, refused = {'source': path}, 0",
    "not adapted": "options, refused = {'adapt': False, 'trace_passes': 0}, 0",
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_whole_models(script: Script, way: str, tmp_path: Path) -> None:
    script(
        """
path = pathlib.Path(os.environ["FOLDER"]) / "all.safetensors"
save_file(model.state_dict(), path)
"""
        + way
        + """
DELAYS = [{}, {"lat_us": 300, "bw_mbps": 1500}, {"decode_us": 1000}]
for number, delays in enumerate(DELAYS):
    for knob in ("lat_us", "bw_mbps", "decode_us"):
        put(knob, delays.get(knob, 0))
    put("fail_code", 2)
    put("fail_register_in", refused)
    size = sizes(model, **options)[number]
    with dgls_torch.stream(model, size, **ON | options) as s:
        report = passes(s, call, expected, lambda r: all_held(r) and r.decoded_bytes_total > 0)
        assert report.pin_failures == (refused > 0), report
        assert report.staging_bytes > 0 or not refused, report
        assert not report.errors, report
        assert get("pinned") >= report.encoded_held_bytes
        assert 0.6 < report.encoded_bytes_total / report.decoded_bytes_total < 0.75
    gone()
    assert get("h2d_bytes") >= report.h2d_bytes_total > 0  # all have run by now
""",
        FOLDER=str(tmp_path),
    )


def test_less_goes_over_the_drivers_link(script: Script) -> None:
    script("""
moved = {}
for mode in ("off", "on"):
    options = ON | {"compress": mode, "adapt": False}
    size = sizes(model, compress=mode)[3]
    with dgls_torch.stream(model, size, **options) as s:
        passes(s, call, expected, lambda r: all_held(r) == (mode == "on"))
        start = get("h2d_bytes")
        for _ in range(6):
            assert same(call(), expected)
        moved[mode] = get("h2d_bytes") - start
assert moved["on"] < 0.9 * moved["off"], moved
""")


def test_fp8_beside_bf16(script: Script) -> None:
    script("""
from compress_cases import both, normal_bytes, normal_words, run_words
model = both(normal_words, normal_bytes)
expected, before = run_words(model), Snapshot(model)
for knob in ("lat_us", "decode_us"):
    put(knob, 500)
    with dgls_torch.stream(model, BUFFER + 4 * MIB, **ON) as s:
        enough = lambda r: all_held(r) and r.decoded_bytes_total > 0
        report = passes(s, lambda: run_words(model), expected, enough)
        assert not report.errors, report
    put(knob, 0)
    gone()
""")


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_auto_asks_whether_copies_decide(script: Script, mode: str) -> None:
    said = script(f"""
import time
for block in model.blocks:
    block.up.register_forward_hook(lambda *_: time.sleep(0.002))
before = Snapshot(model)
for mbps in (400, 0):
    put("bw_mbps", mbps)
    size = sizes(model)[0 if mbps else 3]
    with dgls_torch.stream(model, size, **ON | {{"compress": "{mode}"}}) as s:
        some_passes(s, call, expected, 10)
        print(s.report().encoded_held_bytes > 0)
    gone()
""")
    assert said == {"auto": ["True", "False"], "on": ["True", "True"]}[mode]


def test_a_missing_wait_is_seen(script: Script) -> None:
    said = script("""
import time
put("decode_us", 4000)
os.environ["DGLS_TEST_FAULTS"] = "1"  # nothing waits for what is decoded
wrong = 0
with dgls_torch.stream(model, sizes(model)[0], **ON) as s:
    for _ in range(16):
        wrong += not same(call(), expected) and s.report().decoded_bytes_total > 0
        time.sleep(0.005)
print(wrong)
""")
    assert int(said[0]) >= 5


# A copy that is not encoded must not overtake the decoding of one before it to the same place,
# also where no use of a block lies between: weights have changed, or the use was cancelled.
@pytest.mark.parametrize("delay", ["lat_us", "decode_us"])
def test_changes_in_place(script: Script, delay: str) -> None:
    script(f"""
import random
chance, twin = random.Random(7), wide()
put("{delay}", 200)
with dgls_torch.stream(model, sizes(model)[3], **ON) as s:
    passes(s, call, run_wide(twin))
    for number in range(40):
        assert same(call(), run_wide(twin)), number
        if number % 4 == 0:
            block, factor = chance.randrange(4), chance.choice([0.5, -1.0, 1.5])
            with torch.no_grad():
                for one in (model, twin):
                    one.blocks[block].up.weight.mul_(factor)
                    one.blocks[block].down.weight.mul_(1 / factor)
assert not held(), held()
""")


@pytest.mark.parametrize("delay", ["lat_us", "decode_us"])
def test_any_order(script: Script, delay: str) -> None:
    script(f"""
import random
chance, twin = random.Random(7), wide()
put("{delay}", 200)
with torch.inference_mode(), dgls_torch.stream(model, sizes(model)[1], **ON) as s:
    passes(s, lambda: model(x()), twin(x()))
    for number in range(40):
        order = chance.choices(range(4), k=chance.randrange(8))
        assert same(model(x(), order), twin(x(), order)), (number, order)
gone()
""")


def test_replan_suspend_and_resume(script: Script) -> None:
    script("""
put("decode_us", 200)
all_sizes = sizes(model)
with dgls_torch.stream(model, all_sizes[1], **ON) as s:
    for size in (all_sizes[3], None, all_sizes[-1], all_sizes[0], all_sizes[2]):
        s.replan(size)
        passes(s, call, expected, lambda r: all_held(r) or not r.plan.streamed_bytes)
        s.suspend()
        before.check(model)
        assert same(call(), expected)
        s.resume()
        assert same(call(), expected)
gone()
""")


# ---- device memory


def test_the_buffer_counts_as_device_memory(script: Script) -> None:
    said = script("""
def told(vram, **options):
    try:
        dgls_torch.stream(model, vram, **SMALL | PINNED | options)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{vram} will do")
def least(**options):
    return int(told(1, **options).split("(")[-1].split()[0])
off, on = least(), least(compress="on")
print(on - off == BUFFER >= 16 * MIB and least(compress="auto") == off)
for vram in (off, on - 1):
    print(told(vram, compress="on"))
gone()
for vram in (on, *sizes(model)):
    with dgls_torch.stream(model, vram, **ON) as s:
        for size in (vram, on, 2 * on):
            plan = s.replan(size)
            assert plan.outside_bytes >= BUFFER, plan
            assert plan.outside_bytes + plan.arena_bytes <= size, plan
            assert s._parts.engine.arena_bytes + BUFFER <= size, size
            assert same(call(), expected)
        try:
            s.replan(on - 1)
        except ValueError as error:
            assert "and the buffer to decode from" in str(error), error
        else:
            raise AssertionError("replanned to less than the least")
    gone()
for vram in (1 << 30, 1 << 35, 1 << 40):  # of a larger budget it may be a larger part
    with dgls_torch.stream(model, vram, **ON) as s:
        assert BUFFER < s.plan.outside_bytes <= BUFFER * 2 + vram // 16
        assert same(call(), expected)
""")
    assert said[0] == "True"
    assert len(said) == 3, said
    for line in said[1:]:
        assert "of the blocks and the buffer to decode from take " in line
        assert "the smallest budget that works is " in line


def test_models_with_nothing_to_encode_need_no_buffer(script: Script) -> None:
    script("""
model = wide(2, dtype=torch.float32)
expected, before = run_wide(model), Snapshot(model)
put("fail_code", 221)
put("fail_module_in", 1)
with dgls_torch.stream(model, budgets(model)[0], **ON) as s:
    some_passes(s, call, expected, 4)
    assert s.plan.outside_bytes < 4 * MIB
    assert s.report().encoded_held_bytes == 0
assert get("fail_module_in") == 1, "the kernel was loaded"
gone()
""")


def test_memory_that_the_driver_does_not_lock(script: Script) -> None:
    """Weights then go as they are."""
    script("""
put("pin_cap", 8 * MIB + MIB // 2)  # the weights, and not their encoded form
with dgls_torch.stream(model, sizes(model)[0], **ON) as s:
    some_passes(s, call, expected, 10)
    report = s.report()
    assert (report.encoded_held_bytes, report.errors) == (0, 0) and report.pinned_bytes > 0
gone()
""")


# ---- failures

# Where the kernel is loaded and tried out: knob, code, call.
MAKING = [
    ("fail_module_in", 221, "cuModuleLoadData failed with CUDA error 221 (CUDA_ERROR_JIT_COMPILER"),
    ("fail_module_in", 222, "cuModuleLoadData failed with CUDA error 222 (CUDA_ERROR_UNSUPPORTED"),
    ("fail_function_in", 500, "cuModuleGetFunction failed with CUDA error 500 (CUDA_ERROR_NOT_FO"),
    ("fail_launch_in", 701, "cuLaunchKernel failed with CUDA error 701 (CUDA_ERROR_LAUNCH_OUT_OF"),
    ("fail_copy_in", 1, "cuMemcpyHtoDAsync failed with CUDA error 1 (CUDA_ERROR_INVALID_VALUE"),
]
MAKE = f"""
texts = []
for knob, code, _ in {MAKING}:
    put("fail_code", code)
    put(knob, 1)
"""


def test_a_device_that_does_not_decode_is_refused(script: Script) -> None:
    said = script(
        MAKE
        + """
    failing(lambda: dgls_torch.stream(model, 64 * MIB, **ON))
    gone()
    assert same(call(), expected)
with dgls_torch.stream(model, sizes(model)[1], **ON) as s:
    passes(s, call, expected)
"""
    )
    assert len(said) == len(MAKING)
    for line, (_, _, text) in zip(said, MAKING, strict=True):
        assert text in line


def test_auto_goes_on_where_the_device_does_not_decode(script: Script) -> None:
    script(
        MAKE
        + """
    put("bw_mbps", 200)
    with dgls_torch.stream(model, sizes(model)[1], **ON | {"compress": "auto"}) as s:
        assert get(knob) == 0, "the kernel was not tried"
        some_passes(s, call, expected, 12)
        report = s.report()
        assert (report.encoded_held_bytes, report.encoded_bytes_total) == (0, 0), report
        assert report.errors == 0, report
    gone()
"""
    )


# In a pass, once all is encoded. The engine copies in batches where it can.
FAULTS = {
    "launch": ("fail_launch_in", 701, "cuLaunchKernel failed with CUDA error 701"),
    "copy": ("fail_copy_in", 1, "Async failed with CUDA error 1 (CUDA_ERROR_INVALID_VALUE)"),
    "record": ("fail_record_in", 1, "cuEventRecord failed with CUDA error 1"),
    "wait": ("fail_wait_in", 400, "cuStreamWaitEvent failed with CUDA error 400"),
}


@pytest.mark.parametrize(("knob", "code", "text"), FAULTS.values(), ids=FAULTS)
def test_a_failure_in_a_pass_is_told_once(script: Script, knob: str, code: int, text: str) -> None:
    said = script(f"""
told = 0
for point in (1, 4):
    with dgls_torch.stream(model, sizes(model)[1], **ON) as s:
        passes(s, call, expected)
        put("fail_code", {code})
        put("{knob}", point)
        errors = 0
        for _ in range(3):
            try:
                out = call()
            except RuntimeError as error:
                errors += 1
                assert {text!r} in str(error), error
            else:
                assert same(out, expected), point
        assert get("{knob}") == 0 and errors <= 1, (point, errors)
        told += errors
        decoded = s.report().decoded_bytes_total
        for _ in range(2):
            assert same(call(), expected), point
        report = s.report()
        assert report.errors <= 1 and report.decoded_bytes_total > decoded, report
    gone()
print(told)
""")
    assert int(said[0]) >= 1, "no failure was told"


def test_a_lost_device(script: Script) -> None:
    said = script("""
s = dgls_torch.stream(model, sizes(model)[1], **ON)
passes(s, call, expected)
put("sticky", 719)
failing(call)
failing(call)
failing(s.detach)
put("sticky", 0)
s.detach()
gone()
assert same(call(), expected)
""")
    assert "CUDA error 719 (CUDA_ERROR_LAUNCH_FAILED" in said[0]
    assert "the engine stopped after an earlier error" in said[1]

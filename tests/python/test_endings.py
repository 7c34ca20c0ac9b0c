"""How streams end: with their model, with a copy, with the process.

Goal: engines end with their model and outlive their handle; copies are free of their original; no
round of attach and detach leaks; the interpreter exits silently whatever is going on.
Method: weak references, threads of the process, counters of the system and of the garbage
collector, and processes that end in the middle of work.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import SMALL, Snapshot, budgets, inputs, net, same, settle, threads
from safetensors.torch import save_file
from torch import nn

import dgls_torch

if TYPE_CHECKING:
    from processes import Processes


def attach(model: nn.Module, vram: Any = 1 << 20, **options: Any) -> dgls_torch.Stream:
    return dgls_torch.stream(model, vram, **(SMALL | options))


def run(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(inputs())


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("keep_handle", [False, True])
def test_a_dropped_model_ends_its_engine(keep_handle: bool, cyclic: bool) -> None:
    model = net()
    if cyclic:
        model.me = [model]  # as models with a reference to their parent
        model.blocks[0].parents = [model]
    s = attach(model)
    run(model)
    assert len(threads()) == 1
    alive = [weakref.ref(model), weakref.ref(model.blocks[0]), weakref.ref(model.first.weight)]
    if not keep_handle:
        s = None
    del model
    settle()
    assert [ref() for ref in alive] == [None] * 3
    assert threads() == []
    if s is not None:
        assert s.plan.blocks
        assert s.report().passes == 1
        s.detach()


@pytest.mark.parametrize("cyclic", [False, True])
def test_blocks_that_outlive_their_model_are_free_again(cyclic: bool) -> None:
    model = net()
    blocks = list(model.blocks)
    before = [Snapshot(block) for block in blocks]
    if cyclic:
        model.me = [model]
    attach(model, budgets(net())[0])
    run(model)
    del model
    settle()
    assert threads() == []
    for snapshot, block in zip(before, blocks, strict=True):
        snapshot.check(block)
    again = nn.Sequential(*blocks)
    with attach(again):
        run(again)


def test_a_dropped_handle_keeps_the_model_streamed() -> None:
    model = net()
    attach(model, budgets(model)[0])
    settle()
    assert len(threads()) == 1
    moved = [h for block in model.blocks for h in block._forward_pre_hooks.values()]
    assert len(moved) == 6
    assert same(run(model), run(net()))
    with pytest.raises(RuntimeError, match="streamed already"):
        attach(model)


def test_a_copy_is_free_and_keeps_nothing_alive() -> None:
    model = net()
    s = attach(model, budgets(model)[0])
    for when in range(3):
        if when == 1:
            run(model)
        twin = copy.deepcopy(model)
        alone = copy.deepcopy(model.blocks[3])
        uses, passes = s.report().uses, s.report().passes
        assert same(run(twin), run(net()))
        assert same(run(copy.copy(model)), run(net()))  # has the same blocks, but is another model
        assert s.report().passes == passes
        uses += 6
        with torch.inference_mode():
            assert same(alone(inputs()), net().blocks[3](inputs()))
        assert s.report().uses == uses
        assert not {p.data_ptr() for p in twin.parameters()} & {
            p.data_ptr() for p in model.parameters()
        }
    with torch.no_grad():
        twin.blocks[0].up.weight.add_(1)
    assert same(run(model), run(net()))
    with attach(twin, budgets(net())[0]):
        assert not same(run(twin), run(net()))
    weight = weakref.ref(model.blocks[3].up.weight)
    s.detach()
    del s, model
    settle()
    assert weight() is None
    assert threads() == []
    alone(inputs())


def test_pickling_is_refused_with_a_sentence(tmp_path: Path) -> None:
    model = net()
    with attach(model) as s:
        for save in (
            lambda: pickle.dumps(model),
            lambda: torch.save(model, tmp_path / "model.pt"),
            lambda: torch.save({"wrapped": nn.Sequential(model)}, io.BytesIO()),
        ):
            with pytest.raises(TypeError, match=r"a streamed model cannot be pickled.*detach"):
                save()
        with pytest.raises(TypeError, match=r"a Stream cannot be pickled.*detach"):
            pickle.dumps(s)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        assert same(run(model), run(net()))
    assert same(run(pickle.loads(pickle.dumps(model))), run(net()))
    state = torch.load(tmp_path / "state.pt")
    assert same(list(state.values()), list(net().state_dict().values()))


def resources() -> dict[str, int]:
    settle()
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "objects": len(gc.get_objects()),
        "maps": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def memory_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.parametrize("source", ["tensors", "file"])
def test_nothing_leaks_in_a_thousand_rounds(source: str, tmp_path: Path) -> None:
    model = net(count=3)
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    options = {} if source == "tensors" else {"source": tmp_path / "net.safetensors"}
    sizes = budgets(model, **options)

    def rounds(count: int) -> None:
        for number in range(count):
            with attach(model, sizes[number % len(sizes)], **options) as s:
                run(model)
                if number % 5 == 0:
                    s.replan(sizes[-1])
                    run(model)

    rounds(100)
    before, memory = resources(), memory_kib()
    rounds(1000 if source == "tensors" else 300)
    after = resources()
    assert after["files"] == before["files"]
    assert after["threads"] == before["threads"]
    assert after["objects"] <= before["objects"] + 20
    assert after["maps"] <= before["maps"] + 10
    # One arena of 25 KiB or more that is kept in each round would be 25 MiB.
    assert memory_kib() - memory < 8 * 1024


ENDINGS = {
    "attached": "",
    "detached": "s.detach()",
    "handle dropped": "del s",
    "model dropped": "del model, blocks",
    "all dropped": "del model, blocks, s",
    "copies under way": "torch.ops.dgls.prefetch(s._engine.number)",
    "in a cycle": "model.me = [model, s]; del model, s, blocks",
    "in a thread": "import threading; t = threading.Thread(target=run, daemon=False); t.start()",
    "sys.exit in a thread": "import sys, threading\n"
    "def leaves(): run(); sys.exit(3)\n"
    "t = threading.Thread(target=leaves); t.start(); t.join()",
    "sys.exit in a block in a thread": "import sys, threading\n"
    "def leaves(*_): sys.exit(3)\n"
    "model.blocks[3].register_forward_hook(leaves)\n"
    "t = threading.Thread(target=run); t.start(); t.join()",
    "os._exit in a block": "import os, sys; sys.stdout.flush()\n"
    "model.blocks[3].register_forward_hook(lambda *_: os._exit(0))\nrun()",
    "os._exit": "import os, sys; sys.stdout.flush(); os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "stuck in a block": "model.blocks[1].register_forward_hook(stop)\n"
    "try: run()\nexcept KeyboardInterrupt: pass",
}
SCRIPT = """
import dgls_torch, torch
from helpers import net, inputs
model = net()
blocks = list(model.blocks)
s = dgls_torch.stream(model, 30_000, device="cpu", min_stream_bytes=0, copy_bytes_per_s=3e6)
def stop(*_):
    raise KeyboardInterrupt
def run():
    with torch.inference_mode():
        model(inputs())
run()
print("ready")
"""


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_the_interpreter_exits_silently(processes: Processes, ending: str) -> None:
    done = processes.run(SCRIPT + ending)
    assert (done.code, done.out, done.err) == (0, "ready\n", "")


@pytest.mark.parametrize(
    ("raised", "code"), [("ValueError('x')", 1), ("SystemExit(7)", 7), ("KeyboardInterrupt", -2)]
)
def test_the_interpreter_exits_after_an_exception_in_a_block(
    processes: Processes, raised: str, code: int
) -> None:
    hook = f"\ndef stop(*_): raise {raised}\nmodel.blocks[2].register_forward_hook(stop)\nrun()"
    done = processes.run(SCRIPT + hook)
    assert done.code == code
    assert done.out == "ready\n"
    last = done.err.strip().splitlines()[-1:] or [""]
    assert last[0].split(":")[0] == {1: "ValueError", 7: "", -2: "KeyboardInterrupt"}[code]
    assert "Exception ignored" not in done.err


DAEMON = SCRIPT.replace("3e6", "1e5") + (
    "import threading, time\n"
    "thread = threading.Thread(target=run, daemon=True)\n"
    "thread.start()\n"
    "while not torch.ops.dgls.stats(s._engine.number)[0] > 8: time.sleep(0.001)\n"
)


def test_a_daemon_thread_that_waits_for_its_weights_at_exit(processes: Processes) -> None:
    """It must not raise: its frames would go, and torch abort where their tensors do.

    One in a call of torch's own ends the process, with or without a stream.
    """
    done = processes.run(DAEMON)
    assert (done.code, done.out, done.err) == (0, "ready\n", "")


def test_at_exit_nobody_waits_for_a_thread_that_waits_for_its_weights(
    processes: Processes,
) -> None:
    """Else the end of the process would take as long as patience lasts."""
    watch = (
        "from dgls_torch import _C\n"
        "def seen():\n"
        "    threads = []\n"
        "    for _ in range(100):\n"
        "        threads.append(_C.runner(s._engine.number))\n"
        "        time.sleep(0.001)\n"
        "    return max(threads, key=threads.count)\n"
        "print(seen() == thread.ident)\n"
        "_C.end_process()\n"
        "print(seen())\n"
    )
    done = processes.run(DAEMON + watch)
    assert (done.code, done.out, done.err) == (0, "ready\nTrue\n0\n", "")


def test_a_daemon_thread_that_is_waited_for_at_exit(processes: Processes) -> None:
    """By what was registered before this package: it ends, although the process does not."""
    first = "import atexit\natexit.register(lambda: (thread.join(), print('joined')))\n"
    # The package is imported in the process already: its own handler has to come first again.
    order = "import sys; atexit.register(sys.modules['dgls_torch.stream']._detach_all)\n"
    done = processes.run(first + DAEMON + order)
    assert (done.code, done.out) == (0, "ready\njoined\n"), done.err
    # Unless it had all of its weights just then.
    said = done.err.strip()
    assert not said or said.endswith("RuntimeError: dgls: detached in another thread")


def test_what_is_attached_at_exit_is_detached() -> None:
    """Not left to the end of the process, when the driver may be gone."""
    script = (
        "import atexit, torch\n"
        "atexit.register(lambda: print(threads(), [p.is_meta for p in model.parameters()][:2]))\n"
        "import dgls_torch\n"
        "from helpers import SMALL, net, threads\n"
        "model = net()\n"
        "s = dgls_torch.stream(model, 40_000, **SMALL)\n"
        "while not threads(): pass  # it names itself once it runs\n"
        "print(threads())"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("['dgls-copy']\n[] [False, False]\n", "")


def test_a_stream_does_without_dynamo_until_it_is_there(processes: Processes) -> None:
    """It takes seconds to import; what was hooked before is untraced all the same."""
    script = (
        "import sys, torch, warnings, dgls_torch\n"
        "from helpers import SMALL, budgets, inputs, net, same\n"
        "warnings.simplefilter('error', UserWarning)\n"
        "model, x = net(4), inputs()\n"
        "with torch.inference_mode():\n"
        "    expected = model(x)\n"
        "    with dgls_torch.stream(model, budgets(model)[0], **SMALL) as s:\n"
        "        assert same(model(x), expected)\n"
        "        print('torch._dynamo' in sys.modules)\n"
        "        compiled = torch.compile(model, backend='eager')\n"
        "        print(all(same(compiled(x), expected) for _ in range(3)), s.report().passes)\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = processes.run(script)
    assert (done.code, done.out) == (0, "False\nTrue 4\nTrue\n"), done.err


def test_import_is_lean() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import dgls_torch\n"
        "print(torch.cuda.is_initialized(), 'libcuda.so' in open('/proc/self/maps').read())\n"
        "lazy = {'torch._dynamo', 'safetensors', 'matplotlib', 'comfy', 'tqdm', 'diffusers'}\n"
        "print(sorted((set(sys.modules) - before) & lazy))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("False False\n[]\n", "")

"""python -m dgls_torch plan.

Goal: a weight file and a few numbers give a table, a curve, a drawing or JSON; what the one prints
the other reads; everything wrong gets one sentence and the exit status 2, no plan the status 1.
Method: files without data; a process for the ways in, the function itself for the many errors.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from plan_checker import check, problem
from plan_files import flux, linear, merged, shard, unet, write

from dgls_torch.planner import command

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
LINK = ["--h2d", "25GB/s"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "flux.safetensors", flux())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Eleven blocks of 64 KiB, and 32 bytes outside."""
    shapes = {f"blocks.{k}.w": (128, 256) for k in range(11)}
    return write(tmp_path / "small.safetensors", shapes | {"head": (16,)})


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = command.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def good(capsys: Any, *arguments: object) -> str:
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    return out


def bad(capsys: Any, *arguments: object, status: int = 2) -> str:
    found, out, err = run(capsys, *arguments)
    assert found == status
    assert out == ""
    assert err.startswith("dgls_torch plan: ")
    assert len(err.splitlines()) == 1
    return err.removeprefix("dgls_torch plan: ").strip()


def test_a_file_and_a_budget_give_a_plan(model: Path, capsys: Any) -> None:
    out = good(capsys, model, "--vram", "8GiB", *LINK, "--tflops", 150, "--tokens", 4608)
    lines = out.splitlines()
    assert lines[0].startswith("plan for 8.00 GiB: ")
    assert "outside of blocks 24.76 MiB" in lines[1]
    assert "come off the budget first" in lines[1]
    (double,) = [line for line in lines if line.startswith("  double_blocks.0 .. double_blocks.18")]
    assert double.split()[3:6] == ["19", "648.18", "MiB"]
    assert any(line.startswith("  single_blocks.0 .. single_blocks.37 ") for line in lines)
    for said in ("through a buffer of", "predicted pass", "compute ", "25.0 GB/s", "efficiency"):
        assert said in out
    assert "no stall from" in out
    curve = lines[lines.index("the pass against the budget") + 2 :]
    assert len(curve) == 12
    assert curve[-1].split()[2:4] == ["0", "B"]


def test_without_compute_no_efficiency_is_claimed(model: Path, capsys: Any) -> None:
    out = good(capsys, model, "--vram", "8GiB", *LINK, "--no-curve")
    assert "(copies alone: no compute time is known)" in out
    for claimed in ("efficiency", "no stall", "copy bound", "compute bound", "against the budget"):
        assert claimed not in out


def test_advice_is_given_where_it_holds(model: Path, capsys: Any) -> None:
    def advice(*arguments: object) -> str:
        return good(capsys, model, *LINK, "--no-curve", *arguments)

    copies = advice("--vram", "8GiB", "--tflops", 1000)
    assert "copy bound: more memory or a faster link" in copies
    assert "batch the CFG passes" in copies
    balance = advice("--vram", "6.3GiB", "--tflops", 150, "--tokens", 4608)
    assert "near balance: a little more memory would hide the rest" in balance
    compute = advice("--vram", "12GiB", "--tflops", 50)
    assert "compute bound: a faster link or more memory would gain nothing" in compute
    assert "batch" not in compute
    fits = advice("--vram", "24GiB", "--tflops", 50)
    assert "everything fits: nothing is streamed" in fits
    assert "bound:" not in fits
    assert "100.0 % of the bound" in fits


def test_the_smallest_budgets_that_are_named_work(small: Path, capsys: Any) -> None:
    out = good(capsys, small, "--vram", "300k", *LINK, "--tflops", 0.2, "--latency", 0)
    # A budget is named to three digits, so it is taken from the plan's own numbers here.
    inputs = json.loads(good(capsys, small, "--vram", "300k", *LINK, "--print-inputs"))
    assert problem(inputs).budget == 300 * 1024 - 32
    least = max(problem(inputs).sizes) + 32
    assert f"{least / 1024:.2f} KiB would do" in out
    good(capsys, small, "--vram", least, *LINK)
    said = bad(capsys, small, "--vram", least - 1, *LINK, status=1)
    assert said.endswith(f"({least} bytes)")
    assert "'blocks.0' needs 64.00 KiB" in said


def test_outside_of_blocks_alone_may_be_too_much(model: Path, capsys: Any) -> None:
    for option in ([], ["--print-inputs"], ["--json"]):
        said = bad(capsys, model, "--vram", "20MiB", *LINK, *option, status=1)
        assert "outside of the blocks take 24.76 MiB" in said
        assert "smallest budget that works is" in said


def test_json_is_the_planners_own_and_legal(model: Path, capsys: Any) -> None:
    asked = [model, "--vram", "8GiB", *LINK, "--tflops", 150, "--latency", "20us"]
    inputs = json.loads(good(capsys, *asked, "--print-inputs"))
    assert inputs["copy_latency_s"] == pytest.approx(20e-6)
    assert inputs["budget_bytes"] < 8 * GIB
    plan = json.loads(good(capsys, *asked, "--json"))
    assert plan["period_s"] == pytest.approx(check(inputs, plan), rel=1e-6)
    # No plan is an answer too, on the way that answers take.
    status, out, err = run(capsys, model, "--vram", "500MiB", *LINK, "--json")
    assert status == 1
    assert json.loads(out)["infeasible"] is True
    assert "smallest budget that works" in err


def test_inputs_can_be_edited_and_fed_back(model: Path, capsys: Any, tmp_path: Path) -> None:
    asked = [model, "--vram", "8GiB", *LINK, "--tflops", 150]
    plan = good(capsys, *asked, "--json")
    path = tmp_path / "inputs.json"
    path.write_text(good(capsys, *asked, "--print-inputs"))
    assert good(capsys, "--inputs", path, "--json") == plan
    shown = good(capsys, "--inputs", path, "--no-curve")
    assert "block 0 .. block 18" in shown
    assert "block 19 .. block 56" in shown
    changed = json.loads(path.read_text()) | {"h2d_bytes_per_s": 50e9}
    path.write_text(json.dumps(changed))
    faster = good(capsys, "--inputs", path, "--json")
    assert json.loads(faster)["period_s"] < json.loads(plan)["period_s"]
    # Options go before the file.
    budget = str(changed["budget_bytes"])
    back = good(capsys, "--inputs", path, *LINK, "--json", "--vram", budget, "--latency", "10us")
    assert back == plan


def test_residents_prefetch_and_the_optimum(small: Path, capsys: Any) -> None:
    asked = [small, "--vram", "500k", *LINK, "--tflops", 500, "--latency", "1us"]
    plan = json.loads(good(capsys, *asked, "--resident", "0, 2-3", "--prefetch", 1, "--json"))
    assert [k for k, size in enumerate(plan["resident_bytes"]) if size] == [0, 2, 3]
    assert plan["buffer"]["bytes"] <= 2 * 65536
    none = json.loads(good(capsys, *asked, "--resident", "", "--json"))
    assert not any(none["resident_bytes"])
    shown = good(capsys, *asked, "--resident", "", "--prefetch", 0)
    assert "left to itself, the planner would take" in shown
    assert "copy bound: a faster link or more residents shorten the pass" in shown
    # Streamed by order, they are so in any budget, and no budget hides that.
    assert "no stall" not in shown
    assert "over all policies" in good(capsys, *asked, "--verify", "--no-curve")


def test_blocks_can_be_named(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "unet.safetensors", unet())
    asked = [path, "--vram", "10GiB", *LINK, "--no-curve"]
    assert "input_blocks.0 .. output_blocks.11" in good(capsys, *asked)
    out = good(capsys, *asked, "--blocks", "output_blocks,middle_block")
    assert "output_blocks.0 .. output_blocks.11" in out
    assert "middle_block" in out
    assert "input_blocks" not in out
    said = bad(capsys, *asked, "--blocks", "no_blocks")
    assert said == "unet.safetensors: blocks: Checkpoint has no module 'no_blocks'"


def test_layers_are_streamed_one_at_a_time(model: Path, small: Path, capsys: Any) -> None:
    out = good(capsys, model, "--vram", "8GiB", *LINK, "--unit", "layer")
    assert out.splitlines()[0].endswith(" used, 150.80 MiB would do"), "the largest, not a block"
    (largest,) = [line for line in out.splitlines() if "single_blocks.*.linear1 " in line]
    assert largest.split()[1:4] == ["38", "126.04", "MiB"]
    inputs = json.loads(
        good(capsys, model, "--vram", "8GiB", *LINK, "--unit=layer", "--print-inputs")
    )
    assert sum(block.get("count", 1) for block in inputs["blocks"]) == 19 * 10 + 38 * 3
    said = bad(capsys, small, "--vram", "300k", *LINK, "--unit", "layer")
    assert said.startswith('small.safetensors: unit="layer" needs blocks that hold layers')
    asked = [model, "--vram", "8GiB", *LINK, "--no-curve"]
    assert good(capsys, *asked, "--unit", "block") == good(capsys, *asked)


def test_other_models_in_a_checkpoint_are_left_out_aloud(tmp_path: Path, capsys: Any) -> None:
    others = merged(linear(f"text_encoders.t5.block.{k}", 4096, 4096) for k in range(24))
    shapes = flux("model.diffusion_model.", double=2, single=2) | others
    path = write(tmp_path / "all.safetensors", shapes, "F8_E4M3")
    out = good(capsys, path, "--vram", "1GiB", *LINK, "--no-curve")
    assert out.startswith("all.safetensors also holds 384.09 MiB of other models")
    assert "text_encoders.t5" not in out


def test_pieces_and_folders_are_read(tmp_path: Path, capsys: Any) -> None:
    index = shard(tmp_path, flux())
    asked = ["--vram", "8GiB", *LINK, "--no-curve"]
    assert good(capsys, index, *asked) == good(capsys, tmp_path, *asked)


def test_the_curve_is_drawn(small: Path, capsys: Any, tmp_path: Path) -> None:
    asked = [small, "--vram", "300k", *LINK]
    good(capsys, *asked, "--plot", tmp_path / "a.svg", "--no-curve")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    out = good(capsys, *asked, "--tflops", 0.2, "--plot", tmp_path / "a.PNG", "--json")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    assert json.loads(out)["copies"]
    said = bad(capsys, *asked, "--plot", tmp_path / "a.doc")
    assert said.startswith("--plot needs a name that ends in .svg, .png or .pdf, found ")
    assert bad(capsys, *asked, "--plot", tmp_path / "no" / "a.svg").endswith(
        "No such file or directory"
    )


def test_without_matplotlib_the_curve_says_so(
    small: Path, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = bad(capsys, small, "--vram", "300k", *LINK, "--plot", tmp_path / "a.svg")
    assert said == "the curve needs matplotlib; install it with pip install dgls_torch[plot]"


WRONG_OPTIONS = [
    (["--vram", "8 bananas"], "^--vram needs a size such as .* unknown unit 'bananas'"),
    (["--vram", "nan"], "^--vram needs a size"),
    (["--vram", "-1"], "^--vram needs at least 1 B"),
    (["--vram", "auto"], "^--vram needs a size"),
    (["--h2d", "25GB"], "^--h2d needs a rate above 0 such as 25e9 or \"25GB/s\", found '25GB'"),
    (["--h2d", "25Gb/s"], "^--h2d needs a rate .* which is in bits"),
    (["--h2d", "0GB/s"], "^--h2d needs at least 1 B"),
    (["--h2d", "inf"], "^--h2d needs a rate"),
    (["--tflops", "nan"], "^--tflops needs a finite number above 0, found 'nan'"),
    (["--tflops", "0"], "^--tflops needs a finite number above 0"),
    (["--tflops", "many"], "^--tflops needs a finite number above 0, found 'many'"),
    (["--tokens", "5"], "^--tokens needs --tflops"),
    (["--tflops", "5", "--tokens", "0"], "^--tokens needs a whole number of at least 1"),
    (["--tflops", "5", "--tokens", "1.5"], "^--tokens needs a whole number"),
    (["--latency", "10"], None),
    (["--latency", "10 parsecs"], "^--latency needs a time"),
    (["--latency=-1us"], "^--latency needs a time .* found '-1us'"),
    (["--resident", "0,x"], "^--resident needs numbers of blocks such as 0,1,5-9, found '0,x'"),
    (["--resident", "5-3"], "^--resident needs numbers of blocks"),
    (["--resident", "0-999999999"], "^--resident needs numbers of blocks"),
    (["--resident", "11"], "resident"),
    (["--prefetch", "-1"], "^--prefetch needs a whole number of at least 0"),
    (["--compress", "zip"], "^--compress needs off or auto or on, found 'zip'"),
    (["--unit", "tensor"], "^--unit needs block or layer, found 'tensor'"),
    (["--blocks", ""], r"small\.safetensors: blocks\[0\] needs a dotted name|blocks\[0\]"),
]


@pytest.mark.parametrize(("options", "said"), WRONG_OPTIONS)
def test_a_wrong_option_is_one_sentence(
    small: Path, capsys: Any, options: list[str], said: str | None
) -> None:
    asked = [small, "--vram", "300k", *LINK, "--no-curve", *options]
    if said is None:
        good(capsys, *asked)
    else:
        assert re.search(said, bad(capsys, *asked))


def test_what_is_missing_is_named(small: Path, capsys: Any, tmp_path: Path) -> None:
    assert bad(capsys).startswith("a MODEL.safetensors is needed")
    assert bad(capsys, small, "--vram", "1g") == "--h2d is needed, such as --h2d 25GB/s"
    assert bad(capsys, small, *LINK) == "--vram is needed, such as --vram 8GiB"
    gone = tmp_path / "gone.safetensors"
    assert bad(capsys, gone) == "gone.safetensors: No such file or directory"
    assert bad(capsys, "--inputs", gone) == "gone.safetensors: No such file or directory"
    (tmp_path / "empty").mkdir()
    assert "found none" in bad(capsys, tmp_path / "empty")
    assert bad(capsys, "--inputs", gone, small) == "--inputs stands for the model: leave out MODEL"
    said = bad(capsys, "--inputs", gone, "--tflops", 5, "--blocks", "x", "--compress", "on")
    assert said == "--inputs stands for the model: leave out --tflops, --blocks, --compress"


def test_an_unknown_option_is_one_sentence(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--vra", "5"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == "dgls_torch plan: unrecognized arguments: --vra; see --help\n"


def test_files_that_are_none_are_refused(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for content, said in (
        (b"", "needs the 8 bytes of the header's length, found 0 bytes"),
        (b"\x10\0\0\0\0\0\0\0{}", "it is truncated"),
        (b"PK\x03\x04" + b"\x99" * 60, "needs a header of at most"),
        (b"\x02\0\0\0\0\0\0\0{}", "holds no tensors"),
        (b"\x02\0\0\0\0\0\0\0[]", "needs a header that starts with {"),
    ):
        path.write_bytes(content)
        found = bad(capsys, path, "--vram", "1g", *LINK)
        assert found.startswith("model.safetensors ")
        assert said in found
    write(path, linear("only", 64, 64))
    said = bad(capsys, path, "--vram", "1g", *LINK)
    assert said.startswith(
        "model.safetensors holds no repeated blocks: no names such as blocks.0.*"
    )


def test_inputs_that_are_none_are_refused(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "inputs.json"
    block = {"bytes": 1000, "compute_s": 0.5, "count": 4}
    fine = {"blocks": [block], "budget_bytes": 2000, "h2d_bytes_per_s": 1e3, "copy_latency_s": 0}
    path.write_text(json.dumps(fine))
    good(capsys, "--inputs", path)
    no_time = block | {"compute_s": float("nan")}
    for content, said in (
        ("", "inputs.json needs a JSON object"),
        ("[]", "inputs.json needs a JSON object"),
        ('{"blocks": [], "blocks": []}', "a key stands twice"),
        (json.dumps(fine | {"bugdet": 1}), "bugdet"),
        (json.dumps(fine | {"blocks": [no_time]}), "blocks[0].compute_s"),
        (json.dumps(fine | {"blocks": [{"bytes": 5}]}), "blocks[0].compute_s"),
        (json.dumps(fine | {"blocks": 5}), "blocks"),
        (json.dumps(fine | {"budget_bytes": "8GiB"}), "budget_bytes"),
        (json.dumps({k: v for k, v in fine.items() if k != "budget_bytes"}), "budget_bytes"),
    ):
        path.write_text(content)
        assert said in bad(capsys, "--inputs", path), content
        assert said in bad(capsys, "--inputs", path, "--json"), content
    monkeypatch.setattr(command, "_FILE_MOST", 10)
    assert bad(capsys, "--inputs", path) == "inputs.json needs at most 10 bytes, found more"


def test_it_runs_as_a_command(small: Path) -> None:
    # torch then appends its C++ stack to what an op refuses.
    environment = {**os.environ, "TORCH_SHOW_CPP_STACKTRACES": "1"}

    def started(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "dgls_torch", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)

    done = started("plan", small, "--vram", "300k", *LINK, "--tflops", 0.2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "blocks.0 .. blocks.10" in done.stdout
    done = started("plan", small, "--vram", "1k", *LINK)
    assert (done.returncode, done.stdout) == (1, "")
    done = started("plan", small, "--vram", "x", *LINK)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    done = started("plan", small, "--vram", "300k", *LINK, "--resident", "11")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    done = started("plan", "--help")
    assert done.returncode == 0
    assert "--print-inputs" in done.stdout
    assert "  plan " in started("--help").stdout

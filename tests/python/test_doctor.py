"""python -m dgls_torch doctor.

Goal: it asks the right questions, a question that fails is an answer too, and the exit status and
the JSON say what the table says. What it judges is tested in test_diagnosis.py.
Method: a stand-in for the native part, a made-up root folder, and this machine as it is.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dgls_torch import doctor
from dgls_torch.diagnosis import Facts, Finding, diagnose, render
from dgls_torch.doctor import collect, has_nvidia_device
from dgls_torch.memory import DeviceMemory, HostMemory

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
GOOD = Facts(
    dgls_version="0.1.0",
    torch_version="2.11.0",
    python_version="3.12.1",
    system="Linux",
    host=HostMemory(
        physical_bytes=64 * GIB, available_bytes=48 * GIB, system_available_bytes=48 * GIB
    ),
)


class FakeNative:
    """Stands in for torch.ops.dgls, and keeps what it was asked."""

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        self.fails, self.asked = fails, []

    def answer(self, question: tuple[object, ...], answer: object) -> Any:
        self.asked.append(question)
        if question[0] in self.fails:
            raise RuntimeError(f"{question[0]} failed\nException raised from a stack of C++")
        return answer

    def driver_version(self) -> int:
        return self.answer(("driver_version",), 12090)

    def measure_page_lock(self, device: int, most: int) -> int:
        return self.answer(("measure_page_lock", device, most), most // 2)

    def measure_copy(self, device: int, size: int, repeats: int, page_locked: bool) -> float:
        rate = 20e9 if page_locked else 9e9
        return self.answer(("measure_copy", device, size, repeats, page_locked), rate)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 8 GiB with 4 GiB available."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    return tmp_path


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_arena_in_ram_is_measured(root: Path) -> None:
    native = FakeNative()
    facts = collect(native, root)
    assert native.asked == [
        ("driver_version",),
        ("measure_page_lock", -1, GIB),
        ("measure_copy", -1, 2**28, 5, True),
        ("measure_copy", -1, 2**28, 5, False),
    ]
    assert (facts.page_lock_asked_bytes, facts.page_lock_bytes) == (GIB, GIB // 2)
    assert (facts.copy_locked_bytes_per_s, facts.copy_pageable_bytes_per_s) == (20e9, 9e9)
    assert (facts.driver_version, facts.driver_error) == (12090, None)
    assert (facts.gpu_name, facts.gpu_error) == (None, "torch finds none")
    assert facts.torch_version == torch.__version__
    assert facts.host.physical_bytes == 8 * GIB
    assert facts.nvidia_device is False


@pytest.mark.usefixtures("no_gpu")
def test_a_small_machine_is_measured_with_little(root: Path) -> None:
    (root / "proc/meminfo").write_text("MemTotal: 1048576 kB\nMemAvailable: 65536 kB\n")
    native = FakeNative()
    collect(native, root)
    assert native.asked[1:3] == [
        ("measure_page_lock", -1, 2**24),
        ("measure_copy", -1, 2**23, 5, True),
    ]


@pytest.mark.usefixtures("no_gpu")
def test_a_large_machine_is_not_filled(root: Path) -> None:
    (root / "proc/meminfo").write_text("MemTotal: 134217728 kB\nMemAvailable: 134217728 kB\n")
    native = FakeNative()
    collect(native, root)
    assert native.asked[1:3] == [
        ("measure_page_lock", -1, 4 * GIB),
        ("measure_copy", -1, 2**28, 5, True),
    ]


@pytest.mark.usefixtures("no_gpu")
def test_copies_that_fail_only_when_page_locked_are_told(root: Path) -> None:
    class NoPinnedCopies(FakeNative):
        def measure_copy(self, device: int, size: int, repeats: int, page_locked: bool) -> float:
            if page_locked:
                raise RuntimeError("out of page-locked memory")
            return 9e9

    facts = collect(NoPinnedCopies(), root)
    assert (facts.copy_locked_bytes_per_s, facts.copy_pageable_bytes_per_s) == (None, 9e9)
    assert facts.copy_error == "out of page-locked memory"


@pytest.mark.usefixtures("no_gpu")
def test_questions_that_fail_keep_the_first_line_of_the_reason(root: Path) -> None:
    facts = collect(FakeNative(fails=("driver_version", "measure_page_lock", "measure_copy")), root)
    assert (facts.driver_version, facts.driver_error) == (None, "driver_version failed")
    assert (facts.page_lock_bytes, facts.page_lock_error) == (None, "measure_page_lock failed")
    assert (facts.copy_locked_bytes_per_s, facts.copy_error) == (None, "measure_copy failed")
    assert [finding.problem for finding in diagnose(facts)] == [
        "measuring page-locking failed: measure_page_lock failed",
        "measuring copies failed: measure_copy failed",
    ]


def test_a_gpu_is_asked_and_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = DeviceMemory(total_bytes=12 * GIB, driver_free_bytes=10 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    monkeypatch.setattr(doctor, "device_memory", lambda device: {"cuda:2": memory}[device])
    native = FakeNative()
    facts = collect(native, root)
    assert {question[1] for question in native.asked[1:]} == {2}
    assert facts.gpu_name == "card 2"
    assert (facts.vram_free_bytes, facts.vram_total_bytes) == (10 * GIB, 12 * GIB)
    assert facts.gpu_error is None


def test_a_gpu_that_does_not_answer_is_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", fails)
    facts = collect(FakeNative(), root)
    assert facts.gpu_name is None
    assert facts.gpu_error == "CUDA error: uncorrectable ECC error encountered"


def test_torchs_warning_is_the_reason(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warns() -> bool:
        warnings.warn("CUDA initialization: the driver is too old\nmore", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warns)
    assert collect(FakeNative(), root).gpu_error == "CUDA initialization: the driver is too old"


@pytest.mark.usefixtures("no_gpu")
def test_without_the_native_part_the_rest_is_still_told(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise ImportError("dgls_torch/_C.abi3.so: undefined symbol: aoti_torch_x")

    monkeypatch.setattr(doctor, "_load_native", fails)
    facts = collect(root=root)
    assert facts.native_error == "dgls_torch/_C.abi3.so: undefined symbol: aoti_torch_x"
    assert (facts.page_lock_bytes, facts.copy_locked_bytes_per_s) == (None, None)
    shown = render(facts, diagnose(facts))
    assert f"driver      none: {facts.native_error}" in shown
    assert f"page-lock   not measured: {facts.native_error}" in shown
    assert "RAM         4.00 GiB available of 8.00 GiB" in shown
    assert "did not load" in shown


def test_nvidia_devices_are_seen_without_a_driver(tmp_path: Path) -> None:
    assert not has_nvidia_device(tmp_path)
    devices = tmp_path / "sys/bus/pci/devices"
    for name, vendor, kind in (
        ("0000:00:01.0", "0x8086", "0x030000"),
        ("0000:01:00.1", "0x10de", "0x040300"),  # The sound of a card whose GPU is passed away.
    ):
        (devices / name).mkdir(parents=True)
        (devices / name / "vendor").write_text(f"{vendor}\n")
        (devices / name / "class").write_text(f"{kind}\n")
    (devices / "0000:00:02.0").mkdir()
    assert not has_nvidia_device(tmp_path)
    (devices / "0000:01:00.1/class").write_text("0x030200\n")
    assert has_nvidia_device(tmp_path)


@pytest.mark.parametrize("name", ["dev/nvidia0", "dev/nvidia12", "usr/lib/wsl/lib/libcuda.so.1"])
def test_nvidia_device_files_are_seen(tmp_path: Path, name: str) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert not has_nvidia_device(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    assert has_nvidia_device(tmp_path)


def test_the_status_is_0_when_nothing_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "collect", lambda: GOOD)
    assert doctor.main([]) == 0
    assert capsys.readouterr().out == render(GOOD, []) + "\n"
    broken = dataclasses.replace(GOOD, torch_version="2.5.0")
    monkeypatch.setattr(doctor, "collect", lambda: broken)
    assert doctor.main([]) == 1
    assert "2.5.0" in capsys.readouterr().out


def test_json_holds_the_same_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = dataclasses.replace(GOOD, torch_version="2.9.0", copy_locked_bytes_per_s=1e9)
    monkeypatch.setattr(doctor, "collect", lambda: facts)
    assert doctor.main(["--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    host = HostMemory(**printed["facts"].pop("host"))
    assert Facts(**printed["facts"], host=host) == facts
    assert [Finding(**finding) for finding in printed["findings"]] == diagnose(facts)


def test_an_unknown_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        doctor.main(["--jsno"])
    assert left.value.code == 2
    assert "python -m dgls_torch doctor" in capsys.readouterr().err


def test_this_machine_can_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    status = doctor.main(["--json"])
    printed = json.loads(capsys.readouterr().out)
    assert status == (1 if printed["findings"] else 0)
    assert printed["facts"]["torch_version"] == torch.__version__
    assert printed["facts"]["host"]["physical_bytes"] > 0
    if printed["facts"]["native_error"] is None:
        assert printed["facts"]["copy_pageable_bytes_per_s"] > 0
    else:
        assert "did not load" in printed["findings"][0]["problem"]

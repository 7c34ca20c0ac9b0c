"""Cgroup limits, as they bind the host's memory.

Goal: the tightest limit on the way from the process's cgroup to the root counts, in each of the
layouts that containers make: v1, v2 or both, with a namespace or without, partly mounted.
Method: made-up ``/proc`` and ``/sys`` trees, and a seeded loop against a plain minimum.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from dgls_torch.memory import host_memory

if TYPE_CHECKING:
    from pathlib import Path

MIB, GIB = 2**20, 2**30
V1_NO_LIMIT = 9223372036854771712


def put(root: Path, name: str, text: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def machine(root: Path) -> Path:
    """Writes a machine of 64 GiB with 48 GiB available, and no cgroups."""
    put(root, "proc/meminfo", "MemTotal:  67108864 kB\nMemAvailable:  50331648 kB")
    put(root, "proc/self/cgroup", "")
    put(root, "proc/self/mountinfo", "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw")
    return root


def cgroup(root: Path, version: int, path: str, mounted: str = "/", at: str = "") -> None:
    """Puts the process in a cgroup and mounts the tree of cgroups."""
    if version == 2:
        line, kind = f"0::{path}", "cgroup2 cgroup2 rw"
        at = at or "/sys/fs/cgroup"
    else:
        line, kind = f"4:memory:{path}", "cgroup cgroup rw,memory"
        at = at or "/sys/fs/cgroup/memory"
    for name, text in (
        ("cgroup", f"1:cpu,cpuacct:/elsewhere\n{line}"),
        ("mountinfo", f"36 31 0:33 {mounted} {at} rw,nosuid shared:9 master:2 - {kind}"),
    ):
        file = root / "proc/self" / name
        put(root, f"proc/self/{name}", f"{file.read_text().strip()}\n{text}".strip())


def level2(root: Path, folder: str, limit: object, used: int, high: object = "max") -> None:
    folder = f"sys/fs/cgroup/{folder}"
    put(root, f"{folder}/memory.max", limit)
    put(root, f"{folder}/memory.high", high)
    put(root, f"{folder}/memory.current", used)


def level1(root: Path, folder: str, limit: int, used: int) -> None:
    folder = f"sys/fs/cgroup/memory/{folder}"
    put(root, f"{folder}/memory.limit_in_bytes", limit)
    put(root, f"{folder}/memory.usage_in_bytes", used)


@pytest.mark.parametrize("version", [1, 2])
def test_the_own_cgroup_of_the_process_counts(tmp_path: Path, version: int) -> None:
    root = machine(tmp_path)
    cgroup(root, version, "/user/job")
    level = level2 if version == 2 else level1
    level(root, "user/job", 16 * GIB, 6 * GIB)
    level(root, "user", 32 * GIB, 7 * GIB)
    level(root, "other", GIB, GIB)
    host = host_memory(root)
    assert host.cgroup_limit_bytes == 16 * GIB
    assert host.cgroup_used_bytes == 6 * GIB
    assert host.cgroup_available_bytes == host.available_bytes == 10 * GIB
    assert host.system_available_bytes == 48 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_further_up_counts(tmp_path: Path, version: int) -> None:
    root = machine(tmp_path)
    cgroup(root, version, "/pod/container/init")
    level = level2 if version == 2 else level1
    level(root, "pod", 8 * GIB, 5 * GIB)
    level(root, "pod/container/init", "max" if version == 2 else V1_NO_LIMIT, GIB)
    host = host_memory(root)
    assert (host.cgroup_limit_bytes, host.available_bytes) == (8 * GIB, 3 * GIB)


def test_a_full_cgroup_above_leaves_less_than_the_tighter_one_below(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, 2, "/pod/container")
    level2(root, "pod", 32 * GIB, 31 * GIB)
    level2(root, "pod/container", 16 * GIB, 2 * GIB)
    host = host_memory(root)
    assert (host.cgroup_limit_bytes, host.cgroup_used_bytes) == (16 * GIB, 2 * GIB)
    assert host.cgroup_available_bytes == host.available_bytes == GIB


def test_memory_high_is_a_limit_too(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, 2, "/job")
    level2(root, "job", 16 * GIB, 2 * GIB, high=12 * GIB)
    assert host_memory(root).cgroup_limit_bytes == 12 * GIB
    level2(root, "job", "max", 2 * GIB, high=12 * GIB)
    assert host_memory(root).available_bytes == 10 * GIB


def test_page_cache_is_not_use(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, 2, "/job")
    level2(root, "job", 16 * GIB, 15 * GIB)
    stat = f"anon {3 * GIB}\ninactive_file {7 * GIB}\nactive_file {5 * GIB}\nshmem 0"
    put(root, "sys/fs/cgroup/job/memory.stat", stat)
    host = host_memory(root)
    assert (host.cgroup_used_bytes, host.available_bytes) == (3 * GIB, 13 * GIB)


def test_page_cache_of_v1_is_that_of_the_whole_subtree(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, 1, "/job")
    level1(root, "job", 16 * GIB, 15 * GIB)
    stat = f"inactive_file 4096\ntotal_inactive_file {7 * GIB}\ntotal_active_file {5 * GIB}"
    put(root, "sys/fs/cgroup/memory/job/memory.stat", stat)
    assert host_memory(root).cgroup_used_bytes == 3 * GIB


def test_a_cgroup_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, 2, "/job")
    level2(root, "job", GIB, 2 * GIB)
    assert host_memory(root).available_bytes == 0


@pytest.mark.parametrize("version", [1, 2])
def test_no_limit_is_none(tmp_path: Path, version: int) -> None:
    root = machine(tmp_path)
    cgroup(root, version, "/job")
    if version == 2:
        level2(root, "job", "max", GIB)
    else:
        level1(root, "job", V1_NO_LIMIT, GIB)
        level1(root, "", V1_NO_LIMIT, GIB)
    host = host_memory(root)
    assert host.cgroup_limit_bytes is host.cgroup_used_bytes is host.cgroup_available_bytes is None
    assert host.available_bytes == 48 * GIB


def test_both_versions_at_once_both_count(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, 1, "/job")
    cgroup(root, 2, "/slice", at="/sys/fs/cgroup/unified")
    level1(root, "job", 16 * GIB, GIB)
    assert host_memory(root).available_bytes == 15 * GIB
    level2(root, "unified/slice", 4 * GIB, GIB)
    assert host_memory(root).available_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("path", "mounted"),
    [
        ("/docker/abc", "/docker/abc"),  # A container that shares the host's cgroup namespace.
        ("/", "/"),  # One with its own.
        ("/../../other", "/"),  # A process that was moved out of it.
        ("/docker/abcdef", "/docker/abc"),  # Another subtree is mounted than the process is in.
        ("/gone/away", "/"),  # A cgroup that is not visible here.
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_in_a_container_the_mounted_cgroup_counts(
    tmp_path: Path, version: int, path: str, mounted: str
) -> None:
    root = machine(tmp_path)
    cgroup(root, version, path, mounted)
    (level2 if version == 2 else level1)(root, "", 4 * GIB, GIB)
    put(root, "sys/other/memory.max", MIB)
    assert host_memory(root).available_bytes == 3 * GIB


def test_a_nested_cgroup_below_the_mounted_one_counts(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, 2, "/docker/abc/worker", mounted="/docker/abc")
    level2(root, "worker", 2 * GIB, GIB)
    level2(root, "docker/abc/worker", MIB, 0)
    assert host_memory(root).cgroup_limit_bytes == 2 * GIB


def test_a_mount_point_with_a_space_is_found(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, 2, "/", at="/mnt/c\\040g")
    put(root, "mnt/c g/memory.max", 4 * GIB)
    put(root, "mnt/c g/memory.current", 0)
    assert host_memory(root).cgroup_limit_bytes == 4 * GIB


def test_unreadable_cgroup_files_set_no_limit(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, 2, "/job")
    level2(root, "job", "garbage", GIB)
    assert host_memory(root).cgroup_limit_bytes is None


def test_lines_that_make_no_sense_are_passed_over(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, 2, "/job")
    level2(root, "job", 2 * GIB, GIB)
    for name, lines in (
        ("mountinfo", ["nonsense", " - ", "36 31 0:33 / - cgroup2 c rw", "1 2 3 / /x rw - cgroup"]),
        ("cgroup", ["", "7", "8:memory"]),
    ):
        file = root / "proc/self" / name
        put(root, f"proc/self/{name}", "\n".join([*lines, file.read_text()]))
    assert host_memory(root).cgroup_limit_bytes == 2 * GIB


def test_mounts_of_other_controllers_do_not_count(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, 1, "/job")
    mounts = root / "proc/self/mountinfo"
    other = "33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"
    put(root, "proc/self/mountinfo", mounts.read_text() + other)
    level1(root, "../cpu/job", GIB, 0)
    assert host_memory(root).cgroup_limit_bytes is None


def test_random_chains_of_cgroups_leave_what_the_tightest_leaves(tmp_path: Path) -> None:
    random_ = random.Random(1)
    for case in range(60):
        root = machine(tmp_path / str(case))
        names = [f"c{depth}" for depth in range(random_.randrange(1, 6))]
        cgroup(root, 2, "/" + "/".join(names))
        levels = []
        for depth in range(len(names) + 1):
            limit = random_.choice(["max", random_.randrange(1, 128) * GIB])
            used = random_.randrange(0, 40) * GIB
            level2(root, "/".join(names[:depth]), limit, used)
            if limit != "max":
                levels.append((limit, used))
        host = host_memory(root)
        assert host.cgroup_limit_bytes == min((limit for limit, _ in levels), default=None)
        left = min((max(0, limit - used) for limit, used in levels), default=48 * GIB)
        assert host.available_bytes == min(48 * GIB, left)

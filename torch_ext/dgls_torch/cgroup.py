"""Decides which cgroup limits bind this process, under cgroup v1, v2 and both at once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# cgroup v1 says "no limit" with the largest multiple of a page that fits 63 bits.
_NO_LIMIT = 2**60
_FILE_PAGES = ("inactive_file", "active_file")
# By file system: the files of the limits, of the use, and the prefix of sums over child groups.
# Above memory.high the kernel does not kill, it stalls the process to a crawl: a limit as well.
_FILES = {
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
    "cgroup2": (("memory.max", "memory.high"), "memory.current", ""),
}


def memory_levels(root: Path) -> Iterator[tuple[int, int]]:
    """Yields (limit, used) of each limited cgroup from the process's own up to its mount."""
    paths = {}
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            paths["cgroup"] = path
        elif number == "0" and not controllers:
            paths["cgroup2"] = path
    for kind, source, target in _mounts(root):
        if kind not in paths:
            continue
        top = root / target.lstrip("/")
        folder = top / _below(paths[kind], source)
        while True:
            level = _level(folder, kind)
            if level is not None:
                yield level
            if folder == top:
                break
            folder = folder.parent


def _mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (kind, cgroup that is mounted, where) of each mount that can limit memory."""
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        fields, (kind, *options) = mount.split(" "), system.split(" ")
        if len(fields) < 5 or not options:
            continue
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options[-1].split(",")):
            yield kind, _unescaped(fields[3]), _unescaped(fields[4])


def _below(path: str, mounted: str) -> str:
    """Returns the process's cgroup relative to the cgroup that is mounted, ``""`` if it is not.

    Without a cgroup namespace a container sees its path from the host's root, but only its own
    cgroup mounted; a process moved out of its namespace sees a path that starts with ``..``.
    """
    mounted = mounted.rstrip("/")
    if not f"{path}/".startswith(f"{mounted}/"):
        return ""
    below = path[len(mounted) :].strip("/")
    return "" if ".." in below.split("/") else below


def _level(folder: Path, kind: str) -> tuple[int, int] | None:
    limit_files, usage_file, prefix = _FILES[kind]
    limits = [read_number(read_text(folder / name)) for name in limit_files]
    limit = min((number for number in limits if number is not None), default=None)
    used = read_number(read_text(folder / usage_file))
    if limit is None or used is None:
        return None
    lines = (line.partition(" ") for line in read_text(folder / "memory.stat").splitlines())
    stat = {name: size for name, _, size in lines}
    # Page cache is charged to the cgroup, but the kernel drops it before it kills anyone.
    cache = sum(read_number(stat.get(prefix + name)) or 0 for name in _FILE_PAGES)
    return limit, max(0, used - cache)


def read_number(text: str | None) -> int | None:
    """Reads a limit in bytes; a word (``max``, ``unlimited``) or a huge number is none."""
    text = (text or "").strip()
    number = int(text) if text.isascii() and text.isdigit() else _NO_LIMIT
    return number if number < _NO_LIMIT else None


def read_text(path: Path) -> str:
    """Reads a file of the kernel; one that cannot be read is empty.

    Old kernels and sandboxes hide files, and what cannot be read sets no limit we could know of.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)

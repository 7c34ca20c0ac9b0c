"""Decides whether a built extension module loads everywhere: what it exports, needs and how new.

`check_symbols.py _C.abi3.so` prints one line and exits 0, or one sentence a fault and exits 1.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

EXPORTS = {"PyInit__C"}  # anything else could collide with another library in the process
NEWEST = {  # what Ubuntu 22.04 has: every machine that torch 2.10 and newer are used on has more
    "GLIBC": (2, 34),
    "GLIBCXX": (3, 4, 30),
    "CXXABI": (1, 3, 13),
    "GCC": (12, 0, 0),
}
# No libpython (the limited API needs none), no libcuda and no libtorch_cuda: found at run time.
LIBRARIES = re.compile(
    r"(libtorch|libtorch_cpu|libc10)\.so"
    r"|(libstdc\+\+|libgcc_s|libc|libm|libdl|libpthread|librt|ld-linux-[\w-]+)\.so\.\d+"
)


def tool(*command: str) -> list[str]:
    """Run a binutils command and return the lines it prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def exports(module: str) -> set[str]:
    """List the symbols that other libraries can see."""
    lines = tool("nm", "-D", "--defined-only", "--format=posix", module)
    return {line.split()[0].split("@")[0] for line in lines if line}


def newest_versions(module: str) -> dict[str, tuple[int, ...]]:
    """Find the newest version of each versioned library that a symbol asks for."""
    newest: dict[str, tuple[int, ...]] = {}
    for line in tool("nm", "-D", "--undefined-only", "--with-symbol-versions", module):
        found = re.search(r"@([A-Z]+)_(\d+(?:\.\d+)+)", line)
        if found:
            version = tuple(int(part) for part in found[2].split("."))
            newest[found[1]] = max(newest.get(found[1], ()), version)
    return newest


def libraries(module: str) -> list[str]:
    """List the libraries that the loader has to find."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", "\n".join(tool("readelf", "-d", module)))


def dotted(version: tuple[int, ...]) -> str:
    """Write a version as people do."""
    return ".".join(map(str, version))


def faults(module: str) -> Iterator[str]:
    """Name everything that would keep the module from loading somewhere."""
    shown = exports(module)
    if too_many := sorted(shown - EXPORTS):
        yield f"exports {len(too_many)} symbols too many, the first being {too_many[0]}"
    if lacking := sorted(EXPORTS - shown):
        yield f"does not export {', '.join(lacking)}"
    for family, version in newest_versions(module).items():
        limit = NEWEST.get(family)
        if limit is None:
            yield f"asks for symbols of {family}_{dotted(version)}, a family that is not allowed"
        elif version > limit:
            yield f"asks for {family}_{dotted(version)}, newer than {family}_{dotted(limit)}"
    for library in libraries(module):
        if not LIBRARIES.fullmatch(library):
            yield f"needs {library}, which not every machine has"


def main(module: str) -> int:
    """Print the verdict on one module."""
    found = [f"{module} {fault}." for fault in faults(module)]
    if found:
        sys.stderr.write("\n".join(found) + "\n")
        return 1
    versions = ", ".join(f"{k} {dotted(v)}" for k, v in sorted(newest_versions(module).items()))
    sys.stdout.write(f"{module}: exports {', '.join(EXPORTS)} only; newest symbols {versions}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

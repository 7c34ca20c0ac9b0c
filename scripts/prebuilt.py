"""Decides what is in a prebuilt bundle: the Rust core and its headers, for machines without cargo.

Writes dist/prebuilt-<triple>.tar.gz; setup.py takes the unpacked bundle through
DGLS_PREBUILT_STATICLIB and DGLS_PREBUILT_INCLUDE.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from rust_core import VERSION_FILE, Core, build, find_cargo, package_version

ROOT = Path(__file__).resolve().parents[1]
HOW_TO = """dgls_torch {version}: the Rust core, built for {triple}.

To build the wheel of the same version with a C++ compiler but without cargo, in its source folder:

    export DGLS_PREBUILT_STATICLIB=<this folder>/lib/{library}
    export DGLS_PREBUILT_INCLUDE=<this folder>/include
    python -m pip install .
"""


def host_triple() -> str:
    """Ask the compiler for what machine it builds."""
    rustc = os.environ.get("RUSTC") or str(Path(find_cargo()).with_name("rustc"))
    said = subprocess.run([rustc, "-vV"], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.search(r"^host: (\S+)$", said, re.MULTILINE)
    if found is None:
        raise SystemExit(f"error: {rustc} -vV names no host triple; is it rustc?")
    return found[1]


def fill(folder: Path, core: Core, triple: str) -> None:
    """Lay out the bundle in a folder."""
    version = package_version(ROOT)
    (folder / "lib").mkdir(parents=True)
    library = shutil.copy(core.staticlib, folder / "lib")
    if strip := shutil.which("strip"):
        subprocess.run([strip, "--strip-debug", library], check=True)
    # cxx makes links to the headers, also to one in cargo's registry: take what they point at
    for header in core.include.rglob("*.h"):
        target = folder / "include" / header.relative_to(core.include)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(header, target)
    (folder / "include" / VERSION_FILE).write_text(f"{version}\n", encoding="utf-8")
    how_to = HOW_TO.format(version=version, triple=triple, library=Path(library).name)
    (folder / "README.txt").write_text(how_to, encoding="utf-8")
    for licence in ROOT.glob("LICENSE-*"):
        shutil.copy(licence, folder)


def main() -> None:
    """Build the core and pack it."""
    triple = host_triple()
    core = build(ROOT)
    bundle = ROOT / "dist" / f"prebuilt-{triple}.tar.gz"
    bundle.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / f"prebuilt-{triple}"
        fill(folder, core, triple)
        with tarfile.open(bundle, "w:gz") as archive:
            archive.add(folder, folder.name)
    size = bundle.stat().st_size / 2**20
    sys.stdout.write(f"{bundle.relative_to(ROOT)}: {size:.1f} MiB\n")


if __name__ == "__main__":
    main()

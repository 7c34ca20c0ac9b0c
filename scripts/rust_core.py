"""Decides where the Rust core comes from: built by cargo here, or taken ready-made from a bundle.

setup.py links what this finds; `make prebuilt` (scripts/prebuilt.py) packs it. The environment:

    CARGO                     the cargo to run (else the one on PATH, else ~/.cargo/bin)
    CARGO_TARGET_DIR          where cargo builds, as everywhere in cargo
    DGLS_PROFILE              cargo profile, default release
    DGLS_OFFLINE              1: cargo may not use the network
    DGLS_PREBUILT_STATICLIB   path of a ready static library: cargo is not needed then
    DGLS_PREBUILT_INCLUDE     folder of the C++ headers that belong to it
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

CRATE = "dgls_core"
VERSION_FILE = "DGLS_VERSION"
OLDEST_RUST = (1, 85)


@dataclass(frozen=True)
class Core:
    """The built Rust core: one static library and the headers that cxx generated with it."""

    staticlib: Path
    include: Path


def fail(sentence: str) -> NoReturn:
    """End the build with one sentence: what was needed, what was found, the remedy."""
    raise SystemExit(f"error: dgls_torch {sentence}.")


def is_release() -> bool:
    """Tell whether cargo builds for release, which is also when symbols are stripped."""
    return profile() == "release"


def profile() -> str:
    """Name the cargo profile to build with."""
    return os.environ.get("DGLS_PROFILE") or "release"


def package_version(root: Path) -> str:
    """Read the product's version from its one place, [package] in Cargo.toml."""
    text = (root / "Cargo.toml").read_text(encoding="utf-8")
    section = re.search(r"^\[package\]$(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    found = re.search(r'^version\s*=\s*"([^"]+)"', section.group(1) if section else "", re.M)
    if found is None:
        fail("needs a version in [package] of Cargo.toml and found none; restore that line")
    return found.group(1)


def build_or_find(root: Path) -> Core:
    """Take the prebuilt core when the environment names one, else build it with cargo."""
    staticlib = os.environ.get("DGLS_PREBUILT_STATICLIB")
    include = os.environ.get("DGLS_PREBUILT_INCLUDE")
    if not staticlib and not include:
        return build(root)
    if not staticlib or not include:
        fail(
            "needs DGLS_PREBUILT_STATICLIB and DGLS_PREBUILT_INCLUDE together and found only one "
            "of them; set both, or neither to build with cargo"
        )
    return prebuilt(Core(Path(staticlib).resolve(), Path(include).resolve()), package_version(root))


def prebuilt(core: Core, version: str) -> Core:
    """Check that a prebuilt core is whole and belongs to these sources."""
    header = core.include / "dgls" / "src" / "bridge.rs.h"
    for needed in (core.staticlib, header):
        if not needed.is_file():
            fail(
                f"needs the file {needed} of the prebuilt core and found none there; point "
                "DGLS_PREBUILT_STATICLIB and DGLS_PREBUILT_INCLUDE at an unpacked prebuilt bundle"
            )
    stamp = core.include / VERSION_FILE
    found = stamp.read_text(encoding="utf-8").strip() if stamp.is_file() else version
    if found != version:
        fail(
            f"{version} needs the prebuilt core of the same version and found {found}; take the "
            f"bundle of {version}, or unset DGLS_PREBUILT_STATICLIB and build with cargo"
        )
    return core


def build(root: Path) -> Core:
    """Run cargo and read from its messages where the library and the headers lie."""
    cargo = find_cargo()
    command = [cargo, "build", "--package", CRATE, "--lib", "--profile", profile()]
    command.append("--message-format=json-render-diagnostics")
    if (root / "Cargo.lock").exists():
        command.append("--locked")
    if os.environ.get("DGLS_OFFLINE", "0") not in ("", "0"):
        command.append("--offline")
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        require_rust(cargo)
        fail(
            f"needs `cargo build` to succeed and it ended with status {done.returncode}; its own "
            "messages stand above and say what to mend"
        )
    return core_of_messages(done.stdout)


def core_of_messages(messages: str) -> Core:
    """Pick the static library and the header folder out of cargo's JSON lines."""
    parsed = [json.loads(line) for line in messages.splitlines() if line.startswith("{")]
    library = package = None
    for message in parsed:
        if message["reason"] != "compiler-artifact" or message["target"]["name"] != CRATE:
            continue
        for name in message["filenames"]:
            if name.endswith((".a", ".lib")):
                library, package = Path(name), message["package_id"]
    for message in parsed:
        if message["reason"] == "build-script-executed" and message["package_id"] == package:
            include = Path(message["out_dir"]) / "cxxbridge" / "include"
            if library is not None and include.is_dir():
                return Core(library, include)
    fail(
        "needs a static library and cxx headers from `cargo build` and found none in its messages; "
        "check crate-type in Cargo.toml and the bridge in build.rs"
    )


def find_cargo() -> str:
    """Find cargo, also where rustup puts it before a new shell has it on PATH."""
    home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
    # shutil.which takes a path as well as a name and knows .exe
    if given := os.environ.get("CARGO"):
        found, places = shutil.which(given), f"at CARGO={given}"
    else:
        found = shutil.which("cargo") or shutil.which("cargo", path=str(home / "bin"))
        places = f"on PATH or in {home / 'bin'}"
    if found is None:
        fail(
            f"needs cargo (Rust >= 1.86) to build its core and found none {places}; install Rust "
            "with rustup, or set DGLS_PREBUILT_STATICLIB and DGLS_PREBUILT_INCLUDE to a prebuilt "
            "bundle, or install a ready wheel"
        )
    return found


def require_rust(cargo: str) -> None:
    """Fail with the version when this cargo is too old for the crate's edition."""
    said = subprocess.run([cargo, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"(\d+)\.(\d+)", said)
    if version and (int(version[1]), int(version[2])) < OLDEST_RUST:
        fail(f"needs Rust >= 1.86 and found {said.strip()} ({cargo}); update it with rustup update")


if __name__ == "__main__":
    core = build_or_find(Path(__file__).resolve().parents[1])
    sys.stdout.write(f"{core.staticlib}\n{core.include}\n")

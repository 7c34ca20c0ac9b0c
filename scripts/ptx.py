"""Decides how the GPU's code is compiled: decode.ptx of decode.cu, in src/driver/cuda/kernels.

`ptx.py` writes the PTX anew; `ptx.py --check` exits 1 with one sentence if that would change it.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.metadata
import re
import sys
from importlib.util import find_spec
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "src" / "driver" / "cuda" / "kernels"
SOURCE = KERNELS / "decode.cu"
PTX = KERNELS / "decode.ptx"

# Another release would write other text of the same source.
PACKAGE = "nvidia-cuda-nvrtc-cu11"
RELEASE = "11.8.89"
OPTIONS = ["--gpu-architecture=compute_70", "--std=c++17"]

# What the text says it needs, and what it does need: PTX 7.0 is read by drivers from CUDA 11.0 on.
WRITTEN_VERSION = ".version 7.8"
VERSION = ".version 7.0"
TARGET = ".target sm_70"


def library() -> Path:
    """Find NVRTC in the wheel of the one release that may be used."""
    try:
        has_release = importlib.metadata.version(PACKAGE) == RELEASE
    except importlib.metadata.PackageNotFoundError:
        has_release = False
    found = find_spec("nvidia.cuda_nvrtc") if has_release else None
    for folder in (found.submodule_search_locations if found else None) or ():
        for path in sorted(Path(folder).glob("lib/libnvrtc.so.*")):
            return path
    raise SystemExit(
        f"error: {SOURCE.name} is compiled by NVRTC {RELEASE}, which is not here: "
        f"python -m pip install {PACKAGE}=={RELEASE}"
    )


class Compiler:
    """NVRTC's functions, each of which returns 0 or an error's number."""

    def __init__(self, path: Path) -> None:
        """Load the library."""
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            message = self._library.nvrtcGetErrorString(code).decode()
            raise SystemExit(f"error: {name}: {message}")

    def _text(self, kind: str, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{kind}", program, text)
        return text.value.decode()

    def compile(self, source: bytes, name: str) -> str:
        """Return the PTX of a source."""
        program = ctypes.c_void_p()
        self._call(
            *("nvrtcCreateProgram", ctypes.byref(program), source, name.encode()),
            *(0, None, None),
        )
        options = (ctypes.c_char_p * len(OPTIONS))(*map(str.encode, OPTIONS))
        code = self._library.nvrtcCompileProgram(program, len(options), options)
        if log := self._text("ProgramLog", program).strip("\0\n "):
            sys.stderr.write(f"{log}\n")
        if code != 0:
            raise SystemExit(f"error: {name} does not compile; what NVRTC says is above")
        return self._text("PTX", program)


def tidy(ptx: str, source: bytes) -> str:
    """Lower the version, drop comments and empty lines, say which source it is of."""
    if WRITTEN_VERSION not in ptx or TARGET not in ptx:
        raise SystemExit(f"error: NVRTC did not write {WRITTEN_VERSION} and {TARGET}")
    lines = (re.sub(r"\s*//.*", "", line).rstrip() for line in ptx.splitlines())
    text = "\n".join(line for line in lines if line)
    head = f"// sha256 of {SOURCE.name}: {hashlib.sha256(source).hexdigest()}"
    return f"{head}\n{text.replace(WRITTEN_VERSION, VERSION)}\n"


def main() -> None:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    is_check = parser.parse_args().check
    source = SOURCE.read_bytes()
    text = tidy(Compiler(library()).compile(source, SOURCE.name), source)
    if not is_check:
        PTX.write_text(text, encoding="utf-8")
    elif not PTX.exists() or PTX.read_text(encoding="utf-8") != text:
        raise SystemExit(
            f"error: {PTX.name} is not what {SOURCE.name} compiles to; python scripts/ptx.py "
            "writes it anew."
        )
    sys.stdout.write(f"{PTX.name}: {'is what' if is_check else 'of'} {SOURCE.name}\n")


if __name__ == "__main__":
    main()

"""Decides how the wheel is built: cargo makes the Rust core, setuptools compiles and links csrc/.

One wheel serves every Python >= 3.10 and torch >= 2.10: the extension module uses the limited C API
and libtorch's stable ABI only. torch is located, never imported and never a requirement: pip would
replace a user's CUDA build. What scripts/rust_core.py reads from the environment, and here:

    DGLS_TORCH_DIR   folder of the torch package whose headers to compile against
    CXX, CXXFLAGS    the C++17 compiler and more flags for it, as for every setuptools extension
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))  # build back ends do not put the source tree on the path

from rust_core import build_or_find, fail, is_release, package_version  # noqa: E402

NEEDED_SETUPTOOLS = 77  # the first one that reads the licence expression in pyproject.toml
if int(setuptools.__version__.split(".")[0]) < NEEDED_SETUPTOOLS:
    fail(
        f"needs setuptools >= {NEEDED_SETUPTOOLS} and found {setuptools.__version__}; upgrade it "
        f'with "{sys.executable}" -m pip install -U setuptools, or leave out --no-build-isolation'
    )

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.errors import CCompilerError, ExecError  # noqa: E402

OLDEST_TORCH = (2, 10)
MACROS = [
    ("Py_LIMITED_API", "0x030A0000"),  # Python 3.10
    ("TORCH_TARGET_VERSION", "0x020A000000000000"),  # torch 2.10: newer symbols fail to compile
    ("USE_CUDA", "1"),  # declares the stable ABI's CUDA functions; links nothing of CUDA
]


@dataclass(frozen=True)
class Flags:
    """What one compiler family has to be told."""

    compile: list[str]
    link: list[str]
    libraries: list[str] = field(default_factory=lambda: ["torch_cpu", "torch", "c10"])


def gnu_flags(torch_include: Path) -> Flags:
    """Flags for g++ and clang++ on Linux: nothing but PyInit__C is exported."""
    link = [
        "-Wl,--exclude-libs,ALL",
        "-Wl,--gc-sections",
        f"-Wl,--version-script={ROOT / 'scripts' / 'exports.map'}",
    ]
    if is_release():
        link.append("-Wl,-s")
    compile_ = ["-std=c++17", "-O2", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    # torch's headers come in as system headers: their warnings are not ours to mend
    return Flags([*compile_, "-Wall", "-Wextra", "-isystem", str(torch_include)], link)


def msvc_flags(torch_include: Path) -> Flags:
    """Flags for MSVC, written from its manual and NOT YET RUN on a Windows machine."""
    compile_ = ["/std:c++17", "/O2", "/W4", "/EHsc", "/Zc:preprocessor", "/Zc:__cplusplus"]
    system_libraries = ["ntdll.lib", "userenv.lib", "ws2_32.lib", "bcrypt.lib"]  # of Rust's std
    return Flags([*compile_, "/external:W0", "/external:I", str(torch_include)], system_libraries)


def platform_flags(torch_include: Path) -> Flags:
    """Pick the flags of this platform's compiler."""
    if sys.platform == "win32":
        return msvc_flags(torch_include)
    if sys.platform.startswith("linux"):
        return gnu_flags(torch_include)
    fail(f"builds on Linux and Windows only and found {sys.platform}; use one of the two")


def torch_candidates() -> list[Path]:
    """List the folders that may hold the torch package, most certain first."""
    if given := os.environ.get("DGLS_TORCH_DIR"):
        return [Path(given)]
    found: list[Path] = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        found.append(Path(spec.origin).parent)
    # pip's build isolation hides site-packages from sys.path; sysconfig still names them
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    folders.append(site.getusersitepackages())
    found += [Path(folder) / "torch" for folder in folders]
    # other front ends build in a fresh environment; the one the user is in has the headers
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            found += sorted(Path(prefix).glob("lib/python3.*/site-packages/torch"))
            found.append(Path(prefix) / "Lib" / "site-packages" / "torch")
    return found


def torch_version(torch: Path) -> str | None:
    """Read the version of the torch package in this folder; None when there is none."""
    version_file = torch / "version.py"
    if not version_file.is_file():
        return None
    found = re.search(r"__version__ = '([^']+)'", version_file.read_text(encoding="utf-8"))
    return found.group(1) if found else None


def torch_dir() -> Path:
    """Find a torch whose headers have the stable ABI of 2.10, without importing it."""
    remedy = (
        f'install it into this Python with "{sys.executable}" -m pip install torch, or set '
        "DGLS_TORCH_DIR to the folder of a torch package that is there"
    )
    too_old = None
    for candidate in torch_candidates():
        version = torch_version(candidate)
        if version is None:
            continue
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= OLDEST_TORCH:
            return candidate
        too_old = too_old or f"torch {version} in {candidate}"
    given = os.environ.get("DGLS_TORCH_DIR")
    found = too_old or (f"no torch in DGLS_TORCH_DIR={given}" if given else "none")
    fail(f"needs the headers of PyTorch >= 2.10 to compile against and found {found}; {remedy}")


def sources_in(folder: str, pattern: str) -> list[str]:
    """List the files of a source folder, relative to the root as sdist wants them."""
    found = (path for path in (ROOT / folder).glob(pattern) if path.is_file())
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


class BuildExtension(build_ext):
    """Builds the Rust core first, then the C++ extension that links it in."""

    def build_extensions(self) -> None:
        """Complete each extension with what is only known now, then compile it."""
        torch = torch_dir()
        self.require_compiler()
        core = build_or_find(ROOT)
        flags = platform_flags(torch / "include")
        for extension in self.extensions:
            extension.define_macros += MACROS
            extension.include_dirs += [str(core.include), str(ROOT / "csrc")]
            extension.extra_compile_args += flags.compile
            extension.extra_objects.append(str(core.staticlib))
            extension.library_dirs.append(str(torch / "lib"))
            extension.libraries += flags.libraries
            extension.extra_link_args += flags.link
            extension.depends += [str(core.staticlib), *sources_in("csrc", "**/*")]
        super().build_extensions()

    def require_compiler(self) -> None:
        """Compile three lines of C++17 with Python.h: a missing tool is named before the wait."""
        program = "#include <Python.h>\n#include <optional>\nstd::optional<int> dgls_probe{1};\n"
        standard = "/std:c++17" if sys.platform == "win32" else "-std=c++17"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(program, encoding="utf-8")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[standard])
            except (CCompilerError, ExecError) as error:
                fail(
                    "needs a C++17 compiler and the headers of this Python and found that three "
                    f"lines of C++ do not compile ({error}); install both (Debian and Ubuntu: "
                    "apt-get install g++ python3-dev), or install a ready wheel"
                )


setup(
    version=package_version(ROOT),
    ext_modules=[
        Extension(
            "dgls_torch._C",
            sources_in("csrc", "*.cpp"),  # the C files deeper down are cargo's, see build.rs
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": bdist_wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)

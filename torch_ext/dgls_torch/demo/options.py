"""The command line of the demo: what may be asked for, and one sentence for what may not."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from ..units import parse_budget
from .sample import MODELS, SIZES

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "dgls_torch demo"
_DEFAULT_STEPS = {"cpu": 3, "cuda": 4}
_DEFAULT_SIZE = {"cpu": "small", "cuda": "medium"}


class BadOption(Exception):
    """An option that cannot be followed; the message is the sentence to show."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run, all defaults filled in."""

    models: tuple[str, ...]
    size: str
    vram: int | str | None
    """Bytes, ``"auto"``, or None for a quarter of the block weights."""
    steps: int
    weights_dir: Path
    out_dir: Path
    device: torch.device
    seed: int


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadOption(f"{message}; --help lists the options")


def parse_options(argv: Sequence[str]) -> Options:
    """Reads the command line and makes the two folders.

    Raises:
        BadOption: An option is unknown, malformed or cannot be followed here.
        SystemExit: ``--help`` was asked for; the text has been printed.
    """
    given = _parser().parse_args(argv)
    device = _device(given.device)
    return Options(
        models=_models(given.model),
        size=_DEFAULT_SIZE[device.type] if given.size == "auto" else given.size,
        vram=None if given.vram is None else _vram(given.vram),
        steps=_DEFAULT_STEPS[device.type] if given.steps is None else _at_least(given.steps, 1),
        weights_dir=_folder(given.dir, "--dir"),
        out_dir=_folder(given.out, "--out"),
        device=device,
        seed=given.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python -m {PROGRAM}",
        description="Runs two diffusion transformers of real shape with random weights, once "
        "fully resident and once streamed within a budget smaller than the weights, and checks "
        "that the outputs are the same bit for bit.",
        epilog="Exit status: 0 if all outputs compared are identical, 1 if one differs or a run "
        "fails, 2 if an option cannot be followed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default=",".join(MODELS), metavar="NAMES", help="models, default %(default)s")
    add(
        "--size",
        choices=("auto", *SIZES),
        default="auto",
        help="width of the models, depth is always the real one: tiny (40 to 70 MiB a model), "
        "small (1 to 1.4 GiB), medium (5.5 GiB), full (22 to 27 GiB, the real sizes); "
        "auto is small on the CPU and medium on CUDA",
    )
    add("--vram", metavar="SIZE", help="budget such as 8GiB, or auto; default a quarter of the "
        "block weights")  # fmt: skip
    add("--steps", type=int, metavar="N", help="Euler steps, default 3 on the CPU and 4 on CUDA")
    add(
        "--dir",
        type=Path,
        default=_default_dir(),
        help="folder where the weight files are kept and found again, default %(default)s",
    )
    add("--out", type=Path, default=Path(), help="folder for the timelines, default the current")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the noise and the text, default 0")
    return parser


def _default_dir() -> Path:
    # Not the temporary folder: on many systems that is RAM, and the weights must not live there.
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "dgls_torch" / "demo"


def _models(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in MODELS:
            raise BadOption(f"--model needs some of {', '.join(MODELS)}, found {name!r}")
    return names


def _vram(text: str) -> int | str:
    try:
        size = parse_budget(text, "--vram")
    except ValueError as error:
        raise BadOption(str(error)) from error
    return "auto" if size is None else size


def _at_least(steps: int, least: int) -> int:
    if steps < least:
        raise BadOption(f"--steps needs at least {least}, found {steps}")
    return steps


def _folder(path: Path, option: str) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadOption(f"{option} needs a folder, found {path}: {error.strerror}") from error
    return path


def _device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise BadOption("--device cuda needs a CUDA device, but torch finds none")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")

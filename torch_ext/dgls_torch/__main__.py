"""The command line: ``python -m dgls_torch demo|plan|doctor|bench``."""

from __future__ import annotations

import sys
from importlib import import_module

_COMMANDS = {
    "demo": ("dgls_torch.demo.run", "run FLUX- and WAN-shaped transformers under a budget"),
    "plan": ("dgls_torch.planner.command", "say what a budget would give, of a weight file"),
    "doctor": ("dgls_torch.doctor", "say what this machine can do and what is wrong"),
    "bench": ("dgls_torch.bench", "measure what streaming costs for each block"),
}


def main(argv: list[str]) -> int:
    """Runs a command; returns its exit status, 2 for an unknown one."""
    if argv and argv[0] in _COMMANDS:
        return int(import_module(_COMMANDS[argv[0]][0]).main(argv[1:]))
    asked_for_help = argv[:1] in (["-h"], ["--help"])
    out = sys.stdout if asked_for_help else sys.stderr
    if argv and not asked_for_help:
        print(f"dgls_torch: there is no command '{argv[0]}'", file=out)
    print("usage: python -m dgls_torch COMMAND [options]", file=out)
    for name, (_, text) in _COMMANDS.items():
        print(f"  {name:8}{text}", file=out)
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

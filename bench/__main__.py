"""The entry: ``python -m bench run|compare|page|show``, and ``worker`` and ``reference``.

``run`` starts these two.
"""

from __future__ import annotations

import sys


def main(argv: list[str]) -> int:
    """Runs a command; imports nothing for ``worker`` that an engine has to come before."""
    if argv[:1] == ["worker"]:
        from bench import worker

        return worker.main(argv[1:])
    if argv[:1] == ["reference"]:
        from bench import reference

        return reference.main(argv[1:])
    from bench import commands

    return commands.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Puts the top folder on the path, so that tests find ``bench``, which is no part of the wheel.

Goal: tests of the measurement import it as its users run it.
Method: the folder above tests/ goes to the end of the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def put_on_path() -> None:
    """Does nothing twice."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))

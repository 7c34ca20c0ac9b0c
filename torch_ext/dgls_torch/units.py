"""Decides how sizes, rates and times are read from people and shown to them."""

from __future__ import annotations

import math
import numbers
import re
from decimal import MAX_EMAX, MIN_EMIN, ROUND_FLOOR, Context, Decimal

#: The largest size the native side can hold: it counts bytes in signed 64-bit integers.
MAX_BYTES = 2**63 - 1

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

# Two letters are decimal and an "i" makes them binary, as the standards have it. One letter alone
# is binary, as everywhere a size is typed with one letter (Docker, the JVM, dd).
_UNITS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "t": TIB,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_KNOWN_UNITS = "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, k, m, g, t"
_TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
_NUMBER = r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*"
_SIZE = re.compile(_NUMBER + r"([A-Za-z]*)\s*")
_RATE = re.compile(_NUMBER + r"(?:([A-Za-z]+)\s*/\s*s)?\s*")
_TIME = re.compile(_NUMBER + r"([A-Za-zµμ]*)\s*")

# No traps: what overflows becomes Infinity and is refused by the range check, and a hostile
# exponent never becomes an integer of that many digits.
_EXACT = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN, rounding=ROUND_FLOOR, traps=[])


def parse_bytes(value: object, what: str, *, least: int = 1) -> int:
    """Reads a size; a part of a byte is dropped.

    Args:
        value: A number of bytes, or text: a number and an optional unit in any case, with or
            without a space. ``KiB MiB GiB TiB`` and the single letters ``k m g t`` are powers of
            1024, ``kB MB GB TB`` powers of 1000, ``B`` or no unit bytes.
        what: The name of the field the value is for; every message starts with it.
        least: The smallest size allowed, in bytes.

    Returns:
        The size in bytes, from ``least`` to 2**63 - 1.

    Raises:
        ValueError: The value is no size: a bool, NaN, less than ``least``, more than 2**63 - 1
            bytes, or text that is empty, no number or of an unknown unit.
        TypeError: The value is neither a number nor text.
    """
    # bool first: True is an int, and a budget of 1 byte is never what was meant.
    if isinstance(value, bool):
        raise ValueError(_needed(what, f"the bool {value}"))
    if isinstance(value, str):
        return _checked(_from_text(value, what), value, what, least)
    if isinstance(value, numbers.Integral):
        return _checked(_EXACT.create_decimal(int(value)), value, what, least)
    if isinstance(value, numbers.Real):
        try:
            count = _EXACT.create_decimal_from_float(float(value))
        except OverflowError:  # A fraction larger than any float.
            count = Decimal("Infinity")
        return _checked(count, value, what, least)
    raise TypeError(_needed(what, f"{_shown(value)} of type {type(value).__name__}"))


def parse_budget(value: object, what: str, *, least: int = 1) -> int | None:
    """Reads a size, or ``"auto"`` as ``None``: the caller then chooses.

    Raises:
        ValueError: As `parse_bytes`.
        TypeError: As `parse_bytes`.
    """
    if isinstance(value, str) and value.strip().lower() == "auto":
        return None
    return parse_bytes(value, what, least=least)


def parse_rate(value: object, what: str) -> float:
    """Reads a rate of copies in bytes per second, above 0 and finite.

    Args:
        value: A number of bytes per second, or text: a size as `parse_bytes` takes it, and ``/s``
            after its unit. The B of a unit is large: a link's ``Gb/s`` are bits.
        what: The name of the field the value is for; every message starts with it.

    Raises:
        ValueError: The value is no such rate.
        TypeError: The value is neither a number nor text.
    """
    needed = 'a rate above 0 such as 25e9 or "25GB/s"'
    if isinstance(value, str):
        match = _RATE.fullmatch(value)
        if match is None:
            raise ValueError(f"{what} needs {needed}, found {_shown(value)}")
        number, unit = match[1], match[2] or ""
        if unit.endswith("b"):
            raise ValueError(f"{what} needs {needed}, found {_shown(value)}, which is in bits")
        return float(parse_bytes(f"{number}{unit}", what))
    return _number(value, what, needed, above=0.0)


def parse_seconds(value: object, what: str) -> float:
    """Reads a duration in seconds, at least 0 and finite.

    Args:
        value: A number of seconds, or text: a number and ``s``, ``ms``, ``us`` or ``ns``.
        what: The name of the field the value is for; every message starts with it.

    Raises:
        ValueError: The value is no such duration.
        TypeError: The value is neither a number nor text.
    """
    needed = 'a time of at least 0 such as 0.5, "10us" or "2 ms"'
    if isinstance(value, str):
        match = _TIME.fullmatch(value)
        scale = _TIMES.get(match[2].lower()) if match is not None else None
        if match is None or scale is None:
            raise ValueError(f"{what} needs {needed}, found {_shown(value)}")
        return _number(float(match[1]) * scale, what, needed, found=value)
    return _number(value, what, needed)


def format_bytes(count: float) -> str:
    """Shows a number of bytes in binary units with two decimals, as in ``1.50 GiB``."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"), 2)


def format_rate(bytes_per_s: float) -> str:
    """Shows a rate in decimal units with one decimal, as links are sold: ``25.0 GB/s``."""
    return _scaled(bytes_per_s, 1000, ("B/s", "kB/s", "MB/s", "GB/s", "TB/s"), 1)


def format_seconds(seconds: float) -> str:
    """Shows a duration with about three digits: ``45.6 us``, ``1.23 s``, ``2 min 05 s``."""
    if not math.isfinite(seconds):
        return f"{seconds} s"
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    # 59.995 would be shown as "60.00 s", so it already counts as a minute.
    if seconds >= 59.995:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
    if seconds == 0:
        return "0 s"
    for unit, scale in (("ns", 1e9), ("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{_three_digits(seconds * scale)} {unit}"
    return f"{_three_digits(seconds)} s"


def _number(
    value: object, what: str, needed: str, *, above: float | None = None, found: object = None
) -> float:
    """A finite number of at least 0, or more than ``above``."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{what} needs {needed}, found {_shown(value)} of {type(value).__name__}")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except OverflowError:  # An integer or a fraction larger than any float.
        number = math.inf
    if not math.isfinite(number) or number < 0 or (above is not None and number <= above):
        raise ValueError(
            f"{what} needs {needed}, found {_shown(value if found is None else found)}"
        )
    return number


def _from_text(text: str, what: str) -> Decimal:
    found = _shown(text)
    if not text.strip():
        raise ValueError(_needed(what, "empty text"))
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(_needed(what, found))
    number, unit = match.groups()
    scale = _UNITS.get(unit.lower())
    if scale is None:
        unknown = _shown(unit)
        raise ValueError(_needed(what, f"{found} with the unknown unit {unknown}", _KNOWN_UNITS))
    return _EXACT.multiply(_EXACT.create_decimal(number), Decimal(scale))


def _checked(count: Decimal, value: object, what: str, least: int) -> int:
    if count.is_nan():
        raise ValueError(_needed(what, _shown(value)))
    if count < least:
        raise ValueError(f"{what} needs at least {format_bytes(least)}, found {_shown(value)}")
    # Compared before it becomes an int, which is therefore always of a few digits.
    if count >= MAX_BYTES + 1:
        raise ValueError(f"{what} needs at most 2**63 - 1 bytes, found {_shown(value)}")
    return int(count)


def _needed(what: str, found: str, units: str | None = None) -> str:
    known = f"; the known units are {units}" if units else ""
    return f'{what} needs a size such as 8e9, "8GiB" or "512 MB", found {found}{known}'


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits.
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _scaled(value: float, base: int, units: tuple[str, ...], digits: int) -> str:
    if not math.isfinite(value):
        return f"{value} {units[0]}"
    if value < 0:
        return f"-{_scaled(-value, base, units, digits)}"
    if round(value) < base:
        return f"{round(value)} {units[0]}"
    scaled = float(value)
    for unit in units[1:]:
        scaled /= base
        # Compared as shown: 1023.999 KiB must become 1.00 MiB and never 1024.00 KiB.
        if round(scaled, digits) < base:
            return f"{scaled:.{digits}f} {unit}"
    return f"{scaled:.{digits}f} {units[-1]}"


def _three_digits(value: float) -> str:
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"

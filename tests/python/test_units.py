"""Sizes, rates and times as text.

Goal: every size a person can mean is read exactly, everything else is refused with a sentence.
Method: tables of both, and seeded loops that compare with exact fractions.
"""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from dgls_torch.units import (
    MAX_BYTES,
    format_bytes,
    format_rate,
    format_seconds,
    parse_budget,
    parse_bytes,
    parse_rate,
    parse_seconds,
)

SCALES = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        (8_000_000_000, 8_000_000_000),
        (8e9, 8_000_000_000),
        (1.9, 1),
        (MAX_BYTES, MAX_BYTES),
        (Fraction(7, 2), 3),
        ("8GiB", 8 * 2**30),
        ("8 GB", 8 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5g", 3 * 2**29),
        ("  2 tib ", 2 * 2**40),
        ("10", 10),
        ("10 b", 10),
        ("8e9", 8 * 10**9),
        ("1E3 kB", 10**6),
        ("+4k", 4096),
        (".5 GiB", 2**29),
        ("5. MB", 5 * 10**6),
        ("0.1 kB", 100),
        ("1.0009765625 KiB", 1025),
        (str(MAX_BYTES), MAX_BYTES),
        ("9223372036854775807.999", MAX_BYTES),
    ],
)
def test_sizes_are_read(value: object, expected: int) -> None:
    found = parse_bytes(value, "vram")
    assert found == expected
    assert type(found) is int


def test_numbers_of_numpy_are_sizes() -> None:
    numpy = pytest.importorskip("numpy")
    assert parse_bytes(numpy.int32(7), "vram") == 7
    assert parse_bytes(numpy.float32(2.5e9), "vram") == 2_500_000_000


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (True, "the bool True"),
        (False, "the bool False"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (0, "0"),
        (0.0, "0.0"),
        (0.999, "0.999"),
        (-1, "-1"),
        (-1e-300, "-1e-300"),
        (2**63, str(2**63)),
        (2.0**63, "9.22"),
        (1e308, "1e+308"),
        (Fraction(10**400), "Fraction"),
        ("", "empty text"),
        ("  \t", "empty text"),
        ("0", "'0'"),
        ("0 GiB", "'0 GiB'"),
        ("-0", "'-0'"),
        ("-5 GB", "'-5 GB'"),
        ("0.4 B", "'0.4 B'"),
        ("1e-5", "'1e-5'"),
        ("GiB", "'GiB'"),
        ("8 GiB free", "'8 GiB free'"),
        ("8,5 GB", "'8,5 GB'"),
        ("1_000", "'1_000'"),
        ("0x10", "'0x10'"),
        ("nan", "'nan'"),
        ("inf", "'inf'"),
        ("auto", "'auto'"),
        ("٣ GB", "'٣ GB'"),
        ("8 G B", "'8 G B'"),
        ("1.2.3", "'1.2.3'"),
        ("8388608 TiB", "'8388608 TiB'"),
        ("1e400", "'1e400'"),
        ("1e999999999999999999999 TiB", "'1e999999999999999999999 TiB'"),
        ("1e-999999999999999999999", "'1e-999999999999999999999'"),
    ],
)
def test_what_is_no_size_is_refused(value: object, found: str) -> None:
    with pytest.raises(ValueError, match=r"^vram needs ") as refused:
        parse_bytes(value, "vram")
    assert found in str(refused.value).partition(", found ")[2]


@pytest.mark.parametrize("unit", ["GiBs", "PB", "Gbit", "x", "e", "kiB7"])
def test_unknown_units_are_listed(unit: str) -> None:
    with pytest.raises(ValueError, match="pinned needs") as refused:
        parse_bytes(f"8 {unit}", "pinned")
    if unit.isalpha():
        assert f"unknown unit '{unit}'" in str(refused.value)
        assert "KiB, MiB, GiB, TiB" in str(refused.value)


@pytest.mark.parametrize("value", [None, [], (8,), b"8GiB", {"vram": 8}, 8j, object])
def test_other_types_are_type_errors(value: object) -> None:
    with pytest.raises(TypeError, match=rf"^vram needs .* {type(value).__name__}$"):
        parse_bytes(value, "vram")


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(ValueError, match=r"at most .* found a number of thousands of digits"):
        parse_bytes(10**5000, "vram")  # Python itself refuses to print it.
    with pytest.raises(ValueError, match="found") as refused:
        parse_bytes("9" * 100_000 + " parsecs", "vram")
    assert len(str(refused.value)) < 300


def test_the_least_size_moves_the_lower_end() -> None:
    assert parse_bytes(0, "pinned", least=0) == 0
    assert parse_bytes("0 MiB", "pinned", least=0) == 0
    with pytest.raises(ValueError, match=r"needs at least 0 B, found -1"):
        parse_bytes(-1, "pinned", least=0)
    assert parse_bytes(4096, "staging", least=4096) == 4096
    with pytest.raises(ValueError, match=r"staging needs at least 4\.00 KiB, found 4095"):
        parse_bytes(4095, "staging", least=4096)


def test_a_budget_may_be_auto() -> None:
    for value in ("auto", "AUTO", " Auto "):
        assert parse_budget(value, "vram") is None
    assert parse_budget("8GiB", "vram") == 8 * 2**30
    assert parse_budget(0, "pinned", least=0) == 0
    with pytest.raises(ValueError, match=r"^vram needs"):
        parse_budget("automatic", "vram")
    with pytest.raises(TypeError, match=r"^vram needs"):
        parse_budget(None, "vram")


def test_any_number_and_unit_is_read_exactly() -> None:
    random_ = random.Random(1)
    for _ in range(5000):
        unit, scale = random_.choice(list(SCALES.items()))
        digits = random_.randrange(0, 12)
        number = f"{random_.randrange(1, 10**6)}"
        if digits:
            number += f".{random_.randrange(10**digits):0{digits}d}"
        spelled = random_.choice([unit, unit.lower(), unit.upper()])
        text = f"{number}{random_.choice(['', ' ', '  '])}{spelled}"
        assert parse_bytes(text, "size") == math.floor(Fraction(number) * scale), text


def test_every_integer_survives_the_way_through_text() -> None:
    random_ = random.Random(2)
    for _ in range(5000):
        count = random_.randrange(1, 2 ** random_.randrange(1, 64))
        assert parse_bytes(str(count), "size") == count
        assert parse_bytes(count, "size") == count


def test_what_is_shown_is_read_back_to_half_of_its_last_digit() -> None:
    random_ = random.Random(3)
    edges = [
        base**power + step
        for base in (2**10, 10**3)
        for power in (1, 2, 3, 4)
        for step in (-2, -1, 0, 1, 2)
    ]
    for count in edges + [random_.randrange(1, 2 ** random_.randrange(1, 63)) for _ in range(5000)]:
        shown = format_bytes(count)
        scale = SCALES[shown.split(" ")[1]]
        assert abs(parse_bytes(shown, "size") - count) <= scale * 0.005 + 1, shown
        number = float(shown.split(" ")[0])
        assert 1 <= number < 1024 or scale == 2**40, shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536 * 2**20, "1.50 GiB"),
        (2**20 - 1, "1.00 MiB"),
        (2**40 - 1, "1.00 TiB"),
        (2**60, "1048576.00 TiB"),
        (-1536, "-1.50 KiB"),
    ],
)
def test_bytes_are_shown(count: int, shown: str) -> None:
    assert format_bytes(count) == shown


@pytest.mark.parametrize(
    ("rate", "shown"),
    [
        (25e9, "25.0 GB/s"),
        (0, "0 B/s"),
        (999.4, "999 B/s"),
        (999.9, "1.0 kB/s"),
        (999_960_000, "1.0 GB/s"),
        (3.35e12, "3.4 TB/s"),
        (math.inf, "inf B/s"),
        (math.nan, "nan B/s"),
    ],
)
def test_rates_are_shown(rate: float, shown: str) -> None:
    assert format_rate(rate) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (5e-9, "5.00 ns"),
        (45.6e-6, "45.6 us"),
        (999.4e-6, "999 us"),
        (999.6e-6, "1.00 ms"),
        (0.1234, "123 ms"),
        (1.234, "1.23 s"),
        (9.996, "10.0 s"),
        (59.94, "59.9 s"),
        (59.996, "1 min 00 s"),
        (125.4, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7384, "2 h 03 min"),
        (-1.5, "-1.50 s"),
        (math.inf, "inf s"),
    ],
)
def test_seconds_are_shown(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


def test_seconds_keep_two_digits_at_any_scale() -> None:
    random_ = random.Random(4)
    scales = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
    for _ in range(5000):
        seconds = 10 ** random_.uniform(-9, 1.77)
        number, unit = format_seconds(seconds).split(" ")
        assert float(number) * scales[unit] == pytest.approx(seconds, rel=0.0051)
        assert float(number) < 1000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (25e9, 25e9),
        (1, 1.0),
        ("25GB/s", 25e9),
        ("25 GiB / s", 25 * 2**30),
        ("12.5gB/s", 12.5e9),
        ("500m/s", 500 * 2**20),
        (" 25e9 ", 25e9),
    ],
)
def test_rates_are_read(value: object, expected: float) -> None:
    assert parse_rate(value, "link") == expected


NO_RATES = ["25GB", "25Gb/s", "25 b/s", "", "GB/s", "25GB/h", "-1GB/s", "nan", "0GB/s"]


@pytest.mark.parametrize("value", [*NO_RATES, 0, -1.0, math.inf, math.nan, True, 10**400])
def test_what_is_no_rate_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^link needs "):
        parse_rate(value, "link")


def test_what_is_wrong_with_a_rate_is_said() -> None:
    with pytest.raises(ValueError, match="found '25Gb/s', which is in bits"):
        parse_rate("25Gb/s", "link")
    with pytest.raises(ValueError, match="unknown unit 'XB'"):
        parse_rate("25XB/s", "link")
    with pytest.raises(TypeError, match=r"^link needs a rate .* found None of NoneType"):
        parse_rate(None, "link")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0.0),
        (0.25, 0.25),
        (Fraction(1, 4), 0.25),
        ("10us", 10e-6),
        ("10 \u00b5s", 10e-6),
        ("10\u03bcs", 10e-6),
        ("2.5 MS", 2.5e-3),
        ("1e3 ns", 1e-6),
        (" 3 s ", 3.0),
        ("3", 3.0),
    ],
)
def test_seconds_are_read(value: object, expected: float) -> None:
    assert parse_seconds(value, "pause") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "value",
    [-1, "-1us", math.inf, math.nan, True, 10**400, "", "us", "10 parsecs", "1e999s", "1,5s"],
)
def test_what_is_no_time_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^pause needs a time of at least 0 .* found "):
        parse_seconds(value, "pause")
    with pytest.raises(TypeError, match=r"^pause needs a time .* found None of NoneType"):
        parse_seconds(None, "pause")

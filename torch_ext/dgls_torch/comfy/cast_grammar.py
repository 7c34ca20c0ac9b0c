"""Reads the cast inputs: names of number formats, and `cast_target`'s pairs of them."""

from __future__ import annotations

import torch

#: 4-bit formats are no dtypes of torch: they are named.
FP4, NF4 = "fp4", "nf4"
Format = torch.dtype | str

_NAMES: dict[str, tuple[str, ...]] = {
    "float32": ("f32", "fp32", "float", "float32"),
    "float16": ("f16", "fp16", "half", "float16"),
    "bfloat16": ("bf16", "bfloat16"),
    "float8_e4m3fn": (
        *("f8_e4m3", "f8e4m3", "e4m3", "fp8_e4m3", "fp8_e4m3fn"),
        *("float8_e4m3", "float8_e4m3fn"),
    ),
    "float8_e5m2": ("f8_e5m2", "f8e5m2", "e5m2", "fp8_e5m2", "float8_e5m2"),
}
_BY_ALIAS: dict[str, Format] = {
    alias: getattr(torch, name) for name, aliases in _NAMES.items() for alias in aliases
}
_BY_ALIAS |= {FP4: FP4, NF4: NF4}
_ALLOWED = "f32, f16, bf16, f8_e4m3, f8_e5m2, nf4, fp4 and their long names"
_FORM = '"FROM TO", or several such pairs with commas between, as in "bf16 f16, f32 bf16"'


def parse_format(name: str) -> Format:
    """Reads one format by any of its names.

    Raises:
        KeyError: There is no such format.
    """
    return _BY_ALIAS[name.strip().lower().removeprefix("torch.")]


def parse_cast_target(text: str) -> tuple[tuple[torch.dtype, Format], ...]:
    """Reads ``cast_target``: pairs of what a weight is and what it becomes; the first match counts.

    Raises:
        ValueError: The message names the input, its value, the bad token and what is allowed.
    """
    pairs: list[tuple[torch.dtype, Format]] = []
    for part in text.split(","):
        tokens = part.split()
        if not tokens:
            continue
        if len(tokens) != 2:
            raise ValueError(
                f"cast_target is {text!r}, and {part.strip()!r} has {len(tokens)} words; allowed "
                f"is {_FORM}"
            )
        source, target = (_token(token, text) for token in tokens)
        if isinstance(source, str):
            raise ValueError(
                f"cast_target is {text!r}: {tokens[0]!r} can only be cast to, not from; allowed "
                f"is {_FORM}"
            )
        pairs.append((source, target))
    return tuple(pairs)


def _token(token: str, text: str) -> Format:
    try:
        return parse_format(token)
    except KeyError as error:
        raise ValueError(
            f"cast_target is {text!r}, and {token!r} is no number format; allowed are {_ALLOWED}"
        ) from error


def short_name(kind: Format) -> str:
    """A format for people."""
    return kind if isinstance(kind, str) else str(kind).removeprefix("torch.")

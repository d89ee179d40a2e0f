"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?)?b?", re.IGNORECASE)
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_size(text: str) -> int:
    """Bytes from `1048576`, `512MiB`, `4GiB` (powers of 1024) or `4GB` (powers of 1000).

    Raises ValueError for anything else."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write bytes, 512MiB or 4GiB")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    exponent = "kmgt".index(prefix.lower()) + 1 if prefix else 0
    return int(float(number) * base**exponent) if exponent else int(float(number))


def format_size(num_bytes: int) -> str:
    """`102.5 GiB`: in the largest unit that leaves at least one of it."""
    value, unit = float(num_bytes), 0
    while abs(value) >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{num_bytes} B" if unit == 0 else f"{value:.1f} {UNITS[unit]}"

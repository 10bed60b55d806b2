"""Sizes as they are typed: `1,2,4`, `128:2048:128`, `2^0..2^6`. Scripts reach this through `common.cli`."""

import re
from collections.abc import Sequence

from common.errors import UserError

MAX_SWEEP_POINTS = 10_000
MAX_SWEEP_VALUE = 2**40

_INTEGER = re.compile(r"(?:2\^([0-9]{1,3})|([0-9]{1,20}))\Z")


def parse_sweep(text: str) -> list[int]:
    """Sizes, strictly ascending: `1,2,4`, `128:2048:128` (the end included), `2^0..2^6` (every power of two).

    Items may be mixed with commas (`1,2^3,16:64:16`). Raises UserError when it is empty, not ascending, has more than
    10,000 points or a value outside 1..2^40.
    """
    values: list[int] = []
    for item in text.split(","):
        values += _sweep_item(item.strip(), text)
        if len(values) > MAX_SWEEP_POINTS:
            raise UserError(f"sweep {shown(text)}: more than {MAX_SWEEP_POINTS:,} points")
    for before, after in zip(values, values[1:]):
        if after <= before:
            raise UserError(f"sweep {shown(text)}: {after} comes after {before}; give ascending sizes, each once")
    return values


def _sweep_item(item: str, text: str) -> Sequence[int]:
    if not item:
        raise UserError(f"sweep {shown(text)}: an empty item; write 1,2,4 or 128:2048:128 or 2^0..2^6")
    if ".." in item:
        first, _, last = item.partition("..")
        low, high = _size(first, text), _size(last, text)
        if low & (low - 1) or high & (high - 1):
            raise UserError(f"sweep {shown(text)}: both ends of .. must be powers of two, as in 2^0..2^6")
        values: Sequence[int] = [1 << e for e in range(low.bit_length() - 1, high.bit_length())]
    elif ":" in item:
        parts = item.split(":")
        if len(parts) != 3:
            raise UserError(f"sweep {shown(text)}: a range is START:STOP:STEP, as in 128:2048:128")
        start, stop, step = (_size(part, text) for part in parts)
        values = range(start, stop + 1, step)  # not expanded before its length is checked
    else:
        values = [_size(item, text)]
    if not values:
        raise UserError(f"sweep {shown(text)}: {shown(item)} is descending; give ascending sizes")
    if len(values) > MAX_SWEEP_POINTS:
        raise UserError(f"sweep {shown(text)}: more than {MAX_SWEEP_POINTS:,} points")
    return values


def _size(item: str, text: str) -> int:
    match = _INTEGER.match(item.strip())
    if not match:
        raise UserError(f"sweep {shown(text)}: {shown(item)} is not a positive whole number or a power 2^N")
    value = 1 << int(match[1]) if match[1] else int(match[2])
    if not 1 <= value <= MAX_SWEEP_VALUE:
        raise UserError(f"sweep {shown(text)}: {shown(item)} is outside 1..2^40")
    return value


def shown(text: str) -> str:
    """User text for an error line: quoted, and cut when it is long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")

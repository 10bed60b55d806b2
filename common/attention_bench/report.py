"""What the rows of an attention benchmark say: who is fastest where, by how much, and what could not be measured.

Works on rows as the CSV holds them; imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.plots import size_label

Row = Mapping[str, Any]


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows that hold a time."""
    return [row for row in rows if row["status"] == "ok"]


def series(rows: Sequence[Row], x: str, backend: str) -> list[Row]:
    """One backend's measured rows, ascending in x."""
    return sorted((row for row in measured(rows) if row["backend"] == backend), key=lambda row: row[x])


def winners(rows: Sequence[Row], x: str, y: str) -> list[tuple[Row, Row | None]]:
    """(fastest row, next row or None) at every x of one configuration, ascending in x. A suspect row wins nothing."""
    found, trusted = [], [row for row in measured(rows) if not row["suspect"]]
    for value in sorted({row[x] for row in trusted}):
        ranked = sorted((row for row in trusted if row[x] == value), key=lambda row: -row[y])
        found.append((ranked[0], ranked[1] if len(ranked) > 1 else None))
    return found


def crossovers(rows: Sequence[Row], x: str, y: str) -> list[tuple[float, float, str, str]]:
    """(x, y, from, to) wherever the lead passes to another backend, where the two lines cross in log2 x.

    Where the new leader has no point before, or the old one none after, it is the first x of the new leader.
    """
    values = {(row["backend"], row[x]): row[y] for row in measured(rows)}
    leaders = [best for best, _ in winners(rows, x, y)]
    crossings = []
    for before, after in zip(leaders, leaders[1:]):
        old, new = before["backend"], after["backend"]
        if old == new:
            continue
        new_before, old_after = values.get((new, before[x])), values.get((old, after[x]))
        if new_before is None or old_after is None:
            crossings.append((after[x], after[y], old, new))
            continue
        lead, lag = before[y] - new_before, after[y] - old_after  # both at least 0
        share = lead / (lead + lag) if lead + lag else 0.5
        at = 2 ** (math.log2(before[x]) + share * (math.log2(after[x]) - math.log2(before[x])))
        crossings.append((at, before[y] + share * (old_after - before[y]), old, new))
    return crossings


def leaders_text(rows: Sequence[Row], x: str, y: str, limit: int = 4) -> str:
    """ "fastest: triton to ~700, then torch-cudnn"; empty without rows."""
    leaders = winners(rows, x, y)
    if not leaders:
        return ""
    crossings = crossovers(rows, x, y)
    text = f"fastest: {leaders[0][0]['backend']}"
    for at, _, _, new in crossings[:limit]:
        text += f" to ~{round_size(at)}, then {new}"
    more = len(crossings) - limit
    return text + (f" and {more} more change{'s' * (more > 1)}" if more > 0 else "")


def round_size(value: float) -> str:
    """A size between measured ones, to two digits: 93, 700, 1.4k."""
    if value == int(value):
        return size_label(value)
    if value >= 1024:
        return f"{value / 1024:.2g}k"
    return f"{float(f'{value:.2g}'):g}"


def conclusion(rows: Sequence[Row], x: str, y: str, unit: str) -> list[str]:
    """A sentence a configuration: who wins where, how fast at the largest size, by how much over the next."""
    sentences = []
    for config in dict.fromkeys(row["config"] for row in rows):
        part = [row for row in rows if row["config"] == config]
        leaders = winners(part, x, y)
        if not leaders:
            sentences.append(f"{config}: nothing could be measured")
            continue
        best, second = max(leaders, key=lambda pair: pair[0][x])
        where = f"{x} {size_label(best[x])}"
        text = f"{config}: {leaders_text(part, x, y)}; at {where} {best['backend']} gives {best[y]:.3g} {unit}"
        text += f", {best['percent_of_peak']:.0f} % of the ceiling"
        if best["in_cache"] and y == "gb_per_s":
            text += " (from the cache)"
        if second is not None:
            text += f", {best[y] / second[y]:.2f} times {second['backend']}"
        sentences.append(text)
    return sentences


def notes(rows: Sequence[Row], x: str, missing: Mapping[str, str]) -> list[str]:
    """Lines for the legend about what has no point: missing backends by reason, then sizes without a figure."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in missing.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"without {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    gaps: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["status"] != "ok":
            gaps.setdefault((row["backend"], row["status"]), []).append(row)
    said: dict[str, list[str]] = {}  # what -> the backends of which it is true
    for (name, status), part in gaps.items():
        everywhere = not any(row["backend"] == name for row in measured(rows))
        sizes = sorted({row[x] for row in part})
        configs = list(dict.fromkeys(row["config"] for row in part))
        where = "" if everywhere else f" at {', '.join(map(size_label, sizes))}"
        if not everywhere and len(configs) < len({row["config"] for row in rows}):
            where += f" ({', '.join(configs)})"
        reason = str(part[0]["note"]).split(". ")[0]  # the first sentence of what a library says
        said.setdefault(f"{status}{where}: {reason}", []).append(name)
    return lines + [f"{', '.join(names)} {what}" for what, names in said.items()]


def compile_times(rows: Sequence[Row]) -> str:
    """A sentence on what was compiled while the rows were measured: no part of any time; empty where nothing was."""
    seconds: dict[str, float] = {}
    for row in rows:
        seconds[row["backend"]] = seconds.get(row["backend"], 0.0) + (row["jit_s"] or 0.0)
    parts = [f"{name} {spent:.0f} s" for name, spent in seconds.items() if spent >= 0.5]
    return f"compiled first, not part of any time: {', '.join(parts)}" if parts else ""

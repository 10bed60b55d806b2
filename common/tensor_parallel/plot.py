"""transformer_tp2.png: bars of a step on one device and on N, against the ideal; memory and bytes read a rank.

The legends stand below the panels: bars leave no room for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import plots
from common.memory import human_bytes
from common.results import read_json, read_rows

NAME, REFERENCE = "transformer_tp2", "transformer_w3l1"
REQUIRED = ("world", "batch_size", "time_us", "allreduce_us", "memory_bytes", "bytes_read", "one_device_us")


def draw(folder: Path) -> Path:
    """Draw transformer_tp2.png from transformer_tp2.csv (and transformer_w3l1.csv's memory, if there). Its path."""
    csv = Path(folder) / f"{NAME}.csv"
    rows = sorted(read_rows(csv, REQUIRED), key=lambda row: row["batch_size"])
    world = rows[0]["world"]
    record = read_json(csv.with_suffix(".json")) or {}
    where = "CPU processes" if str(record.get("device", "")).startswith("cpu") else "GPUs"
    reference = Path(folder) / f"{REFERENCE}.csv"
    known = any(row["one_device_us"] for row in rows) and reference.exists()
    one = read_rows(reference, ("memory_bytes", "bytes_read"))[-1] if known else None
    was_read = any(part["bytes_read"] for part in (rows[-1], one) if part)  # random weights are made, not read
    title = f"A decode step on one device and on {world} {where}"
    fig, (times, memory) = plots.new_figure(title, panels=2, width_ratios=(1, 1) if was_read else (2, 1))
    _draw_times(times, rows, world)
    _draw_floor(times, record, world)
    plots.legend_below(times, columns=2 if was_read else 3)
    _draw_memory(memory, rows[-1], one, was_read)
    plots.legend_below(memory)
    return plots.save(fig, csv.with_suffix(".png"), plots.footer(csv))


def _draw_times(ax: Any, rows: list[dict[str, Any]], world: int) -> None:
    xs = range(len(rows))
    width = 0.27
    measured = [row["time_us"] / 1e3 for row in rows]
    reduces = [min(row["allreduce_us"], row["time_us"]) / 1e3 for row in rows]
    rest = [t - r for t, r in zip(measured, reduces)]
    error = [
        [(r["time_us"] - r["time_us_p10"]) / 1e3 for r in rows],
        [(r["time_us_p90"] - r["time_us"]) / 1e3 for r in rows],
    ]
    with_one = [(x, row) for x, row in zip(xs, rows) if row["one_device_us"]]
    if with_one:
        one = [row["one_device_us"] / 1e3 for _, row in with_one]
        at = [x for x, _ in with_one]
        ax.bar([x - width for x in at], one, width, color=plots.COLOURS[0], label="one device")
        ideal = [row["one_device_us"] / 1e3 / world for _, row in with_one]
        sums = [row["allreduce_us"] / 1e3 for _, row in with_one]
        right = [x + width for x in at]
        ax.bar(right, ideal, width, color="white", edgecolor=plots.COLOURS[2], label=f"ideal: one device / {world}")
        ax.bar(right, sums, width, bottom=ideal, color="white", edgecolor=plots.COLOURS[1], hatch="//")
        for x, row, height in zip(at, (row for _, row in with_one), measured):
            text = f"{row['one_device_us'] / row['time_us']:.2f}x"
            ax.annotate(text, (x, height), xytext=(0, 6), textcoords="offset points", ha="center")
    ax.bar(xs, rest, width, color=plots.COLOURS[2], label=f"{world} ranks: the rest")
    ax.bar(
        xs, reduces, width, bottom=rest, yerr=error, capsize=3, color=plots.COLOURS[1], hatch="//", edgecolor="white",
        label="all-reduces",
    )  # fmt: skip
    ax.set_xticks(list(xs), [f"batch {row['batch_size']}" for row in rows])
    ax.set(ylabel="ms a step", title="Time of a decode step")
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.1)


def _draw_floor(ax: Any, record: dict[str, Any], world: int) -> None:
    """Reading all weights once, at the bandwidth of all GPUs together."""
    ceilings = record.get("ceilings")
    if not ceilings or "weight_bytes" not in record:
        return
    on_cpu = ceilings["device_type"] == "cpu"
    speed = max(ceilings["read_gb_per_s"], ceilings["copy_gb_per_s"] if on_cpu else 0.0)
    devices = 1 if on_cpu else world  # processes on one CPU share its memory
    floor_ms = record["weight_bytes"] / (speed * devices * 1e9) * 1e3
    whose = "this CPU" if on_cpu else f"{world} GPUs"
    plots.ceiling_line(ax, floor_ms, f"weights at the read speed of {whose}", "ms", digits=3)


def _draw_memory(ax: Any, row: dict[str, Any], one: dict[str, Any] | None, was_read: bool) -> None:
    """Memory, and bytes read where any were: of one device, and of the rank with the most."""
    columns = {"memory_bytes": "memory taken"} | ({"bytes_read": "read from the checkpoint"} if was_read else {})
    width = 0.35
    bars = [(f"largest of {row['world']} ranks", row, width / 2, plots.COLOURS[2])]
    if one is not None:
        bars.insert(0, ("one device", one, -width / 2, plots.COLOURS[0]))
    for label, values, shift, colour in bars:
        heights = [values[column] / 1e9 for column in columns]
        drawn = ax.bar([x + shift for x in range(len(columns))], heights, width, color=colour, label=label)
        ax.bar_label(drawn, [human_bytes(values[column]) for column in columns], padding=3)
    ax.set_xticks(range(len(columns)), list(columns.values()))
    ax.set(ylabel="GB", title="Memory and reading, a rank" if was_read else "Memory of a rank")
    ax.grid(axis="x", visible=False)
    ax.margins(x=0.2, y=0.1)

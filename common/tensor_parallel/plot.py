"""transformer_tp2.png: bars of a step on one device and on N, against the ideal; memory and bytes read a rank."""

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
    fig, (times, memory) = plots.new_figure(f"A decode step on one device and on {world} {where}", panels=2)
    _draw_times(times, rows, world)
    _draw_floor(times, rows, record, world)
    one = Path(folder) / f"{REFERENCE}.csv"
    known = any(row["one_device_us"] for row in rows) and one.exists()
    _draw_memory(memory, rows[-1], read_rows(one, ("memory_bytes", "bytes_read"))[-1] if known else None)
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
    ax.margins(y=0.25)


def _draw_floor(ax: Any, rows: list[dict[str, Any]], record: dict[str, Any], world: int) -> None:
    """Reading all weights once: at one device's bandwidth, and at that of all GPUs."""
    ceilings = record.get("ceilings")
    if not ceilings or "weight_bytes" not in record:
        return
    on_cpu = ceilings["device_type"] == "cpu"
    speed = max(ceilings["read_gb_per_s"], ceilings["copy_gb_per_s"] if on_cpu else 0.0)
    devices = 1 if on_cpu else world  # processes on one CPU share its memory
    floor_ms = record["weight_bytes"] / (speed * devices * 1e9) * 1e3
    plots.ceiling_line(ax, floor_ms, f"weights read at {speed * devices:,.3g} GB/s, ms")


def _draw_memory(ax: Any, row: dict[str, Any], one: dict[str, Any] | None) -> None:
    """Memory and bytes read: of one device, and of the rank with the most."""
    labels, width = ["memory taken", "read from the checkpoint"], 0.35
    columns = ("memory_bytes", "bytes_read")
    bars = [(f"largest of {row['world']} ranks", row, width / 2, plots.COLOURS[2])]
    if one is not None:
        bars.append(("one device", one, -width / 2, plots.COLOURS[0]))
    for label, values, shift, colour in bars:
        heights = [values[column] / 1e9 for column in columns]
        drawn = ax.bar([x + shift for x in range(2)], heights, width, color=colour, label=label)
        ax.bar_label(drawn, [human_bytes(values[column]) for column in columns], padding=3)
    ax.set_xticks(range(2), labels)
    ax.set(ylabel="GB", title="Memory and reading, a rank")
    ax.margins(y=0.2)

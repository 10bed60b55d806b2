"""profile_allreduce.png: latency and bandwidth over the size with the fitted lines, and time over the batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import plots
from common.errors import UserError
from common.results import read_json, read_rows

REQUIRED = ("backend", "algorithm", "world", "batch_size", "bytes", "time_us", "algbw_gb_per_s", "busbw_gb_per_s")
Points = list[dict[str, Any]]


def series(rows: Points, *, by_batch: bool = False) -> dict[str, Points]:
    """ "nccl graph" -> its rows in the order of sizes: the plain sizes, or those that belong to a batch size."""
    found: dict[str, Points] = {}
    for row in sorted(rows, key=lambda row: row["bytes"]):
        if (row["batch_size"] is not None) == by_batch:
            found.setdefault(f"{row['backend']} {row['algorithm']}", []).append(row)
    return found


def fit(points: Points) -> tuple[float, float] | None:
    """(alpha in seconds, beta in bytes/s) of t = alpha + bytes / beta, by least squares of the relative error.

    Relative, because the times span five orders of magnitude and the latency would drown in the large ones. None with
    fewer than three sizes, or where no positive pair fits.
    """
    import numpy as np

    if len({row["bytes"] for row in points}) < 3:
        return None
    sizes = np.array([row["bytes"] for row in points], dtype=float)
    times = np.array([row["time_us"] for row in points], dtype=float) / 1e6
    columns = np.stack([1 / times, sizes / times], axis=1)
    (alpha, slope), *_ = np.linalg.lstsq(columns, np.ones(len(points)), rcond=None)
    return (float(alpha), float(1 / slope)) if alpha > 0 and slope > 0 else None


def draw(csv: Path) -> Path:
    """Draw the three panels from the CSV alone; returns the picture's path."""
    rows = read_rows(csv, REQUIRED)
    if not rows:
        raise UserError(f"{csv}: no rows to draw; measure again")
    record = read_json(csv.with_suffix(".json")) or {}
    world = rows[0]["world"]
    on_cpu = str(record.get("device", "cpu")).startswith("cpu")
    where = f"{world} processes on one CPU (gloo)" if on_cpu else f"{world} GPUs"
    fig, (latency, bandwidth, batches) = plots.new_figure(f"All-reduce between {where}", panels=3)
    for index, (name, points) in enumerate(series(rows).items()):
        _draw_series(latency, bandwidth, name, points, plots.COLOURS[index % len(plots.COLOURS)])
    _draw_limits(bandwidth, record, world)
    sizes = sorted({row["bytes"] for row in rows if row["batch_size"] is None})
    for ax in (latency, bandwidth):
        plots.log2_axis(ax, sizes)
        plots.log_axis(ax)
    latency.set(xlabel="bytes", ylabel="µs", title="Time, and the fit alpha + bytes / beta")
    bandwidth.set(xlabel="bytes", ylabel="GB/s", title=f"Bus bandwidth: bytes / time x 2({world} - 1) / {world}")
    _draw_batches(batches, rows)
    return plots.save(fig, csv.with_suffix(".png"), plots.footer(csv))


def _draw_series(latency: Any, bandwidth: Any, name: str, points: Points, colour: str) -> None:
    xs = [row["bytes"] for row in points]
    times = [[row[column] for row in points] for column in ("time_us", "time_us_p10", "time_us_p90")]
    fitted = fit(points)
    plots.band(latency, xs, *times, name, linestyle="none", color=colour)
    scale = points[0]["busbw_gb_per_s"] / points[0]["algbw_gb_per_s"]
    rates = [[scale * size / (time * 1e3) for size, time in zip(xs, column)] for column in times]
    plots.band(bandwidth, xs, rates[0], rates[2], rates[1], name, linestyle="none", color=colour)
    if fitted is None:
        return
    alpha, beta = fitted
    curve = [alpha + x / beta for x in xs]
    label = f"{1e6 * alpha:.3g} µs + bytes / {beta / 1e9:.3g} GB/s"
    latency.plot(xs, [1e6 * t for t in curve], "--", linewidth=1.3, color=colour, label=label)
    bandwidth.plot(xs, [scale * x / t / 1e9 for x, t in zip(xs, curve)], "--", linewidth=1.3, color=colour)


def _draw_limits(ax: Any, record: dict[str, Any], world: int) -> None:
    """What the link, or between CPU processes the memory, would allow."""
    if record.get("link_gb_per_s"):
        plots.ceiling_line(ax, record["link_gb_per_s"], "NVLink, one direction")
    elif record.get("ceilings"):
        plots.ceiling_line(ax, record["ceilings"]["copy_gb_per_s"], "memory copy of this machine")


def _draw_batches(ax: Any, rows: Points) -> None:
    found = series(rows, by_batch=True)
    ax.set(xlabel="batch size (sequences in a decode step)", ylabel="µs", title="Llama-3-8B's activations")
    if not found:
        ax.text(0.5, 0.5, "no batch sizes measured", ha="center", va="center", transform=ax.transAxes)
        return
    for name, points in found.items():
        xs = [row["batch_size"] for row in points]
        plots.band(ax, xs, *([row[c] for row in points] for c in ("time_us", "time_us_p10", "time_us_p90")), name)
    plots.log2_axis(ax, sorted({row["batch_size"] for points in found.values() for row in points}))
    ax.set_ylim(0, None)

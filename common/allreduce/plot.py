"""profile_allreduce.png: latency and bandwidth over the size with the fitted lines, and time over the batch size; in
the fourth quarter the legend, with each fit and who is fastest from which size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from common import plots
from common.errors import UserError
from common.results import read_json, read_rows

REQUIRED = ("backend", "algorithm", "world", "batch_size", "bytes", "time_us", "algbw_gb_per_s", "busbw_gb_per_s")
Points = list[dict[str, Any]]
CLEARLY = 1.02  # times faster: by less, the lead does not change hands, or it would with every breath of the machine
STAR = {"marker": "*", "markersize": 13, "color": "white", "markeredgecolor": "black", "linestyle": "none"}


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


def leaders(found: dict[str, Points]) -> list[tuple[int, str]]:
    """(bytes, name): from which size on who is fastest, ascending. The lead passes to one that is faster by 2 %, or
    that takes a size which the leader does not.
    """
    lead: list[tuple[int, str]] = []
    for size in sorted({row["bytes"] for points in found.values() for row in points}):
        times = {name: row["time_us"] for name, points in found.items() for row in points if row["bytes"] == size}
        best = min(times, key=times.__getitem__)
        before = times.get(lead[-1][1]) if lead else None
        if before is None or before > CLEARLY * times[best]:
            lead.append((size, best))
    return lead


def leaders_in_words(found: dict[str, Points]) -> list[str]:
    """["triton push from 1 KiB", "nccl eager from 512 MiB (alone)"]; empty where nobody had to be beaten."""
    if len(found) < 2:
        return []
    rivals = {
        size: sum(size in {row["bytes"] for row in points} for points in found.values()) for size, _ in leaders(found)
    }
    return [f"{name} from {bytes_text(size)}{' (alone)' if rivals[size] == 1 else ''}" for size, name in leaders(found)]


def bytes_text(size: int) -> str:
    """512 B, 64 KiB, 1 GiB."""
    label = plots.size_label(size)
    return f"{label[:-1]} {label[-1].upper()}iB" if label[-1] in "kMG" else f"{label} B"


def draw(csv: Path) -> Path:
    """Draw the three panels and their legend from the CSV alone; returns the picture's path."""
    rows = read_rows(csv, REQUIRED)
    if not rows:
        raise UserError(f"{csv}: no rows to draw; measure again")
    record = read_json(csv.with_suffix(".json")) or {}
    world = rows[0]["world"]
    on_cpu = str(record.get("device", "cpu")).startswith("cpu")
    where = f"{world} processes on one CPU (gloo)" if on_cpu else f"{world} GPUs"
    fig, (latency, bandwidth, batches, key) = plots.new_figure(f"All-reduce between {where}", panels=4)
    by_size, by_batch = series(rows), series(rows, by_batch=True)
    looks = {
        name: {"color": plots.COLOURS[i % len(plots.COLOURS)], "marker": plots.MARKERS[i % len(plots.MARKERS)]}
        for i, name in enumerate(by_size | by_batch)
    }
    for name, points in by_size.items():
        _draw_series(latency, bandwidth, points, looks[name])
    _draw_leads(latency, by_size)
    sizes = sorted({row["bytes"] for row in rows if row["batch_size"] is None})
    for ax in (latency, bandwidth):
        plots.log2_axis(ax, sizes)
        plots.log_axis(ax)
    latency.set(xlabel="bytes", ylabel="µs (log)", title="Time, and the fit alpha + bytes / beta")
    bandwidth.set(xlabel="bytes", ylabel="GB/s (log)", title=f"Bus bandwidth: bytes / time x 2({world} - 1) / {world}")
    _draw_batches(batches, by_batch, looks)
    _draw_legend(key, by_size, looks, _draw_limit(bandwidth, record))
    return plots.save(fig, csv.with_suffix(".png"), plots.footer(csv))


def _draw_series(latency: Any, bandwidth: Any, points: Points, look: dict[str, str]) -> None:
    xs = [row["bytes"] for row in points]
    times = [[row[column] for row in points] for column in ("time_us", "time_us_p10", "time_us_p90")]
    plots.band(latency, xs, *times, "_", linestyle="none", **look)
    scale = points[0]["busbw_gb_per_s"] / points[0]["algbw_gb_per_s"]
    rates = [[scale * size / (time * 1e3) for size, time in zip(xs, column)] for column in times]
    plots.band(bandwidth, xs, rates[0], rates[2], rates[1], "_", linestyle="none", **look)
    fitted = fit(points)
    if fitted is None:
        return
    alpha, beta = fitted
    curve = [alpha + x / beta for x in xs]
    style = {"linestyle": "--", "linewidth": 1.3, "color": look["color"]}
    latency.plot(xs, [1e6 * t for t in curve], **style)
    bandwidth.plot(xs, [scale * x / t / 1e9 for x, t in zip(xs, curve)], **style)


def _draw_leads(latency: Any, found: dict[str, Points]) -> None:
    """A star at the first point of each new leader."""
    for size, name in leaders(found)[1:] if len(found) > 1 else []:
        (time_us,) = (row["time_us"] for row in found[name] if row["bytes"] == size)
        latency.plot([size], [time_us], zorder=5, **STAR)


def _draw_limit(ax: Any, record: dict[str, Any]) -> Line2D | None:
    """What the link, or between CPU processes the memory, would allow, and its legend entry."""
    if record.get("link_gb_per_s"):
        value, label = record["link_gb_per_s"], "NVLink, one direction"
    elif record.get("ceilings"):
        value, label = record["ceilings"]["copy_gb_per_s"], "memory copy of this machine"
    else:
        return None
    plots.ceiling_line(ax, value, f"_{label}")
    return Line2D([], [], color=plots.CEILING_COLOUR, linestyle="--", label=plots.ceiling_text(value, label, "GB/s"))


def _draw_legend(ax: Any, found: dict[str, Points], looks: dict[str, Any], limit: Line2D | None) -> None:
    """Each algorithm with its fit, the limit, and who is fastest from which size."""
    handles = []
    for name, look in looks.items():
        fitted = fit(found.get(name, []))
        text = name
        if fitted:
            text += f": {plots.number(1e6 * fitted[0], 3)} µs + bytes / {plots.number(fitted[1] / 1e9, 3)} GB/s"
        handles.append(Line2D([], [], linestyle="--" if fitted else "-", linewidth=1.3, label=text, **look))
    handles += [limit] if limit else []
    leads = leaders_in_words(found)
    if leads:
        look = STAR if len(leads) > 1 else {"linestyle": "none"}
        heading = "the lead changes hands; fastest:" if len(leads) > 1 else "fastest:"
        handles.append(Line2D([], [], label="\n".join([heading, *leads]), **look))
    plots.legend_panel(ax, handles)


def _draw_batches(ax: Any, found: dict[str, Points], looks: dict[str, Any]) -> None:
    ax.set(xlabel="batch size (sequences in a decode step)", ylabel="µs (log)", title="Llama-3-8B's activations")
    if not found:
        ax.text(0.5, 0.5, "no batch sizes measured", ha="center", va="center", transform=ax.transAxes)
        return
    for name, points in found.items():
        xs = [row["batch_size"] for row in points]
        times = ([row[column] for row in points] for column in ("time_us", "time_us_p10", "time_us_p90"))
        plots.band(ax, xs, *times, "_", **looks[name])
    plots.log2_axis(ax, sorted({row["batch_size"] for points in found.values() for row in points}))
    plots.log_axis(ax)

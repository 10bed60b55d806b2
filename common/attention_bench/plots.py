"""The figures of the attention benchmarks, drawn from their CSVs (and the provenance beside them) alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.lines import Line2D

from common import plots
from common.attention_bench import report
from common.attention_bench.options import BACKENDS
from common.errors import UserError
from common.results import read_json, read_rows
from common.roofline import Ceilings

REQUIRED = ("config", "backend", "batch", "time_us", "percent_of_peak", "time_us_p10", "time_us_p90", "status", "note")
REQUIRED += ("tflops", "gb_per_s", "flop_per_byte", "in_cache", "suspect")
ROOFLINE = "attention_roofline.png"
PREFILL_CSVS = ("attention_performance_seq.csv", "attention_performance_batch.csv")
DECODE_CSVS = ("decode_performance_seq.csv", "decode_performance_batch.csv", "decode_performance_pagesize.csv")
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, BLACK = plots.COLOURS
STYLES = {  # a colour a family, a marker a backend
    "torch-flash": (BLUE, "o", "-"),
    "torch-cudnn": (SKY, "s", "-"),
    "torch-efficient": (BLUE, "^", "--"),
    "torch-math": (SKY, "D", "--"),
    "torch-varlen": (BLUE, "v", ":"),
    "torch-gather": (SKY, "p", ":"),
    "flash-attn-2": (ORANGE, "o", "-"),
    "flash-attn-3": (YELLOW, "s", "-"),
    "flash-attn-4": (ORANGE, "^", "--"),
    "vllm-flash-attn-2": (ORANGE, "P", ":"),
    "vllm-flash-attn-3": (YELLOW, "X", ":"),
    "flashinfer-fa2": (GREEN, "o", "-"),
    "flashinfer-fa3": (PINK, "s", "-"),
    "flashinfer-cuda-core": (GREEN, "^", "-"),
    "flashinfer-tensor-core": (PINK, "v", "-"),
    "triton": (BLACK, "d", "-"),
    "triton-balanced": (BLACK, "h", "--"),
}
SAME_INTENSITY = 1.1
LEGEND_WIDTH = {True: 82, False: 44}  # characters of a line: in the empty corner of three panels, or beside the panels


def draw_sweep(csv_path: Path, x: str, y: str, title: str, xlabel: str) -> Path:
    """One panel a configuration, a line a backend, the ceiling, and where the lead changes hands."""
    rows = read_rows(csv_path, (*REQUIRED, x))
    record = read_json(csv_path.with_suffix(".json")) or {}
    configs = list(dict.fromkeys(row["config"] for row in rows))
    if not configs:
        raise UserError(f"{csv_path}: no rows to draw; measure again")
    fig, axes = plots.new_figure(title, panels=len(configs))
    for ax, config in zip([axes] if len(configs) == 1 else axes, configs):
        part = [row for row in rows if row["config"] == config]
        for name in BACKENDS:
            _draw_line(ax, report.series(part, x, name), x, y, name)
        for value, label, _ in _ceilings(record, y):
            plots.ceiling_line(ax, value, f"_{label}")
        for at, value, _, _ in report.crossovers(part, x, y):
            ax.plot([at], [value], marker="*", markersize=15, color="white", markeredgecolor="black", zorder=5)
        heads = (record.get("sizes") or {}).get(config) or ["?"] * 3
        lines = textwrap.wrap(
            report.leaders_text(part, x, y) or "nothing could be measured", 72, break_on_hyphens=False
        )
        ax.set_title("\n".join([f"{config}: {heads[0]}/{heads[1]} heads of {heads[2]}", *lines]), fontsize=12)
        plots.log2_axis(ax, sorted({row[x] for row in part}))
        ax.set(xlabel=xlabel, ylabel={"tflops": "TFLOP/s", "gb_per_s": "GB/s"}[y], ylim=(0, None))
    _legend(fig, rows, record, x, y, len(configs))
    return plots.save(fig, csv_path.with_suffix(".png"), plots.footer(csv_path))


def _draw_line(ax: Any, part: Sequence[report.Row], x: str, y: str, name: str) -> None:
    if not part:
        return
    colour, marker, style = STYLES[name]
    values = [row[y] for row in part]
    # A rate's band is its time's, upside down: rate * time is constant.
    low = [row[y] * row["time_us"] / row["time_us_p90"] for row in part]
    high = [row[y] * row["time_us"] / row["time_us_p10"] for row in part]
    hollow = [row["suspect"] for row in part]
    look = {"color": colour, "marker": marker, "linestyle": style}
    plots.band(ax, [row[x] for row in part], values, low, high, f"_{name}", suspect=hollow, **look)


def _ceilings(record: Mapping[str, Any], y: str) -> list[tuple[float, str, str]]:
    """(value, label, unit) of the lines that a rate in y cannot pass; none where the provenance is gone."""
    if not record.get("ceilings"):
        return []
    known = Ceilings(**record["ceilings"])
    if y == "gb_per_s":
        return [(known.memory_gb_per_s("read"), "measured read ceiling", "GB/s")]
    kinds = [("burst", "best product, in a burst"), ("sustained", "the same, sustained")]
    return [(known.peak_tflops(record["dtype"], kind), label, "TFLOP/s") for kind, label in kinds]


def _legend(fig: Any, rows: Sequence[report.Row], record: Mapping[str, Any], x: str, y: str, panels: int) -> None:
    """One legend for all panels: lines, ceilings, marks, and in words what is not there."""
    handles = [_handle(name) for name in BACKENDS if any(row["backend"] == name for row in report.measured(rows))]
    for index, (value, label, unit) in enumerate(_ceilings(record, y)):
        text = plots.ceiling_text(value, label, unit)
        handles.append(Line2D([], [], color=plots.CEILING_COLOUR, linestyle=("--", ":")[index], label=text))
    star = {"marker": "*", "markersize": 13, "color": "white", "markeredgecolor": "black", "linestyle": "none"}
    by_config = [[row for row in rows if row["config"] == config] for config in {row["config"] for row in rows}]
    if any(report.crossovers(part, x, y) for part in by_config):
        handles.append(Line2D([], [], label="the lead changes hands", **star))
    if any(row["suspect"] for row in rows):
        look = {"marker": "o", "markerfacecolor": "white", "color": "black", "linestyle": "none"}
        handles.append(Line2D([], [], label="hollow: above 105 % of its ceiling", **look))
    if y == "gb_per_s" and any(row["in_cache"] for row in report.measured(rows)):
        handles.append(_words(f"in cache, not held against the ceiling: {_cached_sizes(rows, x)}"))
    handles += [_words(line) for line in report.notes(rows, x, record.get("missing") or {})]
    _place(fig, handles, _has_corner(panels))


def _cached_sizes(rows: Sequence[report.Row], x: str) -> str:
    sizes = sorted({row[x] for row in report.measured(rows) if row["in_cache"]})
    return ", ".join(map(plots.size_label, sizes))


def _handle(name: str, **kw: Any) -> Line2D:
    colour, marker, style = STYLES[name]
    return Line2D([], [], **{"color": colour, "marker": marker, "linestyle": style, "label": name} | kw)


def _words(text: str) -> Line2D:
    return Line2D([], [], linestyle="none", label=text)


def _has_corner(panels: int) -> bool:
    """Whether panels in two columns leave a place empty."""
    return panels > 1 and panels % 2 == 1


def _place(fig: Any, handles: Sequence[Line2D], corner: bool) -> None:
    for handle in handles:
        handle.set_label("\n".join(textwrap.wrap(handle.get_label(), LEGEND_WIDTH[corner], break_on_hyphens=False)))
    style = {"handles": handles, "fontsize": 9, "labelspacing": 0.35, "framealpha": 1.0, "borderaxespad": 0.5}
    if corner:
        rows = -(-len(fig.axes) // 2)
        fig.legend(loc="upper left", bbox_to_anchor=(0.53, 0.94 / rows), **style)
    else:
        fig.legend(loc="outside right center", **style)


# --- the roofline -----------------------------------------------------------------------------------------------------
def draw_roofline(folder: Path) -> Path | None:
    """attention_roofline.png from whichever of the five CSVs in `folder` come from one machine and dtype. None without
    any: prefill and decode points of every backend under the measured roof."""
    sets = []
    for name in (*PREFILL_CSVS, *DECODE_CSVS):
        record = read_json((folder / name).with_suffix(".json"))
        if (folder / name).exists() and record and record.get("ceilings"):
            sets.append((folder / name, record, report.measured(read_rows(folder / name, REQUIRED))))
    sets = [part for part in sets if part[2]]
    if not sets:
        return None
    newest = max((record for _, record, _ in sets), key=lambda record: record["utc_time"])
    same = ("device_name", "dtype")
    sets = [part for part in sets if all(part[1].get(field) == newest.get(field) for field in same)]
    fig, ax = plots.new_figure("Attention under the roof of this machine")
    fig.set_figwidth(1.4 * plots.WIDTH)  # the points of a dozen backends lie at half a dozen intensities
    points = [(row, path.name in PREFILL_CSVS) for path, _, rows in sets for row in rows]
    used = [name for name in BACKENDS if any(row["backend"] == name for row, _ in points)]
    grouped = groups([(row["flop_per_byte"], row["backend"]) for row, _ in points])
    for name in used:
        colour, marker, _ = STYLES[name]
        for is_prefill in (True, False):
            part = [row for row, prefill in points if row["backend"] == name and prefill == is_prefill]
            xs = [_group_of(row, grouped).place(name) for row in part]
            ys = [row["tflops"] for row in part]
            face = colour if is_prefill else "white"
            ax.plot(xs, ys, marker, color=colour, markerfacecolor=face, alpha=0.8, linestyle="none", markersize=6)
    prefilled = {row["backend"] for row, prefill in points if prefill}
    handles = [_handle(name, linestyle="none") for name in used]
    for handle in handles:
        if handle.get_label() not in prefilled:  # two of one library share a marker, one prefills, one decodes
            handle.set_markerfacecolor("white")
    handles += _draw_roof(ax, Ceilings(**newest["ceilings"]), newest["dtype"], grouped)
    handles.append(_words("filled: prefill; hollow: decode"))
    handles.append(_words("backends of one intensity stand side by side, under the roof at their middle"))
    if any(row["in_cache"] for row, prefill in points if not prefill):
        handles.append(_words("decode points above the roof read from the cache"))
    _place(fig, handles, False)
    ax.set(xlabel="arithmetic intensity (FLOP per byte that must move)", ylabel="TFLOP/s")
    return plots.save(fig, folder / ROOFLINE, plots.footer(*(path for path, _, _ in sets)))


class Group(NamedTuple):
    """The backends measured at one arithmetic intensity."""

    flop_per_byte: float
    octaves: float  # the room to draw them in, the intensity in its middle
    backends: list[str]

    def place(self, backend: str) -> float:
        """Where on the intensity axis this backend's points stand."""
        return self._at((self.backends.index(backend) + 0.5) / len(self.backends))

    def span(self) -> tuple[float, float]:
        """First and last place of the room."""
        return self._at(0), self._at(1)

    def _at(self, share: float) -> float:
        return self.flop_per_byte * 2 ** (self.octaves * (share - 0.5))


def groups(points: Sequence[tuple[float, str]]) -> list[Group]:
    """Of (intensity, backend), ascending. A decode's intensity hardly depends on its size and a batch's not at all, so
    all backends would lie on one spot: those within 10 % share two octaves, or 0.7 of the way to the next group.
    """
    middles: list[float] = []
    for value in sorted({intensity for intensity, _ in points}):
        if not middles or value > SAME_INTENSITY * middles[-1]:
            middles.append(value)
    found = []
    for i, middle in enumerate(middles):
        there = {name for intensity, name in points if middle <= intensity <= SAME_INTENSITY * middle}
        gaps = [abs(math.log2(other / middle)) for other in middles[max(0, i - 1) : i + 2] if other != middle]
        octaves = min([2.0, *(0.7 * gap for gap in gaps)])
        found.append(Group(middle, octaves, [name for name in BACKENDS if name in there]))
    return found


def _group_of(row: report.Row, grouped: Sequence[Group]) -> Group:
    return next(group for group in reversed(grouped) if group.flop_per_byte <= row["flop_per_byte"])


def roof(known: Ceilings, dtype: str, grouped: Sequence[Group]) -> tuple[list[float], list[float]]:
    """min(peak, intensity x bandwidth), TFLOP/s, over the groups and the ridge. Level over each group, since all of its
    points have the intensity of its middle.
    """
    peak, bandwidth = known.peak_tflops(dtype), known.memory_gb_per_s("read")
    ridge = peak * 1e3 / bandwidth
    low = min(grouped[0].span()[0], ridge / 1.5)
    octaves = math.log2(max(grouped[-1].span()[1], ridge * 1.5) / low)
    xs = sorted([ridge, *(low * 2 ** (octaves * i / 1000) for i in range(1001))])
    ys = []
    for x in xs:
        over = [group.flop_per_byte for group in grouped if group.span()[0] <= x <= group.span()[1]]
        ys.append(min(peak, (over or [x])[0] * bandwidth / 1e3))
    return xs, ys


def _draw_roof(ax: Any, known: Ceilings, dtype: str, grouped: Sequence[Group]) -> list[Line2D]:
    """The roof, the axes around it, and its legend entry."""
    xs, ys = roof(known, dtype, grouped)
    (line,) = ax.plot(xs, ys, color=plots.CEILING_COLOUR, linestyle="--")
    plots.log2_axis(ax, [2.0**e for e in range(math.floor(math.log2(xs[0])), math.ceil(math.log2(xs[-1])) + 1)])
    plots.log_axis(ax)
    peak, bandwidth = known.peak_tflops(dtype), known.memory_gb_per_s("read")
    text = f"roof: {plots.number(bandwidth)} GB/s, {plots.number(peak)} TFLOP/s, "
    text += f"ridge at {plots.number(peak * 1e3 / bandwidth, 3)} FLOP per byte"
    return [Line2D([], [], color=line.get_color(), linestyle="--", label=text)]

"""Figures in one style, drawn from a CSV alone, with their machine in the footer.

    fig, ax = plots.new_figure("How does time grow with the output?")
    plots.band(ax, xs, time, p10, p90, "no cache")
    plots.ceiling_line(ax, ceiling, "memory ceiling", "GB/s")
    plots.log2_axis(ax, xs)
    ax.set(xlabel="output tokens", ylabel="seconds")
    plots.save(fig, csv_path.with_suffix(".png"), plots.footer(csv_path))

Figures are made without pyplot: no window, no global list of figures that grows.
"""

import io
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Formatter, LogLocator, NullLocator, ScalarFormatter

from common.results import read_json, write_atomic

DPI = 120
WIDTH, HEIGHT = 10.0, 5.8  # inches of a figure with one panel: 1200 x 696 pixels
MAX_TICKS = 12
MAX_LEGEND_INSIDE = 6
TICK_GAP = 0.5  # between two labels of an axis, in heights of its letters
WIDE_SPREAD = 20.0  # the largest value over the median, from which a linear axis lays most values on the floor
# Okabe and Ito's palette, which people with any of the common colour deficiencies can tell apart; yellow is left out,
# too pale on white. Markers differ too, so that a print in grey can be read.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CEILING_COLOUR = "#555555"

matplotlib.rcParams.update(
    {
        "font.size": 13,
        "axes.titlesize": 14,
        "axes.labelsize": 13,
        "xtick.labelsize": 12,
        "ytick.labelsize": 12,
        "legend.fontsize": 12,
        "legend.framealpha": 0.9,
        "legend.borderaxespad": 0.9,  # a marker on the axis stays free
        "figure.titlesize": 16,
        "lines.linewidth": 2.0,
        "lines.markersize": 7,
        "axes.grid": True,
        "grid.color": "#DDDDDD",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    }
)


def new_figure(title: str, *, panels: int = 1, **kw: Any) -> tuple[Figure, Any]:
    """A figure with `panels` panels in at most two columns. Returns (figure, Axes), or a list of Axes for several.

    kw goes to `Figure.subplots` (`sharex=True`, `width_ratios=...`).
    """
    columns = min(panels, 2)
    rows = math.ceil(panels / columns)
    width = WIDTH if columns == 1 else 1.4 * WIDTH
    fig = Figure(figsize=(width, HEIGHT * (1 if rows == 1 else 0.85 * rows)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(fig)
    fig.suptitle("\n".join(textwrap.wrap(title, width=int(width * 8))))
    axes = list(fig.subplots(rows, columns, squeeze=False, **kw).flat)
    for spare in axes[panels:]:
        spare.remove()
    for ax in axes[:panels]:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(Thousands())
    return fig, axes[0] if panels == 1 else axes[:panels]


def band(
    ax: Axes,
    xs: Sequence[float],
    mid: Sequence[float | None],
    lo: Sequence[float | None] | None,
    hi: Sequence[float | None] | None,
    label: str,
    *,
    suspect: Sequence[Any] | None = None,
    **kw: Any,
) -> None:
    """A line of medians with markers and the p10..p90 band behind it. None is a gap.

    suspect: true where a point stayed above 105 % of its ceiling; its marker is hollow. kw goes to `Axes.plot`.
    """
    count = sum(1 for line in ax.lines if line.get_gid() == "series")
    style = {"color": COLOURS[count % len(COLOURS)], "marker": MARKERS[count % len(MARKERS)]}
    style = style | {"linestyle": ("-", "--", ":")[count // len(COLOURS) % 3]} | kw
    y = [math.nan if value is None else value for value in mid]
    hollow = [bool(flag) for flag in suspect] if suspect is not None else [False] * len(y)
    (line,) = ax.plot(xs, y, label=label, gid="series", **style)
    if any(hollow):  # white-faced markers over the filled ones
        ax.plot(
            [x for x, flag in zip(xs, hollow) if flag],
            [value for value, flag in zip(y, hollow) if flag],
            linestyle="none",
            marker=style["marker"],
            markerfacecolor="white",
            markeredgecolor=line.get_color(),
            markeredgewidth=2,
            zorder=line.get_zorder() + 0.1,
            label=f"{label}: above its ceiling",
        )
    if lo is not None and hi is not None:
        low = [math.nan if value is None else value for value in lo]
        high = [math.nan if value is None else value for value in hi]
        ax.fill_between(xs, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def ceiling_line(ax: Axes, value: float, label: str, unit: str = "", *, digits: int = 4) -> None:
    """What the machine allows: a dashed horizontal line, named in the legend with its value and unit."""
    count = sum(1 for line in ax.lines if line.get_gid() == "ceiling")
    ax.axhline(
        value,
        color=CEILING_COLOUR,
        linestyle=("--", ":", "-.")[count % 3],
        linewidth=1.8,
        label=ceiling_text(value, label, unit, digits),
        gid="ceiling",
        zorder=1.5,
    )


def ceiling_text(value: float, label: str, unit: str = "", digits: int = 4) -> str:
    """ "memory ceiling: 4,590 GB/s": the legend's words for a ceiling."""
    return f"{label}: {number(value, digits)} {unit}".rstrip()


def number(value: float, digits: int = 4) -> str:
    """A value in a picture: 0.01235, 12.35, 1,235, 12,346; never 1.235e+04."""
    text = f"{value:.{digits}g}"
    return text if abs(float(text)) < 1000 else f"{value:,.0f}"


class Thousands(ScalarFormatter):
    """matplotlib's labels of a linear axis, but 20,000 with its comma and written out, however large."""

    def __init__(self) -> None:
        super().__init__(useOffset=False)
        self.set_scientific(False)

    def __call__(self, value: float, pos: int | None = None) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else super().__call__(value, pos)


class FittingLabels(Formatter):
    """Labels of `text(value)`, at as many ticks as have room: one that would come too near another is left out, of
    lower `rank` last, of equal rank by their order.

    Decided when the figure is drawn, since the width of a panel is known only then. All labels ask for the room of the
    widest, so that of regular ticks every second or third keeps its label, not now this and now that.
    """

    def __init__(self, text: Callable[[float], str], rank: Callable[[float], int] = lambda value: 0) -> None:
        self._text, self._rank = text, rank

    def __call__(self, value: float, pos: int | None = None) -> str:
        return self._text(value)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        labels = [self._text(value) for value in values]
        low, high = sorted(self.axis.get_view_interval())
        shown = [i for i, value in enumerate(values) if low <= value <= high]
        if len(shown) < 2:
            return labels
        room, places = self._room([labels[i] for i in shown]), self._places(values)
        kept: list[float] = []
        for i in sorted(shown, key=lambda i: (self._rank(values[i]), places[i])):
            if any(abs(places[i] - other) < room for other in kept):
                labels[i] = ""
            else:
                kept.append(places[i])
        return labels

    def _room(self, labels: Sequence[str]) -> float:
        """Pixels from the middle of a label to the middle of the next, at least."""
        renderer = self.axis.axes.figure.canvas.get_renderer()
        font = self.axis.get_major_ticks(1)[0].label1.get_fontproperties()
        widths, heights, _ = zip(*(renderer.get_text_width_height_descent(label, font, False) for label in labels))
        along = widths if self.axis.axis_name == "x" else heights
        return max(along) + TICK_GAP * max(heights)

    def _places(self, values: Sequence[float]) -> list[float]:
        """Where the ticks stand, in pixels along the axis."""
        ax, along_x = self.axis.axes, self.axis.axis_name == "x"
        points = [(value, 0) if along_x else (0, value) for value in values]
        transform = ax.get_xaxis_transform() if along_x else ax.get_yaxis_transform()
        return [float(point[0 if along_x else 1]) for point in transform.transform(points)]


def log2_axis(ax: Axes, values: Sequence[float], axis: str = "x") -> None:
    """A log2 scale with ticks at the values, labelled 1, 2, 4, 128, 1k, 2k; of many values the powers of two. Labels
    without room are left out.
    """
    ticks = sorted({value for value in values if value > 0})
    if not ticks:
        return
    if len(ticks) > MAX_TICKS:
        powers = [2.0**e for e in range(math.ceil(math.log2(ticks[0])), math.floor(math.log2(ticks[-1])) + 1)]
        ticks = powers[:: math.ceil(len(powers) / MAX_TICKS)] or ticks[:1]
    which = ax.xaxis if axis == "x" else ax.yaxis
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log", base=2)
    which.set_major_locator(FixedLocator(ticks))
    which.set_minor_locator(NullLocator())
    which.set_major_formatter(FittingLabels(size_label))
    if axis == "x":
        low, high = min(v for v in values if v > 0), max(values)
        pad = 2.0 ** max(0.15, 0.04 * math.log2(high / low))
        ax.set_xlim(low / pad, high * pad)


def log_axis(ax: Axes, axis: str = "y") -> None:
    """A decimal log scale whose ticks read 0.1, 0.2, 0.5, 1 instead of powers of ten; more of them in a short range."""
    which = ax.yaxis if axis == "y" else ax.xaxis
    (ax.set_yscale if axis == "y" else ax.set_xscale)("log")
    if axis == "y":
        ax.margins(y=0.12)
    low, high = sorted(ax.get_ylim() if axis == "y" else ax.get_xlim())
    steps: Sequence[float] = (1.0, 2.0, 5.0) if high / low < 1e4 else (1.0,)
    if high / low < 12:
        steps = [float(step) for step in range(1, 10)]
    which.set_major_locator(LogLocator(base=10, subs=steps, numticks=30))
    which.set_minor_locator(NullLocator())
    which.set_major_formatter(FittingLabels(lambda value: f"{value:,.6g}", _roundness))


def _roundness(value: float) -> int:
    """Which labels of a decimal log axis to keep: 0 for 1, 10, 100; 1 for twice and five times these; 2 for others."""
    digit = f"{value:.0e}"[0]
    return 0 if digit == "1" else 1 if digit in "25" else 2


def shared_y_axis(axes: Sequence[Axes], values: Sequence[float]) -> None:
    """One y axis for panels of a kind, from 0; logarithmic where the largest value is over 20 times the median, which
    a linear axis would lay on the floor. The labels say which: " (log)".
    """
    positive = [value for value in values if value > 0]
    if positive and max(positive) > WIDE_SPREAD * statistics.median(positive):
        low, high = min(positive), max(positive)
        for ax in axes:
            ax.set_yscale("log")
            ax.set_ylim(low / 1.3, high * 1.3)
            log_axis(ax)
            ax.set_ylabel(f"{ax.get_ylabel()} (log)")
        return
    top = max((ax.get_ylim()[1] for ax in axes), default=1.0)
    for ax in axes:
        ax.set_ylim(0, top)


def size_label(value: float) -> str:
    """1, 128, 1k, 1.5k, 16k, 1M, 4G: in units of 1024, as sizes are spoken of."""
    for scale, unit in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")):
        if value >= scale and (value / scale * 4) == int(value / scale * 4):
            return f"{value / scale:g}{unit}"
    return f"{value:g}"


def footer(*csv_paths: str | Path) -> str:
    """Machine, model, dtype and date of the measurements, from the provenance beside each CSV."""
    texts = []
    for path in map(Path, csv_paths):
        record = read_json(path.with_suffix(".json")) or {}
        parts = [record.get("device_name"), record.get("model"), record.get("dtype"), record.get("preset")]
        parts = [part for part in parts if part != "auto"] + [str(record.get("utc_time") or "")[:10]]
        text = " · ".join(str(part) for part in parts if part) or f"{path.name}, without provenance"
        if text not in texts:
            texts.append(text)
    return "  |  ".join(texts)


def save(fig: Figure, path: str | Path, footer: str) -> Path:
    """Write the PNG at 120 dpi, whole or not at all; adds legends and the footer line. Returns the path."""
    for ax in fig.axes:
        _legend(ax)
    columns = int(fig.get_figwidth() * 11)
    fig.supxlabel("\n".join(textwrap.wrap(footer, width=columns)), x=0.01, ha="left", fontsize=10, color="#555555")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=DPI)
    path = Path(path)
    write_atomic(path, buffer.getvalue())
    return path


def legend_panel(ax: Axes, handles: Sequence[Any], **kw: Any) -> None:
    """A panel that holds nothing but a legend shared by the others: what three panels leave empty."""
    ax.set_axis_off()
    ax.legend(handles=handles, loc="center", borderaxespad=0, labelspacing=0.6, **kw)


def legend_below(ax: Axes, *, columns: int = 2, handles: Sequence[Any] | None = None) -> None:
    """Under the panel, for panels whose bars leave no room for a legend."""
    ax.legend(
        handles=handles if handles is not None else ax.get_legend_handles_labels()[0],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        ncols=columns,
        borderaxespad=0,
    )


def _legend(ax: Axes) -> None:
    """Inside where it fits, beside the panel where it is long; a legend that the script made stays."""
    handles, labels = ax.get_legend_handles_labels()
    if not labels or ax.get_legend() is not None:
        return
    if len(labels) <= MAX_LEGEND_INSIDE:
        ax.legend(loc="best")
    else:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)

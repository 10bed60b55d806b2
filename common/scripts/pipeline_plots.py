"""The pictures of the pipeline script, from its CSVs alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import plots
from common.results import ResultFile, read_json, read_rows

GAPS, WHOLE = "host gaps", "whole step"  # of a breakdown (breakdown.py, which needs torch)
BAR = 0.68  # a bar's width

REQUIRED = (
    "backend",
    "batch_size",
    "prompt_tokens",
    "output_tokens",
    "time",
    "tokens_per_s",
    "mbu",
    "mfu",
    "bound_tokens_per_s",
    "suspect",
)
SWEEPS = {  # file: title, what x is, axis label, y label
    "pipeline_decode": ("Decoding many requests together", "output", "output tokens a request", "tokens per second"),
    "pipeline_prefill": ("Reading one prompt", "prompt", "prompt tokens", "prompt tokens per second"),
    "pipeline_context": ("What does a long context cost?", "context", "tokens of context", "tokens per second"),
    "pipeline_batch": ("More requests at once", "batch", "requests", "output tokens per second"),
}


# One colour a part: the palette, two more that differ from it, and grey for what is not computing.
PART_COLOURS = (*plots.COLOURS[:6], "#999933", "#882255", "#000000")


def draw_all(sweeps: Sequence[ResultFile], parts: ResultFile | None) -> list[Path]:
    pictures = [draw_sweep(file.path) for file in sweeps]
    return pictures + ([draw_breakdown(parts.path)] if parts and parts.rows else [])


def _x(row: dict[str, Any], kind: str) -> float:
    if kind == "batch":
        return row["batch_size"]
    tokens = row["prompt_tokens"] + row["output_tokens"] if kind == "context" else row[f"{kind}_tokens"]
    return tokens // row["batch_size"]


def draw_sweep(csv_path: Path) -> Path:
    """Speed against its ceiling on the left, MBU and MFU on the right."""
    title, kind, xlabel, ylabel = SWEEPS[csv_path.stem]
    rows = sorted(read_rows(csv_path, REQUIRED), key=lambda row: _x(row, kind))
    fig, (left, right) = plots.new_figure(title, panels=2)
    ceilings: dict[float, float] = {}
    bounds: dict[float, float] = {}
    engines = list(dict.fromkeys(row.get("engine") or "ours" for row in rows))
    for engine in engines:
        part = [row for row in rows if (row.get("engine") or "ours") == engine]
        xs = [_x(row, kind) for row in part]
        label = part[0]["backend"] if engines == ["ours"] else f"{engine} ({part[0]['backend']})"
        suspect = [row["suspect"] for row in part]
        plots.band(left, xs, [row["tokens_per_s"] for row in part], None, None, label, suspect=suspect)
        for share in ("mbu", "mfu"):
            values = [100 * row[share] for row in part]
            plots.band(right, xs, values, None, None, f"{share.upper()}, {label}", suspect=suspect)
        if engine == "ours":  # the nearer of the two ceilings, at each point
            ceilings = {x: row["tokens_per_s"] / max(row["mbu"], row["mfu"]) for x, row in zip(xs, part)}
            bounds = {x: row["bound_tokens_per_s"] for x, row in zip(xs, part)}
    style = {"color": plots.CEILING_COLOUR, "linestyle": "--", "linewidth": 1.8}
    left.plot(list(ceilings), list(ceilings.values()), label="ceiling: bytes or operations at full speed", **style)
    if kind == "prompt":
        style |= {"linestyle": ":", "color": plots.COLOURS[6]}
        left.plot(list(bounds), list(bounds.values()), label="bound: its parts at their ceilings, in turn", **style)
    plots.ceiling_line(right, 100, "ceiling", "%")
    for ax in (left, right):
        plots.log2_axis(ax, sorted({_x(row, kind) for row in rows}))
        ax.set_xlabel(xlabel)
    right.set_ylim(0, None)
    if max(ceilings.values(), default=0) > 8 * max(row["tokens_per_s"] for row in rows):
        plots.log_axis(left)  # or the curves would lie on the floor
    else:
        left.set_ylim(0, None)
    left.set(ylabel=ylabel, title="Speed")
    right.set(ylabel="% of the measured ceiling", title="Share of memory bandwidth and of compute")
    return plots.save(fig, csv_path.with_suffix(".png"), plots.footer(csv_path))


def draw_breakdown(csv_path: Path) -> Path:
    """A panel a phase: its parts timed one by one, stacked; the whole step as the engine runs it; the parts at their
    ceilings.
    """
    rows = read_rows(csv_path, ("phase", "part", "time_us", "ceiling_us"))
    in_graph = bool((read_json(csv_path.with_suffix(".json")) or {}).get("decode_in_graph"))
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    names = [name for name in dict.fromkeys(row["part"] for row in rows) if name != WHOLE]
    fig, axes = plots.new_figure("Where does the time of a step go?", panels=len(phases))
    for ax, phase in zip(axes if len(phases) > 1 else [axes], phases):
        part = {row["part"]: row for row in rows if row["phase"] == phase}
        whole = part.pop(WHOLE, None)
        total = sum(row["time_us"] for row in part.values()) / 1e3
        bound = sum(row["ceiling_us"] for row in part.values()) / 1e3
        at_ceilings = 1 if whole is None else 2
        _stack(ax, 0, names, {name: row["time_us"] / 1e3 for name, row in part.items()}, total)
        _stack(ax, at_ceilings, names, {name: row["ceiling_us"] / 1e3 for name, row in part.items()}, total)
        ticks = ["parts,\none by one", "parts at\ntheir ceilings"]
        if whole is not None:
            as_graph = in_graph and phase.startswith("decode")
            ticks.insert(1, "whole step,\nin its CUDA graph" if as_graph else "whole step,\nas it runs")
            _draw_whole(ax, whole["time_us"] / 1e3, total, as_graph)
        ax.set_xticks(range(len(ticks)), ticks)
        ax.set(title=phase, ylabel="milliseconds a step", xlim=(-0.5, at_ceilings + 0.5))
        ax.set_ylim(0, 1.1 * max(total, bound, whole["time_us"] / 1e3 if whole else 0.0))
        ax.grid(False, axis="x")
    shown = {bar.get_label(): bar for ax in fig.axes for bar in ax.containers}
    order = [name for name in names[::-1] if name in shown]
    for ax in fig.axes[:-1]:
        ax.legend([], []).set_visible(False)
    fig.axes[-1].legend([shown[n] for n in order], order, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return plots.save(fig, csv_path.with_suffix(".png"), plots.footer(csv_path))


def _stack(ax: Any, x: int, names: Sequence[str], heights: dict[str, float], total: float) -> None:
    """Parts on one another at x, the sum above them; a part of more than 5 % of `total` with its number."""
    bottom = 0.0
    for index, name in enumerate(names):
        height = heights.get(name, 0.0)
        colour = plots.CEILING_COLOUR if name == GAPS else PART_COLOURS[index % len(PART_COLOURS)]
        ax.bar(x, height, BAR, bottom=bottom, color=colour, edgecolor="white", label=name)
        if height > 0.05 * total:
            ax.text(x, bottom + height / 2, plots.number(height, 3), ha="center", va="center", color="white")
        bottom += height
    ax.text(x, bottom, f"{plots.number(bottom, 3)} ms", ha="center", va="bottom")


def _draw_whole(ax: Any, whole: float, total: float, as_graph: bool) -> None:
    """The step as the engine runs it, and how much less that is than its parts one by one, ms."""
    ax.bar(1, whole, BAR, color="#EEEEEE", edgecolor="black", linewidth=1.2, label="_whole")
    ax.text(1, whole, f"{plots.number(whole, 3)} ms", ha="center", va="bottom")
    saved = total - whole
    if saved < 0.005 * total:  # without a saving the two are equal: parts and gaps are the whole
        return
    text = f"{plots.number(saved, 3)} ms\n({saved / total:.0%}) less"
    text += ":\nkernels\noverlap,\nneighbours\nare fused" if as_graph else ""
    ax.text(1, whole / 2, text, ha="center", va="center", fontsize=11)


def draw_ablation(csv_path: Path) -> Path:
    """A panel a batch size: a bar a technique, from the first to all of them, and the machine's ceiling."""
    needed = ("batch_size", "technique", "tokens_per_s", "mbu", "speedup", "ceiling_tokens_per_s", "suspect")
    rows = read_rows(csv_path, needed)
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    fig, axes = plots.new_figure("What does each technique buy when decoding?", panels=len(sizes))
    for ax, size in zip(axes if len(sizes) > 1 else [axes], sizes):
        part = [row for row in rows if row["batch_size"] == size]
        ceiling = max(row["ceiling_tokens_per_s"] for row in part)
        for place, row in enumerate(part):
            colour = plots.COLOURS[0]
            ax.barh(place, row["tokens_per_s"], 0.7, color="white" if row["suspect"] else colour, edgecolor=colour)
            text = f"{plots.number(row['tokens_per_s'])}  (MBU {row['mbu']:.0%}"
            text += f", {row['speedup']:.2f}x)" if row["speedup"] else ")"
            on_white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # it may lie on the ceiling's line
            ax.text(row["tokens_per_s"] + 0.01 * ceiling, place, text, va="center", fontsize=11, bbox=on_white)
        style = {"color": plots.CEILING_COLOUR, "linestyle": "--", "linewidth": 1.8, "gid": "ceiling"}
        ax.axvline(ceiling, label=plots.ceiling_text(ceiling, "ceiling", "tokens/s"), **style)
        ax.set_yticks(range(len(part)), [textwrap.fill(str(row["technique"]), 18) for row in part])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.35 * max(ceiling, *(row["tokens_per_s"] for row in part)))
        ax.set(title=f"batch {size}", xlabel="tokens per second")
        ax.grid(False, axis="y")
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, -0.24))
    return plots.save(fig, csv_path.with_suffix(".png"), plots.footer(csv_path))

"""Draws no cache against cache: time over output length, and the speed-up.

Reads no_kv_times.csv and single_batch_times.csv (whichever is there) from results/ or --out, with their provenance;
nothing is measured. A generation with a cache takes a + b n for n tokens (one pass over the prompt, then equal steps),
one without a + b n + c n^2; both are fitted and drawn, beside the time that reading weights and cache would take at the
machine's measured bandwidth. Output: time_comparison.png.

    python assignment2/graph1.py
    python assignment2/graph1.py --out /tmp/run
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli

NO_KV, CACHED, PICTURE = "no_kv_times.csv", "single_batch_times.csv", "time_comparison.png"
REQUIRED = ("output_length", "time", "time_p10", "time_p90", "tokens_per_s")


def fit(lengths, times, degree):
    """Least-squares coefficients, constant first, of a polynomial through the measured times; None with too few
    points.
    """
    import numpy as np

    if len(lengths) <= degree:
        return None
    return np.polynomial.Polynomial.fit(lengths, times, degree).convert().coef.tolist()


def fit_label(name, coefficients):
    """ "no cache: 0.1 + 0.02 n + 1e-05 n^2 s"."""
    powers = ("", " n", " n²")
    terms = " + ".join(f"{c:.2g}{power}" for c, power in zip(coefficients, powers)).replace("+ -", "- ")
    return f"{name}, fitted: {terms} s"


def draw(folder):
    """Draw time_comparison.png from whichever of the two CSVs is in `folder`. Returns the picture's path.

    Raises UserError, naming the scripts that make them, when neither is there.
    """
    from common import plots
    from common.errors import UserError
    from common.results import read_rows

    folder = Path(folder)
    series = {}
    for file_name, name, degree in ((NO_KV, "no cache", 2), (CACHED, "KV cache", 1)):
        if (folder / file_name).exists():
            series[file_name] = (name, degree, read_rows(folder / file_name, REQUIRED, numbers=REQUIRED))
    if not any(rows for _, _, rows in series.values()):
        raise UserError(f"{folder}: neither {NO_KV} nor {CACHED}; run assignment2/no_kv.py and single_batch.py first")
    fig, (left, right) = plots.new_figure("Generating n tokens with and without a KV cache", panels=2)
    all_lengths = set()
    for name, degree, rows in series.values():
        for engine in dict.fromkeys(row.get("engine") or "ours" for row in rows):
            part = sorted((r for r in rows if (r.get("engine") or "ours") == engine), key=lambda r: r["output_length"])
            all_lengths |= {r["output_length"] for r in part}
            draw_series(left, part, name if engine == "ours" else f"{name}, {engine}", degree)
    draw_floor(left, folder, sorted(all_lengths))
    left.set(xlabel="output tokens n", ylabel="seconds for n tokens", title="Wall time")
    # Room for the legend above what was measured.
    slowest = max(row["time_p90"] for _, _, rows in series.values() for row in rows)
    left.set_ylim(0, 1.3 * slowest)
    draw_speed_up(right, folder, {name: rows for name, _, rows in series.values()})
    csvs = [folder / file_name for file_name in series]
    return plots.save(fig, folder / PICTURE, plots.footer(*csvs))


def draw_series(ax, rows, label, degree):
    """Measured medians with their band, and the fitted curve, thin and dashed, in the same colour."""
    import numpy as np

    from common import plots

    xs, times = [r["output_length"] for r in rows], [r["time"] for r in rows]
    plots.band(ax, xs, times, [r["time_p10"] for r in rows], [r["time_p90"] for r in rows], label, linestyle="none")
    coefficients = fit(xs, times, degree)
    if coefficients:
        curve = np.linspace(min(xs), max(xs), 100)
        colour = ax.lines[-1].get_color()
        values = np.polynomial.Polynomial(coefficients)(curve)
        ax.plot(curve, values, linestyle="--", linewidth=1.5, color=colour, label=fit_label(label, coefficients))


def draw_floor(ax, folder, lengths):
    """The memory-bandwidth floor of decoding: n - 1 steps, each reading the weights and the cache at the read
    ceiling.
    """
    from common.plots import CEILING_COLOUR, number
    from common.results import read_json
    from common.roofline import Ceilings

    record = next(filter(None, (read_json(folder / Path(f).with_suffix(".json")) for f in (CACHED, NO_KV))), None)
    if record is None or "weight_bytes" not in record:
        return
    prompt = record["options"]["input_length"]
    speed = Ceilings(**record["ceilings"]).memory_gb_per_s()
    floor = [
        (n - 1) * (record["weight_bytes"] + record["kv_bytes_per_token"] * (prompt + n / 2)) / (speed * 1e9)
        for n in lengths
    ]
    label = f"floor: weights and cache read at {number(speed)} GB/s"
    ax.plot(lengths, floor, color=CEILING_COLOUR, linestyle=":", label=label)


def draw_speed_up(ax, folder, rows_by_name):
    """How many times faster the cache is, at the lengths that both scripts measured; else why there is no ratio."""
    from common import plots

    times = {
        name: {r["output_length"]: r["time"] for r in rows if (r.get("engine") or "ours") == "ours"}
        for name, rows in rows_by_name.items()
    }
    both = sorted(set(times.get("no cache", {})) & set(times.get("KV cache", {})))
    ax.set(xlabel="output tokens n", ylabel="times faster", title="Speed-up by the cache")
    if reason := why_no_ratio(folder, times, both):
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, reason, ha="center", va="center", transform=ax.transAxes)
        return
    ratios = [times["no cache"][n] / times["KV cache"][n] for n in both]
    plots.band(ax, both, ratios, None, None, "no cache / KV cache")
    ax.set_ylim(0, 1.15 * max(ratios))
    ax.axhline(1, color=plots.CEILING_COLOUR, linewidth=1)


def why_no_ratio(folder, times, both):
    """What keeps the two CSVs of `folder` from being divided, in words; None where nothing does."""
    from common.results import read_json

    for name, script in (("no cache", "no_kv.py"), ("KV cache", "single_batch.py")):
        if not times.get(name):
            return f"needs {script} too"
    if not both:
        return "no length that both have measured"
    records = [read_json((folder / file_name).with_suffix(".json")) or {} for file_name in (NO_KV, CACHED)]
    for field in ("model", "dtype", "device", "prompt_token_ids"):
        first, second = (record.get(field) for record in records)
        if first is not None and second is not None and first != second:
            return f"not to be compared:\nthe {field.split('_')[0]} was another"
    return None


def main(args):
    cli.print_written(draw(cli.output_dir(args, __file__)))


if __name__ == "__main__":
    cli.run(main, cli.build_plot_parser(__doc__))

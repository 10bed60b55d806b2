"""Draws batches of equal prompts against batches of unequal ones: wall time and throughput over the batch size.

Reads uniform_prefill.csv and different_prefill.csv (whichever is there) from results/ or --out, with their provenance;
nothing is measured. The floor is the time that decoding would take if every step only read the weights and the rows' K
and V at the machine's measured bandwidth: what keeps the curves away from it is arithmetic, above all the prefill.
Output: prefill_comparison.png.

    python assignment2/graph2.py
    python assignment2/graph2.py --out /tmp/run
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli

FILES = {"uniform_prefill.csv": "equal prompts", "different_prefill.csv": "unequal prompts"}
PICTURE = "prefill_comparison.png"
REQUIRED = ("batch_size", "time", "time_p10", "time_p90", "prompt_tokens", "output_tokens", "tokens_per_s")


def draw(folder):
    """Draw prefill_comparison.png from whichever of the two CSVs is in `folder`. Returns the picture's path.

    Raises UserError, naming the scripts that make them, when neither is there.
    """
    from common import plots
    from common.errors import UserError
    from common.results import read_json, read_rows

    folder = Path(folder)
    series = {name: read_rows(folder / name, REQUIRED, numbers=REQUIRED) for name in FILES if (folder / name).exists()}
    if not any(series.values()):
        files = " nor ".join(FILES)
        raise UserError(f"{folder}: neither {files}; run assignment2/uniform_prefill.py and different_prefill.py first")
    fig, (left, right) = plots.new_figure("Batches of prompts: equal and unequal lengths", panels=2)
    sizes = set()
    for file_name, rows in series.items():
        for engine in dict.fromkeys(row.get("engine") or "ours" for row in rows):
            part = sorted((r for r in rows if (r.get("engine") or "ours") == engine), key=lambda r: r["batch_size"])
            label = FILES[file_name] if engine == "ours" else f"{FILES[file_name]}, {engine}"
            xs = [r["batch_size"] for r in part]
            sizes |= set(xs)
            low, high = [r["time_p10"] for r in part], [r["time_p90"] for r in part]
            plots.band(left, xs, [r["time"] for r in part], low, high, label)
            outputs = [r["output_tokens"] for r in part]
            slow, fast = [n / t for n, t in zip(outputs, high)], [n / t for n, t in zip(outputs, low)]
            plots.band(right, xs, [r["tokens_per_s"] for r in part], slow, fast, label)
    name = next(name for name, rows in series.items() if rows)
    record = read_json((folder / name).with_suffix(".json"))
    if record and "weight_bytes" in record:
        draw_floor(left, right, [r for r in series[name] if (r.get("engine") or "ours") == "ours"], record)
    for ax in (left, right):
        plots.log2_axis(ax, sorted(sizes))
        ax.set_ylim(0, None)
    left.set(xlabel="batch size (prompts)", ylabel="seconds for the batch", title="Wall time")
    right.set(xlabel="batch size (prompts)", ylabel="output tokens per second", title="Throughput")
    return plots.save(fig, folder / PICTURE, plots.footer(*(folder / name for name in series)))


def draw_floor(left, right, rows, record):
    """Decoding at the read ceiling: every step reads the weights once, and each row's K and V so far."""
    from common.plots import CEILING_COLOUR, number
    from common.roofline import Ceilings

    speed = Ceilings(**record["ceilings"]).memory_gb_per_s()
    rows = sorted(rows, key=lambda r: r["batch_size"])
    floor = []
    for row in rows:
        steps = row["output_tokens"] / row["batch_size"] - 1
        kv_tokens = row["prompt_tokens"] + row["batch_size"] * steps / 2
        floor.append(steps * (record["weight_bytes"] + kv_tokens * record["kv_bytes_per_token"]) / (speed * 1e9))
    xs = [row["batch_size"] for row in rows]
    read = f"{number(speed)} GB/s"
    left.plot(xs, floor, color=CEILING_COLOUR, linestyle=":", label=f"floor of decoding: reads at {read}")
    ceiling = [row["output_tokens"] / t if t else None for row, t in zip(rows, floor)]
    top = max(row["tokens_per_s"] for row in rows)
    # The ceiling of throughput is far above the curves at large batches; it is drawn as far as it can be seen.
    near = [(x, c) for x, c in zip(xs, ceiling) if c is not None and c <= 3 * top]
    if near:
        right.plot(*zip(*near), color=CEILING_COLOUR, linestyle=":", label=f"ceiling of decoding at {read}")


def main(args):
    cli.print_written(draw(cli.output_dir(args, __file__)))


if __name__ == "__main__":
    cli.run(main, cli.build_plot_parser(__doc__))

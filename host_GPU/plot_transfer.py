"""How fast do copies between host and device get, and from which size on? Draws transfer.png from transfer.csv.

main.cu measures pageable and page-locked ("pinned") memory in both directions and writes transfer.csv.

    python host_GPU/plot_transfer.py
    python host_GPU/plot_transfer.py --csv build/transfer.csv --out figures
"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COLUMNS = {"bytes", "memory", "direction", "time_us", "gb_per_s"}


def read_series(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Label -> (sizes in bytes, GB/s). Ends with one line where the file is missing or is another."""
    if not path.is_file():
        sys.exit(f"error: {path}: no such file; build and run main.cu first (README.md), on a machine with a GPU")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(rows[0]) >= COLUMNS:
        sys.exit(f"error: {path}: needs rows with the columns {', '.join(sorted(COLUMNS))}")
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        sizes, speeds = series.setdefault(f"{row['memory']}, {row['direction']}", ([], []))
        sizes.append(int(row["bytes"]))
        speeds.append(int(row["bytes"]) / float(row["time_us"]) * 1e-3)  # gb_per_s is rounded: coarse for few bytes
    return series


def machine_of(facts: dict) -> str:
    """The footer: device, CUDA of the driver, repeats and date, as transfer.json has them."""
    if not facts:
        return "machine not recorded"
    driver = int(facts.get("driver", 0))
    parts = [facts.get("device", "unknown device"), f"driver's CUDA {driver // 1000}.{driver % 1000 // 10}"]
    return " · ".join([*parts, f"median of {facts.get('repeats', '?')}", str(facts.get("utc", ""))[:10]])


def draw(series: dict[str, tuple[list[int], list[float]]], machine: str, target: Path) -> None:
    from common import plots

    figure, ax = plots.new_figure("Copies between host and device")
    for number, (label, (sizes, speeds)) in enumerate(series.items()):
        style = "-" if "pinned" in label else "--"
        hollow = "white" if "device to host" in label else None  # where two lines lie upon each other both show
        ax.plot(
            sizes,
            speeds,
            label=label,
            linestyle=style,
            color=plots.COLOURS[number % len(plots.COLOURS)],
            marker=plots.MARKERS[number % len(plots.MARKERS)],
            markerfacecolor=hollow,
            markersize=4 if hollow else 8,
        )
    peak = max(max(speeds) for _, speeds in series.values())
    plots.ceiling_line(ax, peak, "best measured", "GB/s", digits=3)
    ax.set_yscale("log")
    plots.log2_axis(ax, sorted({size for sizes, _ in series.values() for size in sizes}))
    ax.set(xlabel="bytes", ylabel="GB/s")
    plots.save(figure, target, machine)


def main() -> None:
    here = Path(__file__).resolve().parent
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--csv", type=Path, help="default: transfer.csv here, else beside this script")
    p.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: beside the CSV")
    args = p.parse_args()
    path = args.csv or next(
        (f for f in (Path("transfer.csv"), here / "transfer.csv") if f.is_file()), here / "transfer.csv"
    )
    series = read_series(path)
    facts = path.with_suffix(".json")
    machine = machine_of(json.loads(facts.read_text()) if facts.is_file() else {})
    folder = args.out or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    draw(series, machine, folder / "transfer.png")
    print(f"wrote {folder / 'transfer.png'}")
    for memory in ("pinned", "pageable"):
        top = max((max(speeds) for label, (_, speeds) in series.items() if label.startswith(memory)), default=0.0)
        print(f"{memory}: at best {top:.1f} GB/s")


if __name__ == "__main__":
    main()

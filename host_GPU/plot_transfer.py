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
        speeds.append(float(row["gb_per_s"]))
    return series


def draw(series: dict[str, tuple[list[int], list[float]]], machine: str, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for label, (sizes, speeds) in series.items():
        axes.plot(sizes, speeds, marker="o", markersize=3, label=label, linestyle="-" if "pinned" in label else "--")
    peak = max(max(speeds) for _, speeds in series.values())
    axes.axhline(peak, color="grey", linewidth=0.8, label=f"best measured: {peak:.1f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="GB/s", title="Copies between host and device")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.text(0.01, 0.01, machine, fontsize=7)
    figure.savefig(target, dpi=150, bbox_inches="tight")


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
    machine = (
        " | ".join(str(v) for v in json.loads(facts.read_text()).values())
        if facts.is_file()
        else "machine not recorded"
    )
    folder = args.out or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    draw(series, machine, folder / "transfer.png")
    print(f"wrote {folder / 'transfer.png'}")
    for memory in ("pinned", "pageable"):
        top = max((max(speeds) for label, (_, speeds) in series.items() if label.startswith(memory)), default=0.0)
        print(f"{memory}: at best {top:.1f} GB/s")


if __name__ == "__main__":
    main()

"""`make demo`: assignment 2 at laptop sizes on the embedded model, then what came out, in words and files.

python -m common.demo
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common import cli
from common.results import read_rows

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "assignment2"
MEASURING = ("no_kv", "single_batch", "uniform_prefill", "different_prefill")
DRAWING = ("graph1", "graph2")
CSVS = {"no_kv": "no_kv_times.csv", "single_batch": "single_batch_times.csv"} | {
    name: f"{name}.csv" for name in ("uniform_prefill", "different_prefill")
}
PNGS = ("time_comparison.png", "prefill_comparison.png")


def main(args) -> None:
    out = ["--out", args.out] if args.out else []
    scripts = [*MEASURING, *DRAWING]
    for number, name in enumerate(scripts, start=1):
        script_options = [*(options(args) if name in MEASURING else []), *out]
        shown = " ".join(["python", f"assignment2/{name}.py", *script_options])
        print(f"\n[{number}/{len(scripts)}] {shown}", flush=True)
        command = [sys.executable, str(FOLDER / f"{name}.py"), *script_options]
        code = wait(subprocess.Popen(command))
        if code:
            raise SystemExit(code)  # the script has said why
    summarise(Path(args.out) if args.out else FOLDER / "results")


def options(args) -> list[str]:
    return ["--model", "embedded", "--device", "cpu", "--preset", args.preset]


def wait(process: subprocess.Popen) -> int:
    """The exit code. Ctrl-C reaches the script too, which then still writes and draws: it is given the time."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def summarise(folder: Path) -> None:
    """The findings of the run in `folder`, computed from its CSVs, and the list of its files."""
    rows = {name: read_rows(folder / file, ()) for name, file in CSVS.items()}
    slow, fast = rows["no_kv"][-1], rows["single_batch"][-1]
    print("\n== What this machine showed")
    print(
        f"- A KV cache: {fast['output_length']} tokens took {fast['time']:.1f} s instead of {slow['time']:.1f} s, "
        f"{slow['time'] / fast['time']:.1f} times faster, and the gap grows with the length."
    )
    for name, what in (("uniform_prefill", "equal"), ("different_prefill", "unequal")):
        first, last = rows[name][0], rows[name][-1]
        speeds = f"{last['tokens_per_s']:.0f} tokens/s instead of {first['tokens_per_s']:.0f}"
        print(
            f"- Batching {last['batch_size']} prompts of {what} lengths: {speeds}, "
            f"in {last['time'] / first['time']:.1f} times the wall time of one."
        )
    print("\n== Files")
    for file in (*CSVS.values(), *PNGS):
        cli.print_written(folder / file)


def build_parser():
    parser = cli.build_plot_parser(__doc__)
    parser.add_argument("--preset", choices=("quick", "laptop"), default="laptop", help="sizes (default: laptop)")
    return parser


if __name__ == "__main__":
    cli.run(main, build_parser())

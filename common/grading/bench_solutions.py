"""How fast is each step of each ladder on this GPU, beside a copy of the same bytes and the peers?

Builds every solution with nvcc, checks it on all cases, times it, prints a table and writes solutions.csv with
solutions.json (device, versions, time).

    python -m common.grading.bench_solutions
    python -m common.grading.bench_solutions --lab host_GPU --out results
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.errors import UserError
from common.grading import build, gpu
from common.grading.grader import Options, gpu_present, grade
from common.grading.lab import LABS, ROOT, get

COLUMNS = ["lab", "solution", "outcome", "time_us", "gb_per_s", "copy_gb_per_s", "share", "peers_gb_per_s"]


def bench(lab, step: Path) -> dict:
    # Naming every case leaves the timing to us.
    report = grade(lab, step, Options(cases=("=",)))
    row = dict.fromkeys(COLUMNS, "") | {"lab": lab.name, "solution": step.stem, "outcome": report.outcome.value}
    if report.outcome.exit_code:
        row["peers_gb_per_s"] = report.lesson.text if report.lesson else ""
        return row
    with tempfile.TemporaryDirectory(prefix="tlab-bench-") as folder:
        work = Path(folder)
        artefact = step if lab.kind == "triton" else build.build_gpu(lab, step, work).programs["library"]
        speed = gpu.as_speed(gpu.run_worker(lab, artefact, work))
    row |= {
        "time_us": round(speed.time_us, 2),
        "gb_per_s": round(speed.gb_per_s, 1),
        "copy_gb_per_s": round(speed.copy_gb_per_s, 1),
        "share": round(speed.share, 4),
        "peers_gb_per_s": "; ".join(f"{name} {value:.0f}" for name, value in speed.peers.items()),
    }
    return row


def provenance() -> dict:
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.mem",
        "--format=csv,noheader",
    ]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "nvcc": subprocess.run([str(build.nvcc()), "--version"], capture_output=True, text=True)
        .stdout.strip()
        .splitlines()[-2:],
        "python": platform.python_version(),
        "commit": commit,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(sys.argv),
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lab", action="append", choices=list(LABS), help="only this lab; repeatable")
    p.add_argument("--out", type=Path, default=Path("results"), metavar="DIR")
    args = p.parse_args()
    if not gpu_present():
        print("error: needs a GPU and nvcc", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    failed = False
    with (args.out / "solutions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name in args.lab or LABS:
            lab = get(name)
            for step in lab.solutions():
                try:
                    row = bench(lab, step)
                except UserError as error:
                    row = dict.fromkeys(COLUMNS, "") | {"lab": name, "solution": step.stem, "outcome": str(error)}
                failed |= row["outcome"] != "correct"
                writer.writerow(row)
                file.flush()
                print("  ".join(f"{row[c]!s:>12}" for c in COLUMNS), flush=True)
    (args.out / "solutions.json").write_text(json.dumps(provenance(), indent=2) + "\n")
    print(f"wrote {args.out / 'solutions.csv'} and solutions.json")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

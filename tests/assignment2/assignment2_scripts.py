"""How the tests start assignment 2's scripts."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "assignment2"
MEASURING = ("no_kv", "single_batch", "uniform_prefill", "different_prefill")
TINY = ("--model", "random:tiny", "--device", "cpu", "--preset", "quick")


LENGTH_HEADER = "output_length,time,time_p10,time_p90,tokens_per_s"
BATCH_HEADER = "batch_size,time,time_p10,time_p90,prefill_time,decode_time,prompt_tokens,output_tokens,tokens_per_s"
HEADERS = {
    "no_kv": LENGTH_HEADER,
    "single_batch": LENGTH_HEADER + ",prefill_time",
    "uniform_prefill": BATCH_HEADER,
    "different_prefill": BATCH_HEADER,
}
FILES = {
    "no_kv": "no_kv_times",
    "single_batch": "single_batch_times",
    "uniform_prefill": "uniform_prefill",
    "different_prefill": "different_prefill",
}
PICTURES = {
    "no_kv": "time_comparison.png",
    "single_batch": "time_comparison.png",
    "uniform_prefill": "prefill_comparison.png",
    "different_prefill": "prefill_comparison.png",
}


def command(name: str, *args: object, folder: Path = FOLDER) -> list[str]:
    return [sys.executable, str(folder / f"{name}.py"), *map(str, args)]


def run(name: str, *args: object, folder: Path = FOLDER, code: int = 0, **kw) -> subprocess.CompletedProcess:
    """Run a script to its end and assert its exit code."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | kw.pop("env", {})
    done = subprocess.run(
        command(name, *args, folder=folder), capture_output=True, text=True, timeout=180, env=env, **kw
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

"""continous_main.py under torchrun: two processes, one request set, one report.

Catches: a request served twice or by nobody, tokens that depend on the rank, rows of one rank alone in the CSVs, two
processes writing one file, an option that only some ranks can follow.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "assignment4/Section1/continous_main.py"
OPTIONS = ["--preset", "quick", "--model", "random:tiny", "--device", "cpu", "--kv-pages", "200"]


def start(*options, ranks):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(SCRIPT), *OPTIONS, *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_ranks_serve_the_set_between_them(tmp_path):
    one = start("--out", tmp_path / "one", "--dump-tokens", tmp_path / "one.jsonl", ranks=1)
    two = start("--out", tmp_path / "two", "--dump-tokens", tmp_path / "two.jsonl", ranks=2)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    summaries = [rows_of(tmp_path / name / "continous_summary.csv") for name in ("one", "two")]
    for alone, together in zip(*summaries, strict=True):
        assert together["policy"] == alone["policy"]
        assert (together["requests"], together["output_tokens"]) == (alone["requests"], alone["output_tokens"])
    requests = [row for row in rows_of(tmp_path / "two/continous_requests.csv") if row["policy"] == "continuous"]
    assert [int(row["request"]) for row in requests] == list(range(8))
    iterations = rows_of(tmp_path / "two/continous_iterations.csv")
    assert {row["replica"] for row in iterations} == {"0", "1"}
    assert json.loads((tmp_path / "two/continous_summary.json").read_text())["world"] == 2
    assert two.stdout.count("wrote ") == one.stdout.count("wrote ")


def test_two_ranks_run_the_policies_that_are_named(tmp_path):
    done = start("--out", tmp_path, "--policies", "continuous", "--no-plot", ranks=2)
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path / "continous_summary.csv")
    assert (row["policy"], row["requests"]) == ("continuous", "8")
    assert {row["replica"] for row in rows_of(tmp_path / "continous_iterations.csv")} == {"0", "1"}
    assert " instead of " not in done.stdout and " against " not in done.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (["--simulate", "h200:llama3-8b"], "--simulate: not under torchrun"),
        (["--resume"], "--resume: not under torchrun"),
        (["--compare", "hf"], "--compare: not under torchrun"),
        (["--num-requests", "1"], "1 requests cannot keep 2 ranks busy"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused(options, message, tmp_path):
    done = start("--out", tmp_path / "out", *options, ranks=2)
    assert done.returncode != 0 and message in done.stderr
    assert not list(tmp_path.glob("out/*"))

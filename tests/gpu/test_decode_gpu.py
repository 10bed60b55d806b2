"""On a GPU: every bar of the ablation gives the same tokens, 16 bits hold their limits, the start is taken apart."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.kernels import runtime
from common.results import read_rows
from common.scripts import ablation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "assignment3" / "section3" / "flashinfer_pipeline.py"


def run(*command):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900
    )


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_ablation(dtype, tmp_path):
    options = ["--model", "random:smollm2-135m", "--preset", "quick", "--dtype", dtype, "--out", tmp_path]
    done = run(SCRIPT, "--ablation", *options)
    # This model is small enough for a cache to hold: figures above the memory ceiling are possible, other tokens not.
    assert done.returncode == 0 or "105 % of their ceiling" in done.stderr, done.stderr
    rows = read_rows(tmp_path / "pipeline_ablation.csv", ablation.COLUMNS)
    found = [row["technique"] for row in rows if row["batch_size"] == 1]
    assert found[:3] == ["no cache", "KV cache", "fused qkv, gate_up"]
    if runtime.HAS_TRITON and torch.cuda.get_device_capability() >= (7, 5):
        assert found[3:] == [
            "fused norms, activation, residual", "paged attention kernel", "CUDA graph", "matrix-vector kernels",
        ]  # fmt: skip


def test_16_bits_hold_their_limits(tmp_path):
    done = run("-m", "common.fidelity", "--model", "embedded", "--out", tmp_path)
    if done.returncode == 2 and "could not be fetched" in done.stderr:
        pytest.skip("the embedded model is not to be had")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_start_is_taken_apart(tmp_path):
    done = run(SCRIPT, "--model", "random:tiny", "--no-sweep", "--max-new-tokens", 4, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    ready = re.search(r"ready in ([0-9.]+) s: .*kernels \((cold|warm): ", done.stdout)
    first = re.search(r"first token ([0-9.]+) s after the command \((cold|warm): ", done.stdout)
    assert float(ready[1]) <= float(first[1])

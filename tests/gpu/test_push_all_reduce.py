"""Our all-reduces on GPUs: two ranks on one GPU, and one rank a GPU where there are more.

Catches what the interpreter cannot show: stores and loads that are not seen between kernels in flight, a counter read
before the kernel before has written it, graphs whose replays are not the calls that they were captured as.
Each runs in a process of its own: a kernel that waits for ever is ended with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROGRAMS = Path(__file__).resolve().parents[1] / "common" / "rank_programs"


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_ranks_on_one_gpu():
    found = run(PROGRAMS / "two_streams.py")
    assert found["replays"] >= 50 and found["eager"] > 50


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("world_size", sorted({2, min(torch.cuda.device_count(), 4)} - {0, 1}))
def test_ranks_on_their_own_gpus(world_size):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    found = run(*command, PROGRAMS / "sums.py")
    if found["problem"]:
        pytest.skip(f"symmetric memory: {found['problem']}")
    assert found["sums"] > 500
    assert all(": the same tokens" in verdict for verdict in found["tokens"])

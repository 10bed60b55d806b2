"""What one GPU can show of tensor parallelism: NCCL and symmetric memory inside CUDA graphs, and the way out of them.

A group of one rank sums nothing, but everything is launched, captured, replayed and torn down as with many.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "common" / "rank_programs" / "one_gpu.py"
LOOP = PROGRAM.with_name("loop.py")
spec = importlib.util.spec_from_file_location("processes", ROOT / "tests" / "common" / "test_distributed.py")
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)


def torchrun(*arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=1",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("choice", ["nccl", "auto", "symm"])
def test_decode_graphs_hold_the_collectives_and_the_process_ends(choice):
    done = torchrun(PROGRAM, choice)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if choice != "nccl" and found["problem"]:
        pytest.skip(f"symmetric memory: {found['problem']}")
    assert all(found["sums"].values()), found
    assert found["same"]
    if choice != "nccl":
        assert set(found["sums"]) == {"as chosen", "library", "one_shot", "two_shot", "low_latency", "push"}
    if choice == "symm":
        assert len(found["lines"]) == 2 and not any("using library" in line for line in found["lines"])


@pytest.mark.parametrize("how", ["killed", "stopped", "late"])
def test_a_rank_in_a_spinning_kernel_is_ended(how, tmp_path):
    """Its collective waits on the GPU for a rank that is gone, or for longer than was said: nothing but the heartbeat
    can end it, since the main thread waits for the device.
    """
    run = processes.Run([LOOP, "spin:8" if how == "late" else "spin:600"], tmp_path)
    pids = run.pids(2)
    end = time.monotonic() + 60
    while "spinning" not in run.err.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    if how != "late":
        os.kill(pids[1], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    code, lines = run.wait()
    named = {"killed": "rank 1.*(killed|gone)", "stopped": "rank 1.*no sign of life", "late": "the kernel"}[how]
    assert code == 1 and any(re.search(named, line) for line in lines), lines
    assert processes.gone(pids.values())


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="needs a machine with exactly one GPU")
def test_a_plain_profile_says_that_one_gpu_is_too_few(tmp_path):
    script = ROOT / "assignment4" / "Section2" / "profile_allreduce.py"
    command = [sys.executable, str(script), "--preset", "quick", "--out", str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 GPU(s) here, 2 processes: profiling gloo between 2 CPU processes instead" in done.stdout


def test_more_processes_than_gpus_are_refused():
    count = torch.cuda.device_count() + 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    script = ROOT / "assignment4" / "Section2" / "transformer-tp2.py"
    command += [str(script), "--model", "random:tiny", "--device", "cuda", "--prompt", "hi"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert f"{count} processes on this host, {count - 1} GPU(s) visible; start {count - 1}" in done.stderr

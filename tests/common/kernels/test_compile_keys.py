"""Is a kernel compiled once for each choice of tiles, whatever the sizes of a step? (compile_keys.py)

Catches: an int or a pointer that changes from step to step and that Triton specialises on. The first step with sixteen
prompts, or with an odd number of decodes before them, then compiles for a second while every request waits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.kernels import runtime

PROGRAM = Path(__file__).with_name("compile_keys.py")


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("seed", [0, 1])
def test_no_size_of_a_step_compiles_anew(seed):
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(PROGRAM.parents[3])}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(seed)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    names = {
        "argmax",
        "balanced_decode",
        "merge_shares",
        "paged_decode",
        "merge",
        "paged_prefill",
        "rms_norm",
        "rope_append",
        "small_gemm",
    }
    assert set(found) == {f"_{name}_kernel" for name in (*names, "low_latency", "push")}
    assert {name: line["compiled_more_than_once"] for name, line in found.items()} == dict.fromkeys(found, {})
    assert found["_paged_prefill_kernel"]["choices"] == 2  # with prior context and without

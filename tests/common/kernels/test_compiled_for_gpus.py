"""Do the tiles that the launchers choose for a GPU fit it? Compiled for it, without it (compiled_for.py).

Catches: a choice made for a large device and taken by a small one, which fails there when it is launched: too much
shared memory, too many threads, an instruction that the device does not have.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.kernels import runtime

PROGRAM = Path(__file__).with_name("compiled_for.py")
# Shared memory that one block may have, in KiB: CUDA C++ programming guide, table of compute capabilities.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# Capability, dtype, multiprocessors: the least shared memory, what most cards have, and the plans of Hopper. A device
# takes a minute or two; others by hand: `python tests/common/kernels/compiled_for.py 86 float16 28`.
DEVICES = [(75, "float16", 40), (90, "bfloat16", 132), (120, "bfloat16", 170)]


@pytest.mark.slow
@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("capability, dtype, num_sms", DEVICES)
def test_every_choice_fits(capability, dtype, num_sms, tmp_path):
    """A minute of compiling a device."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(PROGRAM), str(capability), dtype, str(num_sms)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    names = {"argmax", "matvec", "paged_decode", "merge", "paged_prefill", "rms_norm", "rope_append", "silu_mul"}
    names |= {"small_gemm", "low_latency", "push"}
    names |= {"balanced_decode", "merge_shares"} if capability >= 90 else set()
    assert {line["kernel"] for line in found} == {f"_{name}_kernel" for name in names}
    too_large = [line for line in found if line["shared"] > SHARED_KIB[capability] << 10]
    assert too_large == []
    assert all(line["num_warps"] <= 16 for line in found)

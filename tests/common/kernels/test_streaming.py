"""The streaming kernels in Triton's interpreter: every configuration copies every word and adds every word once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]
# Small values: the interpreter adds in 64 bits and refuses a sum that would wrap.
PROBE = """
import torch
from common.kernels import streaming

words = streaming.ALIGN_WORDS
src = torch.randint(-8192, 8192, (words,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
for config in streaming.COPY_CONFIGS:
    dst = torch.zeros_like(src)
    streaming.copy(src, dst, config)
    assert torch.equal(dst, src), config
    assert words % config[0] == 0
for config in streaming.READ_CONFIGS:
    piece = config[0] * config[1]
    partial = torch.zeros(words // 16384, dtype=torch.int32)
    streaming.read(src, partial, config)
    expected = src.view(-1, piece).sum(1, dtype=torch.int64).to(torch.int32)
    assert torch.equal(partial[: words // piece], expected), config
for bad in (src[:-1], src.float(), src[:0], src.view(2, -1)):
    try:
        streaming.read(bad, partial)
    except ValueError:
        continue
    raise AssertionError(bad.shape)
"""


def test_kernels_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr

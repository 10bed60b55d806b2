"""Tests silu_triton_kernel.py against silu_torch.py, on a GPU or, without one, under Triton's interpreter.

    python silu/silu_triton_test.py
    python -m pytest silu/silu_triton_test.py -k strided

grade.py checks more (memory accesses, special values, speed); this is for trying things out.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from silu.silu_torch import silu_torch
from silu.silu_triton_kernel import silu_triton


def check(x: torch.Tensor) -> None:
    before = x.clone()
    y = silu_triton(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert torch.equal(x, before), "the input was changed"
    torch.testing.assert_close(y, silu_torch(x))


@pytest.mark.parametrize("n", [1, 31, 33, 1023, 1025, 10007])
def test_sizes(n):
    check(torch.randn(n, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtypes(dtype):
    check(4 * torch.randn(1000, device=DEVICE).to(dtype))


def test_strided():
    check(torch.randn(64, 48, device=DEVICE).t())
    check(torch.randn(2001, device=DEVICE)[::2])


def test_wide():
    check(torch.linspace(-120, 120, 1001, device=DEVICE))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))

"""The kernel bench where it cannot measure: what it says, and what it would compare."""

import pytest
import torch

from common.errors import CheckFailed, UserError
from common.kernels import bench, bench_cases


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    with pytest.raises(UserError, match="CUDA"):
        bench.main(bench.build_parser().parse_args(["--device", "cpu", "--out", str(tmp_path)]))
    assert not list(tmp_path.iterdir())


def test_kernels_are_chosen_by_name():
    assert bench.chosen("silu_mul, rms_norm", bench_cases.CASES) == ["silu_mul", "rms_norm"]
    with pytest.raises(UserError, match="rms_nrom"):
        bench.chosen("rms_nrom", bench_cases.CASES)
    with pytest.raises(UserError, match="empty"):
        bench.chosen(",", bench_cases.CASES)


def test_relative_error():
    want = torch.tensor([3.0, 4.0])
    assert bench.relative_error(want + torch.tensor([0.0, 0.5]), want) == pytest.approx(0.1)
    assert bench.relative_error(torch.tensor([float("nan"), 4.0]), want) == float("inf")
    assert bench.relative_error(None, want) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the timing is faked on a CPU only")
def test_a_wrong_kernel_is_never_timed(monkeypatch):
    def sample(calls):
        raise AssertionError("timed before it was checked")

    monkeypatch.setattr(bench.timing, "graph_sample", sample)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    case = bench_cases.Case("k", "s", "copy", 1, 2, lambda: torch.ones(4), {"ours": lambda i: torch.full((4,), 1.5)})
    with pytest.raises(CheckFailed, match="ours differs"):
        bench.measure(case, None, torch.float32, 3)

"""The kernel bench where it cannot measure: what it says, and what it would compare."""

import pytest
import torch

from common.errors import CheckFailed, UserError
from common.kernels import bench, bench_cases, runtime


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    with pytest.raises(UserError, match="CUDA"):
        bench.main(bench.build_parser().parse_args(["--device", "cpu", "--out", str(tmp_path)]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("typed", [["--preset", "quick"], ["--warmup", "3"], ["--no-plot"]])
def test_what_the_bench_would_ignore_is_refused(typed, tmp_path):
    with pytest.raises(UserError, match=typed[0]):
        bench.main(bench.build_parser().parse_args([*typed, "--out", str(tmp_path)]))


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


@pytest.mark.skipif(not runtime.INTERPRETED, reason="the copy kernel runs on a CPU in Triton's interpreter only")
@pytest.mark.parametrize("name", bench_cases.CASES)
def test_every_engine_agrees_with_its_reference(monkeypatch, name):
    small = {
        "HIDDEN": 64,
        "FFN": 96,
        "VOCAB": 100,
        "HEADS": 4,
        "KV_HEADS": 2,
        "HEAD_DIM": 16,
        "QKV": 128,
        "ROWS": (1, 3),
    }
    small |= {"ELEMENTWISE_ROWS": (2,), "DECODES": ((1, 40), (3, 17)), "PREFILLS": ((2, 32),)}
    small |= {"RAGGED_DECODES": (5,), "RAGGED_CONTEXTS": (3, 40)}
    for constant, value in small.items():
        monkeypatch.setattr(bench_cases, constant, value)
    monkeypatch.setattr(bench_cases, "_copies", lambda num_bytes, device: 2)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    with torch.inference_mode():
        for case in bench_cases.CASES[name](torch.device("cpu"), torch.float32):
            assert 0 < case.amount < 1e6, "a size that is not among the small ones: the interpreter takes minutes"
            errors = bench.checked(case, 1e-5)
            assert errors.keys() == case.engines.keys(), "an engine was left out"
            assert errors["ours"] is not None
            case.engines["other"] = lambda i, run=case.engines["ours"]: run(1)  # other inputs: not a constant result
            assert "other" not in bench.checked(case, 1e-5)

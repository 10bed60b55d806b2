"""Every attention backend of this machine, on CUDA: right on ragged shapes, captured in a graph; and both scripts."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import timing
from common.attention_bench import backends as attention_backends
from common.attention_bench.backends.base import DecodeCase, PrefillCase
from common.attention_bench.backends.reference import TOLERANCE, reference, relative_error
from common.attention_bench.options import Heads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]
SECTION2 = ROOT / "assignment3/section2"
HEADS = [Heads(32, 8, 128), Heads(8, 8, 128), Heads(16, 2, 64)]
NAMES = [(b.name, phase) for b in attention_backends.ALL for phase in b.phases]


def cases(phase, dtype):
    """All shapes in bfloat16, one of each kind in float16: every head size, page size and dtype is compiled anew."""
    whole = dtype == torch.bfloat16
    for heads in HEADS if whole else HEADS[1:2]:  # without grouped heads, which some of torch's kernels refuse
        if phase == "prefill":
            yield PrefillCase(heads, (200, 200, 200), (200, 200, 200), dtype, CUDA)
            yield PrefillCase(heads, (1, 77, 300), (65, 77, 1000), dtype, CUDA)
        else:
            for page_size in (1, 16, 256) if whole and heads == HEADS[0] else (16,):
                yield DecodeCase(heads, (1024,) * 4, page_size, dtype, CUDA)
                yield DecodeCase(heads, (1, 17, 999, 2500, 256), page_size, dtype, CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name, phase", NAMES)
def test_backend_is_right_and_can_be_captured(name, phase, dtype):
    backend = attention_backends.BY_NAME[name]
    reason = backend.missing(CUDA)
    if reason is None and name.startswith("flashinfer") and dtype == torch.float16:
        reason = "compiles for minutes for each dtype"
    if reason:
        pytest.skip(f"{name}: {reason}")
    done, refused = 0, []
    for case in cases(phase, dtype):
        reason = backend.unsupported(case)
        if reason:
            refused.append(reason)
            continue
        x = case.inputs(done)
        expected = reference(case, x)
        try:
            call = backend.prepare(case).bind(x)
            error = relative_error(call(), expected)
        except Exception as refusal:  # a library's own limits; ours has none here
            assert not backend.ours, refusal
            refused.append(str(refusal).splitlines()[0])
            torch.cuda.synchronize()
            continue
        assert error < TOLERANCE[dtype], (case.heads, case.kv_lens, getattr(case, "page_size", None))
        done += 1
        graph, count = timing.capture([call, call])
        graph.replay()
        torch.cuda.synchronize()
        assert count == 20
    print(f"{name}, {phase}: {done} cases right; refused: {sorted(set(refused))}")
    assert not (backend.ours and refused)
    if not done and not name.startswith("torch-"):
        pytest.skip(f"{name} refuses every case: {sorted(set(refused))}")
    assert done, f"{name} refused every case: {sorted(set(refused))}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where both scripts keep the ceilings, measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("script", ["flashattention_single_layer", "flashattention_decode"])
def test_script_measures_in_graphs_below_the_ceiling(script, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TLAB_CACHE", str(cache))
    command = [sys.executable, str(SECTION2 / f"{script}.py"), "--preset", "quick", "--config", "llama3-8b"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for path in tmp_path.glob("*_performance_*.csv") for row in csv.DictReader(path.open())]
    timed = [row for row in rows if row["status"] == "ok"]
    assert {"torch-flash", "triton"} <= {row["backend"] for row in timed}
    assert {row["form"] for row in timed if row["backend"] == "triton"} == {"graph"}
    assert not [row for row in rows if row["status"] in ("wrong", "failed")]

"""Ceilings of a real card: the kernels compile and are right, and the figures hold together."""

import pytest
import torch

from common import roofline, timing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLAB_CACHE", str(tmp_path))


def test_streaming_kernels_are_right_beyond_32_bit_offsets():
    from common.kernels import streaming

    words = (1 << 29) + streaming.ALIGN_WORDS  # more than 2^31 bytes
    if torch.cuda.mem_get_info()[0] < 10 * words:
        pytest.skip(f"needs {10 * words >> 30} GiB of free GPU memory")
    src = torch.arange(words, dtype=torch.int32, device="cuda")
    for config in streaming.COPY_CONFIGS:
        dst = torch.zeros_like(src)
        streaming.copy(src, dst, config)
        assert torch.equal(dst, src), config
    for config in streaming.READ_CONFIGS:
        partial = torch.zeros(words // 16384 + 1, dtype=torch.int32, device="cuda")
        streaming.read(src, partial, config)
        expected = src.view(-1, config[0] * config[1]).sum(1, dtype=torch.int64).to(torch.int32)
        assert torch.equal(partial[: len(expected)], expected), config


def test_a_graph_holds_every_call_and_its_time_is_per_call():
    counts = torch.zeros(3, dtype=torch.int64, device="cuda")
    calls = [lambda c=counts[i : i + 1]: c.add_(1) for i in range(3)]
    timed = timing.graph_kernel_time(calls, repeats=5)
    assert len(timed.samples) == 5 and 0 < timed.median_s < 1e-3
    # One call each to warm up, then 7 rounds (21 calls, at least 20) in every replay: 4 to try, several a sample.
    count = counts[0].item()
    assert counts.tolist() == [count] * 3 and (count - 1) % 7 == 0 and (count - 1) // 7 >= 4 + 5


def test_events_see_the_work_and_not_only_its_launch():
    a = torch.randn(8192, 8192, device="cuda")
    timed = timing.measure(lambda: a @ a, device="cuda", warmup=2, repeats=3)
    assert timed.median_s > 2 * 8192**3 / 2e15, "no card does float32 products at 2,000 TFLOP/s"


def test_quick_ceilings_hold_together():
    free = torch.cuda.mem_get_info()[0]
    found = roofline.ceilings("cuda", torch.bfloat16)
    assert found.device_type == "cuda" and found.cache_bytes > 1 << 20
    assert 50 < found.copy_gb_per_s < 20_000 and found.copy_gb_per_s < 1.2 * found.read_gb_per_s
    rates = found.tflops["bfloat16"]
    assert 1 < rates["sustained"] <= rates["burst"] < 10_000
    assert torch.cuda.mem_get_info()[0] > free - (256 << 20), "the buffers were given back"
    assert roofline.ceilings("cuda", torch.bfloat16) == found

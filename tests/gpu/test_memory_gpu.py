"""Memory of the engine on a GPU: pages take what is left, and nothing grows while it serves."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from common.checkpoint import load
from common.engine import Engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
spec = importlib.util.spec_from_file_location("growth", Path(__file__).parents[1] / "common" / "test_growth.py")
growth = importlib.util.module_from_spec(spec)
spec.loader.exec_module(growth)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="takes all of the memory: not beside other processes")
def test_pages_cover_what_weights_graphs_and_the_largest_step_leave(empty_device):
    """So many requests that more pages would be of use; afterwards the largest step still runs."""
    model, _ = load("random:llama3-8b", device="cuda", dtype="bfloat16", context=8192, quiet=True)
    engine = Engine(model, max_requests=2048, max_step_tokens=8192)
    assert engine.capture_graphs(64).startswith("CUDA graphs: ")
    assert engine.pool_share > 0.95, engine.describe_pool()
    from common.serving import Chunk, InputRequest, Request

    requests = [Request(InputRequest(prompt_token_ids=[7] * 1024, output_len=2), i) for i in range(8)]
    engine.launch([Chunk(r, 0, 1024) for r in requests]).tokens()
    engine.launch([Chunk(r, 1024, 1) for r in requests]).tokens()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_allocated_memory_does_not_grow_over_ten_thousand_steps(backend):
    model, _ = load("random:tiny", device="cuda", dtype="bfloat16", quiet=True)
    engine = Engine(model, backend=backend, page_size=16, num_pages=24, max_requests=12)
    engine.capture_graphs(6)
    growth.wave(engine, model, 1, 1000)
    torch.cuda.synchronize()
    before, allocated = growth.state(engine), torch.cuda.memory_allocated()
    growth.wave(engine, model, 2, 10_000)
    torch.cuda.synchronize()
    after = growth.state(engine)
    assert torch.cuda.memory_allocated() <= allocated
    assert after["lines"] == before["lines"] == (0, 12, 0) and after["pages"] == before["pages"]
    assert after["objects"] < before["objects"] + 200

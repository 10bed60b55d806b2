"""The engine on a GPU: Hugging Face's tokens, CUDA graphs against none, overlapped steps against synchronous.

Memory is NaN before it is written and after it is given back, so nothing stale is ever read.
"""

import dataclasses
import importlib.util
import os
import random

import pytest
import torch

from common.checkpoint import Shard, build
from common.config import SHAPES
from common.engine import Engine
from common.equality import require_equal
from common.errors import UserError
from common.paged.graphs import bucket_of
from common.pages import pages_for
from common.peers import HuggingFacePeer
from common.serving import Chunk, InputRequest, Request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = torch.device("cuda", 0)
needs_flashinfer = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="flashinfer-python is not installed"
)


@pytest.fixture(scope="module")
def make_model(lively_weights):
    """A three-layer model whose tokens depend on the whole context, in a dtype."""

    def make(dtype):
        shape = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 64, "intermediate_size": 512}
        config = dataclasses.replace(SHAPES["tiny"], tie_word_embeddings=False, num_hidden_layers=3, **shape)
        return build(config, lively_weights(config), Shard.whole(config), DEVICE, dtype, origin="lively")

    return make


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(torch.float32)


@pytest.fixture(scope="module")
def half_model(make_model):
    """What FlashInfer can compute."""
    return make_model(torch.bfloat16)


class PoisoningEngine(Engine):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for layer in self.pool.layers:
            layer[: self.pool.capacity] = torch.nan

    def release(self, request):
        pages = list(request.pages.indices) if request.pages else []
        super().release(request)
        for layer in self.pool.layers:
            layer[pages] = torch.nan


def make_requests(prompts, output_len):
    return [Request(InputRequest(prompt_token_ids=p, output_len=output_len), i) for i, p in enumerate(prompts)]


def serve(engine, requests, seed, *, overlap=True, max_rows=10**9):
    """Requests enter when their pages fit; the schedule depends on the seed alone, so that with and without `overlap`
    the same rows are computed together. Returns the number of steps.
    """
    draw, order, running, in_flight, steps = random.Random(seed), list(requests), [], None, 0

    def read(step):
        for request, token in step.tokens().items():
            request.read(token, 0.0)

    while order or running or in_flight:
        if order and draw.random() < 0.7 and len(running) < max_rows:
            promised = sum(pages_for(r.max_tokens, engine.page_size) for r in [*running, order[0]])
            if promised <= engine.pool.capacity:
                running.append(order.pop(0))
        runnable = [r for r in running if r.wants_more]
        chunks = [Chunk(r, r.num_computed, 1) for r in runnable if not r.is_prefilling]
        if draw.random() < 0.6 or not chunks:
            for r in runnable:
                if r.is_prefilling:
                    left = r.num_prefill - r.num_computed
                    chunks.append(Chunk(r, r.num_computed, draw.choice([left, draw.randint(1, left)])))
        step = engine.launch(chunks) if chunks else None
        steps += bool(chunks)
        if not overlap:
            torch.cuda.synchronize()
        if in_flight:
            read(in_flight)
        in_flight = step
        for r in [r for r in running if r.finish_reason and not r.num_unread]:
            engine.release(r)
            running.remove(r)
    assert engine.num_free_pages == engine.pool.capacity
    return steps


def random_prompts(model, count, longest, seed):
    draw = random.Random(seed)
    vocab = model.config.vocab_size
    return [[draw.randrange(vocab) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@pytest.fixture(scope="module")
def hugging_face_s(model):
    """(prompts of 1 to 700 tokens, Hugging Face's next 20 of each)."""
    draw, peer = random.Random(9), HuggingFacePeer(model)
    lengths = [1, 700, 2, 3, 16, 17, 64, 5, 129, 31, 333, 48, 90, 7, 256, 33]
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(n)] for n in lengths]
    return prompts, [peer.generate([prompt], 20)[0] for prompt in prompts]


@pytest.mark.parametrize(
    "backend, page_size, graphs",
    [*(("torch", n, False) for n in (1, 3, 16, 64)), *(("triton", n, n != 3) for n in (1, 3, 16, 64))]
    + [("triton", 16, False)],
)
def test_hugging_face_s_tokens(model, hugging_face_s, backend, page_size, graphs):
    """float32, in a pool that just holds the longest prompt."""
    prompts, expected = hugging_face_s
    num_pages = pages_for(719, page_size)
    engine = PoisoningEngine(model, backend=backend, page_size=page_size, num_pages=num_pages, graphs=graphs)
    requests = make_requests(prompts, 20)
    serve(engine, requests, page_size)
    assert (engine.graphs is not None) == graphs
    got = [r.output_token_ids for r in requests]
    print(require_equal(model, prompts, expected, got, "engine against Hugging Face"))


@pytest.mark.parametrize("backend", ["triton", pytest.param("flashinfer", marks=needs_flashinfer)])
def test_a_thousand_overlapped_steps_against_the_synchronous_path(model, half_model, backend):
    """Each step launched before the one before it is read, graphs on; against waiting for every step. The same rows
    stand together in both, so the tokens are the same to the last bit of the logits, in bfloat16 too.
    """
    model = half_model if backend == "flashinfer" else model
    prompts = random_prompts(model, 90, 300, 1)
    runs = []
    for overlap in (True, False):
        engine = PoisoningEngine(model, backend=backend, page_size=16, num_pages=140, max_requests=64)
        requests = make_requests(prompts, 160)
        assert serve(engine, requests, 2, overlap=overlap, max_rows=12) > 1000
        runs.append([r.output_token_ids for r in requests])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("backend", ["triton", pytest.param("flashinfer", marks=needs_flashinfer)])
def test_graphs_against_no_graphs(model, half_model, backend):
    model = half_model if backend == "flashinfer" else model
    prompts = random_prompts(model, 40, 100, 3)
    runs = []
    for graphs in (True, False):
        engine = PoisoningEngine(model, backend=backend, num_pages=400, graphs=graphs)
        requests = make_requests(prompts, 30)
        serve(engine, requests, 4)
        runs.append([r.output_token_ids for r in requests])
    print(require_equal(model, prompts, runs[1], runs[0], "graphs against none"))


@needs_flashinfer
def test_backends_agree_in_bfloat16(half_model):
    """Logits of one step of pieces and decodes; the tolerance is bfloat16's rounding over three layers."""
    prompts = random_prompts(half_model, 6, 400, 5)
    logits = {}
    for backend in ("torch", "triton", "flashinfer"):
        engine = PoisoningEngine(half_model, backend=backend, num_pages=400, graphs=False)
        requests = make_requests(prompts, 8)
        engine.launch([Chunk(r, 0, r.num_prefill) for r in requests[:3]]).tokens()
        for slot in range(3):
            engine.last_token[engine._slots[requests[slot]]] = 7 + slot  # the same tokens whatever was sampled
        chunks = [Chunk(r, r.num_computed, 1) for r in requests[:3]]
        chunks += [Chunk(r, 0, r.num_prefill) for r in requests[3:]]
        packed = engine.pack(chunks)
        hidden = half_model.forward(packed.tokens, packed.attend, packed.batch.last_tokens)
        logits[backend] = half_model.logits(hidden)
        assert torch.isfinite(logits[backend]).all()
    for backend in ("triton", "flashinfer"):
        error = (logits[backend] - logits["torch"]).norm() / logits["torch"].norm()
        assert error < 0.05, backend


def test_a_captured_graph_serves_every_batch_of_its_bucket(model):
    """Batches of 1 to 20 after all buckets were captured: none is captured again, none gives other tokens."""
    engine = PoisoningEngine(model, num_pages=400)
    count = engine.graphs.capture(20)
    assert count == len({bucket_of(n) for n in range(1, 21)})
    prompts = random_prompts(model, 20, 30, 6)
    alone = make_requests(prompts, 6)
    for request in alone:
        serve(engine, [request], 0)
    for size in (1, 2, 3, 4, 5, 8, 9, 16, 17, 20):
        requests = make_requests(prompts[:size], 6)
        serve(engine, requests, size)
        expected = [r.output_token_ids for r in alone[:size]]
        require_equal(model, prompts[:size], expected, [r.output_token_ids for r in requests], f"batch {size}")
    assert len(engine.graphs._graphs) == count


@needs_flashinfer
def test_flashinfer_refuses_what_it_cannot_compute(model):
    with pytest.raises(UserError, match="--backend flashinfer: computes in float16 or bfloat16, not float32"):
        Engine(model, backend="flashinfer", num_pages=10)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="takes all of the memory: not beside other processes")
def test_the_pool_fills_what_a_step_leaves(half_model, empty_device):
    """At 95 % of what is free after a trial of the largest step, the largest step still runs."""
    engine = Engine(half_model, max_requests=100_000 // 16, max_step_tokens=2048)
    free, _ = torch.cuda.mem_get_info()
    assert free > 0 and engine.pool.capacity > 100
    prompts = random_prompts(half_model, 1, 1, 8)
    prompts = [prompts[0] * 1900]
    requests = make_requests(prompts, 4)
    serve(engine, requests, 0)

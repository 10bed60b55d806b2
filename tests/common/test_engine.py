"""The engine under random schedules against Hugging Face on the same weights; released pages are poisoned with NaN."""

import os
import random
import sys

import pytest
import torch

from common.engine import Engine
from common.equality import require_equal
from common.errors import UserError
from common.kernels import runtime
from common.kv_cache import DistKVPool
from common.memory import MemoryUse
from common.pages import OutOfPages, pages_for
from common.peers import HuggingFacePeer
from common.sampling import SamplingParams
from common.serving import Chunk, InputRequest, Request

OUTPUT_LEN = 10
LENGTHS = [1, 700, 2, 3, 16, 17, 64, 5, 129, 31, 333, 48, 90, 7, 256, 33]


class PoisoningEngine(Engine):
    """All memory is NaN before it is written, and pages are NaN again once they are given back."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for layer in self.pool.layers:
            layer.fill_(torch.nan)

    def release(self, request):
        pages = list(request.pages.indices) if request.pages else []
        super().release(request)
        for layer in self.pool.layers:
            layer[pages] = torch.nan


@pytest.fixture(scope="module")
def reference(lively):
    """(model, prompts, Hugging Face's greedy tokens of each)."""
    model, _ = lively
    draw = random.Random(0)
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(n)] for n in LENGTHS]
    peer = HuggingFacePeer(model)
    expected = [peer.generate([prompt], OUTPUT_LEN)[0] for prompt in prompts]
    assert sum(len(set(tokens)) for tokens in expected) > 8 * len(expected)  # or there would be little to compare
    return model, prompts, expected


def make_requests(prompts, output_len=OUTPUT_LEN, **given):
    return [Request(InputRequest(prompt_token_ids=p, output_len=output_len, **given), i) for i, p in enumerate(prompts)]


def serve(engine, requests, draw, *, max_piece=10**9, overlap=True, preempt=0.0):
    """A scheduler without sense: any runnable requests in any mixture, whenever their pages fit."""
    order = list(requests)
    draw.shuffle(order)
    running, in_flight = [], None

    def read(step):
        for request, token in step.tokens().items():
            request.read(token, 0.0)

    while order or running or in_flight:
        if order and draw.random() < 0.5:
            promised = sum(pages_for(r.max_tokens, engine.page_size) for r in [*running, order[0]])
            if promised <= engine.pool.capacity:
                running.append(order.pop(0))
        runnable = [r for r in running if r.wants_more and draw.random() < 0.8]
        chunks = [Chunk(r, r.num_computed, 1) for r in runnable if not r.is_prefilling]
        for r in runnable:
            if r.is_prefilling:
                left = min(r.num_prefill - r.num_computed, max_piece)
                chunks.append(Chunk(r, r.num_computed, draw.choice([left, draw.randint(1, left)])))
        step = engine.launch(chunks) if chunks else None
        if in_flight and overlap:
            read(in_flight)
        if step and not overlap:
            read(step)
            step = None
        in_flight = step
        for r in [r for r in running if not r.num_unread]:
            if r.finish_reason or r.preemptions < 2 and draw.random() < preempt:
                engine.release(r)
                running.remove(r)
                if not r.finish_reason:
                    r.preempt()
                    order.append(r)
    assert engine.num_free_pages == engine.pool.capacity


def check(reference, requests, rows=None):
    model, prompts, expected = reference
    rows = range(len(prompts)) if rows is None else rows
    got = [r.output_token_ids for r in requests]
    require_equal(model, [prompts[i] for i in rows], [expected[i] for i in rows], got, "engine against Hugging Face")
    assert all(len(tokens) == OUTPUT_LEN for tokens in got)


@pytest.mark.parametrize("page_size", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "one by one"])
def test_any_schedule_gives_hugging_face_s_tokens(reference, page_size, overlap):
    """In a pool that just holds the longest request."""
    model, prompts, _ = reference
    just = pages_for(max(LENGTHS) + OUTPUT_LEN - 1, page_size)
    engine = PoisoningEngine(model, page_size=page_size, num_pages=just, max_requests=16)
    requests = make_requests(prompts)
    serve(engine, requests, random.Random(page_size), overlap=overlap)
    check(reference, requests)


def test_small_pieces_and_preemptions(reference):
    model, prompts, _ = reference
    rows = [i for i, n in enumerate(LENGTHS) if n <= 64]
    engine = PoisoningEngine(model, page_size=4, num_pages=60, max_requests=9)
    requests = make_requests([prompts[i] for i in rows])
    serve(engine, requests, random.Random(1), max_piece=7, preempt=0.4)
    assert sum(r.preemptions for r in requests) > 3
    check(reference, requests, rows)


@pytest.mark.skipif(not (runtime.HAS_TRITON and runtime.INTERPRETED), reason="needs Triton's interpreter")
def test_triton_backend(reference):
    model, prompts, _ = reference
    rows = [i for i, n in enumerate(LENGTHS) if n in (1, 7, 17, 33)]
    engine = PoisoningEngine(model, backend="triton", page_size=3, num_pages=45, max_requests=4)
    assert engine.backend.name == "triton" and engine.graphs is None and os.environ["TRITON_INTERPRET"] == "1"
    requests = make_requests([prompts[i] for i in rows])
    serve(engine, requests, random.Random(2))
    check(reference, requests, rows)


@pytest.mark.slow
def test_embedded_model_against_hugging_face(embedded):
    model, tokenizer = embedded
    prompts = [tokenizer.prompt_of_length(n, 40 * n) for n in (1, 5, 40, 150, 16)]
    peer = HuggingFacePeer(model)
    expected = [peer.generate([prompt], OUTPUT_LEN)[0] for prompt in prompts]
    engine = PoisoningEngine(model, page_size=16, num_pages=12, max_requests=8)
    requests = make_requests(prompts)
    serve(engine, requests, random.Random(3))
    check((model, prompts, expected), requests)


def test_many_overlapped_steps(lively):
    """Launched before the last is read, against the same schedule read at once. tests/gpu runs a thousand."""
    model, _ = lively
    runs = []
    for overlap in (True, False):
        draw = random.Random(4)
        prompts = [[draw.randrange(512) for _ in range(draw.randint(1, 20))] for _ in range(20)]
        engine = PoisoningEngine(model, page_size=4, num_pages=80, max_requests=16)
        requests = make_requests(prompts, 30)
        steps = 0
        launch = engine.launch

        def counted(chunks, launch=launch):
            nonlocal steps
            steps += 1
            return launch(chunks)

        engine.launch = counted
        serve(engine, requests, draw, overlap=overlap)
        assert steps > 80
        runs.append([r.output_token_ids for r in requests])
    require_equal(model, prompts, runs[1], runs[0], "overlapped against one by one")


# --- sampling --------------------------------------------------------------------------------------------------------
def test_each_request_is_sampled_its_own_way_whatever_the_batch(reference):
    model, prompts, expected = reference
    rows = [i for i, n in enumerate(LENGTHS) if n <= 33]
    ways = [SamplingParams(0.9, seed=i, top_k=40 if i % 3 == 1 else 0, top_p=0.9) if i % 2 else SamplingParams()
            for i in range(len(rows))]  # fmt: skip

    def make():
        return [
            Request(InputRequest(prompt_token_ids=prompts[row], output_len=OUTPUT_LEN, sampling=way), i)
            for i, (row, way) in enumerate(zip(rows, ways))
        ]

    alone = make()
    for request in alone:
        serve(PoisoningEngine(model, page_size=8, num_pages=10), [request], random.Random(0))
    together = make()
    engine = PoisoningEngine(model, page_size=3, num_pages=80)
    serve(engine, together, random.Random(5), max_piece=6, preempt=0.02)
    assert [r.output_token_ids for r in together] == [r.output_token_ids for r in alone]
    greedy = [r.output_token_ids == expected[row] for r, row in zip(alone, rows)]
    assert [way.is_greedy for way in ways] == greedy


# --- refusals --------------------------------------------------------------------------------------------------------
def state(engine, requests):
    return (
        engine.num_free_pages,
        list(engine._free_slots),
        dict(engine._slots),
        dict(engine._known_pages),
        engine.page_table.clone().tolist(),
        engine.last_token.tolist(),
        [(r.num_computed, r.num_sampled, list(r.pages.indices) if r.pages else []) for r in requests],
        [(r.pages.seqlen if r.pages else 0) for r in requests],
    )


def test_out_of_pages_changes_nothing(tiny):
    model, _ = tiny
    engine = Engine(model, page_size=4, num_pages=6, max_requests=3)
    a, b, c = make_requests([[1] * 8, [2] * 9, [3] * 6])
    engine.launch([Chunk(a, 0, 8)]).tokens()
    before = state(engine, [a, b, c])
    with pytest.raises(OutOfPages) as error:  # a's decode opens a page, b needs 3, c needs 2: 6 of 4
        engine.launch([Chunk(a, 8, 1), Chunk(b, 0, 9), Chunk(c, 0, 6)])
    assert (error.value.requested, error.value.free, error.value.total) == (6, 4, 6)
    assert state(engine, [a, b, c]) == before
    assert engine.launch([Chunk(a, 8, 1), Chunk(b, 0, 9)]).tokens().keys() == {a, b}


def test_too_many_requests_and_a_wrong_order_change_nothing(tiny):
    model, _ = tiny
    engine = Engine(model, page_size=4, num_pages=20, max_requests=2)
    a, b, c = make_requests([[1] * 6, [2] * 9, [3] * 6])
    engine.launch([Chunk(a, 0, 6)]).tokens()
    before = state(engine, [a, b, c])
    with pytest.raises(UserError, match="more than 2 requests"):
        engine.launch([Chunk(b, 0, 9), Chunk(c, 0, 6)])
    with pytest.raises(ValueError, match="decodes come first"):
        engine.launch([Chunk(b, 0, 9), Chunk(a, 6, 1)])
    with pytest.raises(ValueError, match="chunk at 7"):
        engine.launch([Chunk(a, 7, 1)])
    assert state(engine, [a, b, c]) == before


def test_a_step_that_samples_nothing_still_waits_and_gives_nothing(tiny):
    model, _ = tiny
    engine = Engine(model, page_size=4, num_pages=20)
    (a,) = make_requests([[1] * 6])
    assert engine.launch([Chunk(a, 0, 5)]).tokens() == {}
    assert engine.launch([Chunk(a, 5, 1)]).tokens().keys() == {a}


@pytest.mark.parametrize("page_size", [0, 257])
def test_page_sizes_outside_the_range(tiny, page_size):
    with pytest.raises(UserError, match=f"--page-size {page_size}"):
        Engine(tiny[0], page_size=page_size, num_pages=4)


def test_a_pool_larger_than_memory_is_refused_with_its_size(tiny):
    with pytest.raises(UserError, match=r"--kv-pages: 1000000000 pages of 16 tokens take .* TB; .* are free"):
        Engine(tiny[0], num_pages=10**9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_major", [False, True])
def test_a_large_pool_on_a_cpu_is_zero_and_takes_no_memory_before_it_is_used(dtype, head_major):
    before = MemoryUse(torch.device("cpu"))
    pool = DistKVPool(4, 2, 64, 8000, 16, dtype, "cpu", head_major=head_major)
    assert pool.num_bytes == 4 * 8000 * 2 * 16 * 2 * 64 * dtype.itemsize > 250e6
    if sys.platform == "linux":
        assert before.num_bytes < 20e6
    for layer in pool.layers:
        assert layer.shape == (8001, 2, 16, 2, 64) and layer.dtype == dtype and layer.data_ptr() % 64 == 0
        assert layer.is_contiguous() != head_major
        assert not layer[::500].any() and not layer[-1].any()


def test_a_share_of_memory_that_holds_no_page_is_refused_by_its_own_name(tiny):
    with pytest.raises(UserError, match="^--kv-memory: of .* that are free this holds no page, .* for 16 tokens"):
        Engine(tiny[0], kv_memory=1e-12)


@pytest.mark.parametrize("name, reason", [("vllm", "unknown"), ("flashinfer", "flashinfer")])
def test_backends_that_cannot_run_here_are_named(tiny, name, reason):
    with pytest.raises(UserError, match=f"--backend {name}: .*{'unknown' if name == 'vllm' else ''}"):
        Engine(tiny[0], backend=name, num_pages=4)


def test_the_pool_takes_its_share_of_memory_and_no_more_than_is_useful(tiny, monkeypatch):
    model, _ = tiny
    page = 16 * model.config.kv_bytes_per_token(4)
    monkeypatch.setattr("common.engine.free_bytes", lambda device: 1000 * page)
    half = Engine(model, kv_memory=0.5)
    assert half.pool.capacity == 500 and half.pool_share == 0.5
    assert "(50.0% of what is free for it); attention" in half.describe_pool()
    assert half.capture_graphs(8) == ""  # a CPU has none
    useful = 2 * pages_for(model.config.max_position_embeddings, 16)
    enough = Engine(model, kv_memory=1.0, max_requests=2)
    assert enough.pool.capacity == useful and "all that 2 requests can use" in enough.describe_pool()
    engine = Engine(model, num_pages=10)
    assert (
        "10 pages of 16 tokens = 160 tokens, 81.9 KB; attention: torch (the device is a CPU)" in engine.describe_pool()
    )
    assert engine.pool.num_bytes == 10 * page and engine.pool_share is None

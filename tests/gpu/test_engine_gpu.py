"""The engine on a GPU: three backends against float64, CUDA graphs against none, overlapped steps against synchronous.

Memory is NaN before it is written and after it is given back, so nothing stale is ever read.
"""

import dataclasses
import importlib.util
import random
import zlib

import pytest
import torch

from common.checkpoint import Shard, build
from common.config import SHAPES, ModelConfig
from common.engine import Engine
from common.equality import require_equal
from common.errors import UserError
from common.kv_cache import DistKVPool
from common.paged.backends import Backend, make_attend, make_graph_decode
from common.paged.batch import DeviceBatch, HostBatch, Upload
from common.paged.graphs import bucket_of
from common.pages import pages_for
from common.peers import HuggingFacePeer
from common.serving import Chunk, InputRequest, Request, release_pages, reserve_pages
from common.tensor_source import expected_shapes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = torch.device("cuda", 0)
LAYERS = 2
needs_flashinfer = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="flashinfer-python is not installed"
)
BACKENDS = ["torch", "triton", pytest.param("flashinfer", marks=needs_flashinfer)]
# Of the output's norm; attention averages values, so the rounding of the inputs is most of it.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def ieee_products():
    """No TF32 on either side of a comparison."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


# --- attention -------------------------------------------------------------------------------------------------------
class Bench:
    """Requests over a poisoned pool; K and V of each, rotated in float64, in plain tensors beside it."""

    def __init__(self, backend, config, page_size, num_pages, dtype):
        self.config, self.dtype = config, dtype
        self.model = type("Shape", (), {"config": config, "device": DEVICE, "dtype": dtype})()
        self.backend = Backend(backend, "asked for", head_major=backend == "torch", captures=backend != "torch")
        shape = (LAYERS, config.num_key_value_heads, config.head_dim, num_pages, page_size)
        self.pool = DistKVPool(*shape, dtype, DEVICE, head_major=self.backend.head_major)
        for layer in self.pool.layers:
            layer.fill_(torch.nan)
        columns = pages_for(config.max_position_embeddings, page_size)
        self.table = torch.full((33, columns), self.pool.scratch_page, dtype=torch.int32, device=DEVICE)
        self.slots, self.kv = {}, {}
        self.upload = Upload(DEVICE)

    def rotate(self, x, positions):
        half = self.config.head_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=DEVICE) / half
        angles = (positions[:, None] * self.config.rope_theta**-exponents)[:, None]
        a, b, cos, sin = x[..., :half], x[..., half:], angles.cos(), angles.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def expected(self, request, layer, start, qkv):
        c, count = self.config, len(qkv)
        heads = qkv.double().view(count, -1, c.head_dim)
        q, k, v = heads.split([c.num_attention_heads] + [c.num_key_value_heads] * 2, 1)
        positions = torch.arange(start, start + count, dtype=torch.float64, device=DEVICE)
        q, new = self.rotate(q, positions), (self.rotate(k, positions), v)
        past = self.kv.get((request, layer))
        k, v = self.kv[request, layer] = new if past is None else tuple(map(torch.cat, zip(past, new)))
        hidden = torch.arange(start + count, device=DEVICE)[None, :] > positions[:, None]
        out, group = torch.empty_like(q), c.num_attention_heads // c.num_key_value_heads
        for head in range(c.num_attention_heads):  # one at a time: scores of 5,000 tokens are 200 MB
            scores = q[:, head] @ k[:, head // group].T / c.head_dim**0.5
            out[:, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, head // group]
        return out.flatten(1)

    def admit(self, chunks):
        reserve_pages(self.pool, chunks)
        for request, _, _ in chunks:
            slot = self.slots.setdefault(request, len(self.slots))
            pages = torch.tensor(request.pages.indices, dtype=torch.int32, device=DEVICE)
            self.table[slot, : len(pages)] = pages
        return HostBatch.of(chunks, [self.slots[chunk.request] for chunk in chunks])

    def check(self, chunks, attend, host):
        """Run every layer and compare. Returns the largest relative error."""
        errors = []
        for layer in range(LAYERS):
            width = self.config.q_size + 2 * self.config.kv_size
            qkv = torch.randn(host.num_tokens, width, device=DEVICE).to(self.dtype)
            want = torch.empty(host.num_tokens, self.config.q_size, dtype=torch.float64, device=DEVICE)
            first = 0
            for request, start, length in chunks:
                rows = slice(first, first + length)
                want[rows] = self.expected(request, layer, start, qkv[rows])
                first += length
            got = attend(layer, qkv.clone()).double()
            errors.append((got - want).norm() / want.norm())
        return float(torch.stack(errors).max())

    @torch.inference_mode()
    def step(self, chunks):
        host = self.admit(chunks)
        batch, _ = DeviceBatch.of(host, self.upload)
        lists = [chunk.request.pages.indices for chunk in chunks]
        attend = make_attend(self.backend, self.model, self.pool, host, batch, self.table, lists)
        return self.check(chunks, attend, host)

    def release(self, request):
        pages = list(request.pages.indices)
        release_pages(request)
        for layer in self.pool.layers:
            layer[pages] = torch.nan


def request_of(length, number):
    return Request(InputRequest(prompt_token_ids=[1] * length, output_len=8), number)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(8, 8, 64), (8, 2, 128), (16, 2, 64), (9, 3, 64), (32, 8, 128)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_against_float64(backend, heads, dtype):
    """Random mixtures of whole prompts, pieces and decodes; GQA 1, 3, 4 and 8; lengths 1 to 5,000."""
    if backend == "flashinfer" and dtype == torch.float32:
        pytest.skip("FlashInfer computes in 16 bits")
    torch.manual_seed(0)
    draw = random.Random(zlib.crc32(f"{backend}{heads}".encode()))
    num_heads, num_kv_heads, head_dim = heads
    config = ModelConfig(
        100, 64, 4, LAYERS, num_heads, num_kv_heads, head_dim, rope_theta=1e5, max_position_embeddings=5200
    )
    for page_size in (1, 16, 64):
        lengths = [1, draw.randint(2, 40), draw.randint(41, 900), draw.choice([5000, draw.randint(2000, 4900)])]
        draw.shuffle(lengths)
        bench = Bench(backend, config, page_size, sum(pages_for(n + 10, page_size) for n in lengths), dtype)
        requests = [request_of(n, i) for i, n in enumerate(lengths)]
        live = list(requests)
        while live:
            decodes = [Chunk(r, r.num_computed, 1) for r in live if not r.is_prefilling]
            pieces = []
            for r in live:
                left = r.num_prefill - r.num_computed
                if left > 0 and draw.random() < 0.8:
                    pieces.append(Chunk(r, r.num_computed, draw.choice([left, max(left // 3, 1)])))
            if decodes or pieces:
                error = bench.step([*decodes, *pieces])
                assert error < TOLERANCE[dtype], (page_size, [chunk[1:] for chunk in [*decodes, *pieces]])
            for r in [r for r in live if not r.wants_more]:
                bench.release(r)
                live.remove(r)
        torch.cuda.empty_cache()


@pytest.mark.parametrize("size", [1, 4, 24])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_graph_attention_against_float64(backend, size):
    """The attend of a graph, planned anew before each replay, over growing contexts that open new pages."""
    torch.manual_seed(1)
    draw = random.Random(size)
    config = ModelConfig(100, 64, 4, LAYERS, 16, 4, 64, rope_theta=1e5, max_position_embeddings=3000)
    bench = Bench(backend, config, 16, 4000, torch.bfloat16)
    requests = [request_of(draw.choice([1, 15, 16, draw.randint(2, 2500)]), i) for i in range(size)]
    for r in requests:
        assert bench.step([Chunk(r, 0, r.num_prefill)]) < TOLERANCE[torch.bfloat16]
    with torch.inference_mode():
        decode = make_graph_decode(bench.backend, bench.model, bench.pool, bench.table, size)
        arange = torch.arange(size + 1, dtype=torch.int32, device=DEVICE)
        slots, lens = torch.zeros(size, dtype=torch.int32, device=DEVICE), torch.ones_like(arange[:-1])
        width = config.q_size + 2 * config.kv_size
        inputs = [torch.zeros(size, width, dtype=torch.bfloat16, device=DEVICE) for _ in range(LAYERS)]

        def run():
            batch = DeviceBatch(
                slots=slots, kv_lens=lens, q_indptr=arange, positions=lens - 1, token_slots=slots,
                prompt_tokens=arange[:0], sampled_rows=arange[:-1], last_tokens=arange[:-1],
            )  # fmt: skip
            attend = decode.attend(batch)
            return [attend(layer, qkv.clone()) for layer, qkv in enumerate(inputs)]

        scratch = [[bench.pool.scratch_page]] * size
        slots.fill_(32)
        decode.plan(lens.cpu().numpy(), scratch)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        for _ in range(7):
            chunks = [Chunk(r, r.num_computed, 1) for r in requests]
            host = bench.admit(chunks)
            slots.copy_(torch.from_numpy(host.slots))
            lens.copy_(torch.from_numpy(host.kv_lens))
            wants = []
            for layer, qkv in enumerate(inputs):
                qkv.copy_(torch.randn(size, width, device=DEVICE))
                rows = [bench.expected(r, layer, start, qkv[i : i + 1]) for i, (r, start, _) in enumerate(chunks)]
                wants.append(torch.cat(rows))
            decode.plan(host.kv_lens, [r.pages.indices for r in requests])
            graph.replay()
            for got, want in zip(outputs, wants):
                error = (got.double() - want).norm() / want.norm()
                assert error < TOLERANCE[torch.bfloat16]


# --- the engine ------------------------------------------------------------------------------------------------------
class Lively:
    """Random weights in proportions that make attention decide: every token of a context changes what follows."""

    def __init__(self, config):
        self._shapes = expected_shapes(config)

    def shape(self, name):
        return self._shapes[name]

    def read(self, name, rows=slice(None), columns=slice(None)):
        shape = self._shapes[name]
        values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if len(shape) == 1:
            return (1 + 0.1 * values)[rows]
        return (values * (2 / shape[1] ** 0.5 if "proj" in name else 1))[rows, columns]


def make_model(dtype=torch.float32, **shape):
    config = dataclasses.replace(SHAPES["tiny"], tie_word_embeddings=False, num_hidden_layers=3, **shape)
    return build(config, Lively(config), Shard.whole(config), DEVICE, dtype, origin="lively")


@pytest.fixture(scope="module")
def model():
    return make_model(hidden_size=256, num_attention_heads=8, head_dim=64, intermediate_size=512)


@pytest.fixture(scope="module")
def half_model():
    """What FlashInfer can compute."""
    return make_model(torch.bfloat16, hidden_size=256, num_attention_heads=8, head_dim=64, intermediate_size=512)


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
    """Requests enter when their pages fit; the schedule depends on the seed alone. Returns the number of steps."""
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
        if in_flight:
            read(in_flight)
        if step and not overlap:
            torch.cuda.synchronize()
            read(step)
            step = None
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


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hugging_face_s_tokens(model, backend, page_size, graphs):
    """float32, prompts of 1 to 700 tokens, in a pool that just holds the longest."""
    if backend == "torch" and graphs:
        pytest.skip("the torch backend is not captured")
    draw = random.Random(9)
    lengths = [1, 700, 2, 3, 16, 17, 64, 5, 129, 31, 333, 48, 90, 7, 256, 33]
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(n)] for n in lengths]
    peer = HuggingFacePeer(model)
    expected = [peer.generate([prompt], 20)[0] for prompt in prompts]
    engine = PoisoningEngine(
        model, backend=backend, page_size=page_size, num_pages=pages_for(719, page_size), graphs=graphs
    )
    requests = make_requests(prompts, 20)
    serve(engine, requests, page_size)
    assert (engine.graphs is not None) == graphs
    got = [r.output_token_ids for r in requests]
    print(require_equal(model, prompts, expected, got, "engine against Hugging Face"))


@pytest.mark.parametrize("backend", ["triton", pytest.param("flashinfer", marks=needs_flashinfer)])
def test_a_thousand_overlapped_steps_against_the_synchronous_path(model, half_model, backend):
    """Each step launched before the one before it is read, graphs on; against synchronising after every launch."""
    model = half_model if backend == "flashinfer" else model
    prompts = random_prompts(model, 90, 300, 1)
    runs, steps = [], 0
    for overlap in (True, False):
        engine = PoisoningEngine(model, backend=backend, page_size=16, num_pages=140, max_requests=64)
        requests = make_requests(prompts, 160)
        steps = serve(engine, requests, 2, overlap=overlap, max_rows=12)
        runs.append([r.output_token_ids for r in requests])
    assert steps > 1000
    print(require_equal(model, prompts, runs[1], runs[0], "overlapped against synchronous"))


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


def test_the_pool_fills_what_a_step_leaves(half_model):
    """At 95 % of what is free after a trial of the largest step, the largest step still runs."""
    engine = Engine(half_model, max_requests=100_000 // 16, max_step_tokens=2048)
    free, _ = torch.cuda.mem_get_info()
    assert free > 0 and engine.pool.capacity > 100
    prompts = random_prompts(half_model, 1, 1, 8)
    prompts = [prompts[0] * 1900]
    requests = make_requests(prompts, 4)
    serve(engine, requests, 0)

"""Attention over pages on a GPU: three backends against float64, over random steps and inside CUDA graphs.

Memory is NaN before it is written and after it is given back, so nothing stale is ever read.
"""

import importlib.util
import random
import zlib

import pytest
import torch

from common.config import ModelConfig
from common.kv_cache import DistKVPool
from common.paged.backends import Backend, make_attend, make_graph_decode
from common.paged.batch import DeviceBatch, HostBatch, Upload
from common.pages import pages_for
from common.serving import Chunk, InputRequest, Request, release_pages, reserve_pages

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = torch.device("cuda", 0)
LAYERS = 2
needs_flashinfer = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="flashinfer-python is not installed"
)
BACKENDS = ["torch", "triton", pytest.param("flashinfer", marks=needs_flashinfer)]
# Of the output's norm; attention averages values, so the rounding of the inputs is most of it.
# float32: 4e-5 was seen over 5,000 tokens, where TF32 would give 1e-3.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


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


# What kernels are compiled for, by example; lengths, which compile nothing, are drawn. ((Hq, Hkv, d), page size, dtype)
EXAMPLES = [
    ((8, 8, 64), 16, torch.bfloat16),
    ((16, 2, 128), 64, torch.bfloat16),
    ((32, 8, 128), 16, torch.bfloat16),
    ((9, 3, 64), 1, torch.bfloat16),
    ((8, 2, 128), 16, torch.float16),
    ((16, 2, 64), 1, torch.float32),
    ((8, 2, 128), 64, torch.float32),
]


@pytest.mark.parametrize("heads, page_size, dtype", EXAMPLES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_against_float64(backend, heads, page_size, dtype):
    """Random mixtures of whole prompts, pieces and decodes; GQA 1, 3, 4 and 8; lengths 1 to 5,000."""
    if backend == "flashinfer" and dtype != torch.bfloat16:
        pytest.skip("FlashInfer computes in 16 bits, and compiles for minutes for each of the two types")
    torch.manual_seed(0)
    draw = random.Random(zlib.crc32(f"{backend}{heads}".encode()))
    config = ModelConfig(100, 64, 4, LAYERS, *heads, rope_theta=1e5, max_position_embeddings=5200)
    for longest in (5000, draw.randint(2000, 4900), draw.randint(1000, 2000)):
        lengths = [1, draw.randint(2, 40), draw.randint(41, 900), longest]
        draw.shuffle(lengths)
        bench = Bench(backend, config, page_size, sum(pages_for(n + 10, page_size) for n in lengths), dtype)
        serve_in_random_pieces(bench, [request_of(n, i) for i, n in enumerate(lengths)], draw)
        torch.cuda.empty_cache()


def serve_in_random_pieces(bench, live, draw):
    while live:
        decodes = [Chunk(r, r.num_computed, 1) for r in live if not r.is_prefilling]
        pieces = []
        for r in live:
            left = r.num_prefill - r.num_computed
            if left > 0 and draw.random() < 0.8:
                pieces.append(Chunk(r, r.num_computed, draw.choice([left, max(left // 3, 1)])))
        if decodes or pieces:
            error = bench.step([*decodes, *pieces])
            assert error < TOLERANCE[bench.dtype], [chunk[1:] for chunk in [*decodes, *pieces]]
        for r in [r for r in live if not r.wants_more]:
            bench.release(r)
            live.remove(r)


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

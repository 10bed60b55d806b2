"""Attention over pages against a float64 oracle that keeps every request's K and V in a plain list.

Steps are random mixtures of prompt pieces and decodes. All of the pool's memory is NaN before it is written and again
when it is given back, so one stale or foreign slot anywhere makes the result NaN.
"""

import random
from types import SimpleNamespace

import pytest
import torch

from common.config import ModelConfig
from common.kernels import runtime
from common.kv_cache import DistKVPool
from common.paged.attention import GATHER_BYTES, PADDING_BYTES, _scratch_memory
from common.paged.backends import Backend, make_attend
from common.paged.batch import DeviceBatch, HostBatch, Upload
from common.pages import pages_for
from common.serving import Chunk, InputRequest, Request, release_pages, reserve_pages

needs_interpreter = pytest.mark.skipif(
    not (runtime.HAS_TRITON and runtime.INTERPRETED), reason="needs Triton's interpreter (tests/gpu has the compiled)"
)
BACKENDS = ["torch", pytest.param("triton", marks=needs_interpreter)]
LAYERS = 2


class Oracle:
    """K and V of each request in float64, rotated by the definition, one after another; a piece attends over them."""

    def __init__(self, config):
        self.config = config
        self.kv = {}  # (request, layer) -> k, v, each [S, Hkv, d]

    def rotate(self, x, positions):
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = (positions[:, None] * frequencies)[:, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1
        )

    def attend(self, request, layer, start, qkv):
        """qkv [T, ...] of the tokens from `start` on -> [T, Hq d]."""
        c, num_tokens = self.config, len(qkv)
        heads = qkv.double().view(num_tokens, -1, c.head_dim)
        q, k, v = heads.split([c.num_attention_heads] + [c.num_key_value_heads] * 2, 1)
        positions = torch.arange(start, start + num_tokens, dtype=torch.float64)
        q, new = self.rotate(q, positions), (self.rotate(k, positions), v)
        past = self.kv.get((request, layer))
        assert (0 if past is None else len(past[0])) == start
        k, v = self.kv[request, layer] = new if past is None else tuple(map(torch.cat, zip(past, new)))
        group = c.num_attention_heads // c.num_key_value_heads
        keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", q, keys) / c.head_dim**0.5
        hidden = torch.arange(start + num_tokens)[None, :] > positions[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, values).flatten(1)


def make_config(num_heads, num_kv_heads, head_dim):
    return ModelConfig(100, num_heads * head_dim, 4, LAYERS, num_heads, num_kv_heads, head_dim)


class Harness:
    """Requests over a poisoned pool, and the oracle beside them."""

    def __init__(self, backend, config, page_size, num_pages, dtype=torch.float32):
        self.config = config
        self.model = SimpleNamespace(config=config, device=torch.device("cpu"), dtype=dtype)
        head_major = backend == "torch"
        self.backend = Backend(backend, "asked for", head_major=head_major, captures=False)
        self.pool = DistKVPool(
            LAYERS,
            config.num_key_value_heads,
            config.head_dim,
            num_pages,
            page_size,
            dtype,
            "cpu",
            head_major=head_major,
        )
        for layer in self.pool.layers:
            layer.fill_(torch.nan)
        self.table = torch.full((9, pages_for(config.max_position_embeddings, page_size)), self.pool.scratch_page)
        self.table = self.table.to(torch.int32)
        self.slots = {}
        self.oracle = Oracle(config)

    def attend(self, chunks):
        """The arrays of a step and its attend; pages are taken."""
        reserve_pages(self.pool, chunks)
        for request, _, _ in chunks:
            slot = self.slots.setdefault(request, len(self.slots))
            self.table[slot, : len(request.pages.indices)] = torch.tensor(request.pages.indices, dtype=torch.int32)
        host = HostBatch.of(chunks, [self.slots[chunk.request] for chunk in chunks])
        batch, _ = DeviceBatch.of(host, Upload(torch.device("cpu")))
        lists = [chunk.request.pages.indices for chunk in chunks]
        return host, make_attend(self.backend, self.model, self.pool, host, batch, self.table, lists)

    def step(self, chunks):
        """Returns the largest error of any output."""
        host, attend = self.attend(chunks)
        width = self.config.q_size + 2 * self.config.kv_size
        errors = []
        for layer in range(LAYERS):
            qkv = torch.randn(host.num_tokens, width).to(self.model.dtype)
            got = attend(layer, qkv.clone()).double()
            first = 0
            for request, start, length in chunks:
                rows = slice(first, first + length)
                want = self.oracle.attend(request, layer, start, qkv[rows])
                errors.append((got[rows] - want).abs().max())
                first += length
        return float(torch.stack(errors).max())  # NaN if any is

    def release(self, request):
        pages = list(request.pages.indices)
        release_pages(request)
        for layer in self.pool.layers:
            layer[pages] = torch.nan


def random_steps(harness, draw, num_steps, max_prompt, check):
    """Requests come, are read in pieces, decode and go; every step's error is checked."""
    live, count = [], 0
    for _ in range(num_steps):
        if len(live) < 3 and count < 8:
            prompt = [draw.randrange(100) for _ in range(draw.randint(1, max_prompt))]
            live.append(Request(InputRequest(prompt_token_ids=prompt, output_len=draw.randint(1, 9)), count))
            count += 1
        decodes = [Chunk(r, r.num_computed, 1) for r in live if not r.is_prefilling and draw.random() < 0.9]
        pieces = [
            Chunk(r, r.num_computed, draw.randint(1, r.num_prefill - r.num_computed))
            for r in live
            if r.is_prefilling and draw.random() < 0.8
        ]
        if decodes or pieces:
            check(harness.step([*decodes, *pieces]))
        for request in [r for r in live if not r.wants_more]:
            harness.release(request)
            live.remove(request)
    assert count > 3


@pytest.mark.parametrize("heads", [(4, 4, 16), (8, 2, 8), (3, 1, 32)], ids=str)
@pytest.mark.parametrize("page_size", [1, 2, 3, 16, 64])
def test_torch_random_mixtures(heads, page_size):
    torch.manual_seed(page_size)
    harness = Harness("torch", make_config(*heads), page_size, 4 * pages_for(60, page_size))

    def check(error):
        assert error < 1e-5

    random_steps(harness, random.Random(page_size), 30, 40, check)


@needs_interpreter
@pytest.mark.parametrize("page_size, heads", [(3, (4, 2, 16)), (16, (3, 1, 16))])
def test_triton_random_mixtures(page_size, heads):
    torch.manual_seed(page_size)
    harness = Harness("triton", make_config(*heads), page_size, 4 * pages_for(30, page_size))

    def check(error):
        assert error < 1e-5

    random_steps(harness, random.Random(page_size), 10, 12, check)


@pytest.mark.parametrize("heads", [(2, 2, 16), (8, 2, 8), (3, 1, 32)], ids=str)
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_flashinfer_plans_random_mixtures(heads, page_size, flashinfer_stand_in):
    torch.manual_seed(page_size)
    harness = Harness("flashinfer", make_config(*heads), page_size, 4 * pages_for(60, page_size))

    def check(error):
        assert error < 1e-5

    torch.cuda.Event.waits = 0
    random_steps(harness, random.Random(page_size), 20, 40, check)
    (turns,) = flashinfer_stand_in._turns.values()
    assert len(turns) == 2 and torch.cuda.Event.waits > 10  # two in turn, each waits for its own last copy


def test_flashinfer_wrappers_follow_the_model(flashinfer_stand_in):
    """Another model's head counts may want the other kernels."""
    for heads in ((2, 2, 16), (8, 2, 8), (2, 2, 16)):
        harness = Harness("flashinfer", make_config(*heads), 4, 30)
        (request,) = [Request(InputRequest(prompt_token_ids=[1] * 9, output_len=9))]
        assert harness.step([Chunk(request, 0, 9)]) < 1e-5
        for position in range(9, 12):
            assert harness.step([Chunk(request, position, 1)]) < 1e-5
        (turns,) = flashinfer_stand_in._turns.values()
        assert turns[-1].use_tensor_cores == (heads == (8, 2, 8))


def test_flashinfer_in_a_graph_is_planned_before_each_replay(flashinfer_stand_in):
    """One attend, made once; what it reads changes by `plan` alone. Two rows of padding go to the scratch page."""
    torch.manual_seed(3)
    harness = Harness("flashinfer", make_config(8, 2, 8), 4, 40)
    requests = [Request(InputRequest(prompt_token_ids=[1] * n, output_len=9), i) for i, n in enumerate((3, 4, 9))]
    assert harness.step([Chunk(r, 0, r.num_prefill) for r in requests]) < 1e-5
    decode = flashinfer_stand_in.FlashInferGraphDecode(harness.model, harness.pool, harness.table, 5)
    for layer in harness.pool.layers:
        layer[harness.pool.scratch_page] = 0
    slots, lens = torch.full((5,), 8, dtype=torch.int32), torch.ones(5, dtype=torch.int32)
    for position in range(4):
        chunks = [Chunk(r, r.num_computed, 1) for r in requests]
        reserve_pages(harness.pool, chunks)
        for i, r in enumerate(requests):
            harness.table[i, : len(r.pages.indices)] = torch.tensor(r.pages.indices, dtype=torch.int32)
            slots[i], lens[i] = i, r.pages.seqlen
        arange = torch.arange(6, dtype=torch.int32)
        batch = DeviceBatch(slots, lens, arange, lens - 1, slots, arange[:0], arange[:-1], arange[:-1])
        lists = [r.pages.indices for r in requests] + [[harness.pool.scratch_page]] * 2
        decode.plan(lens.numpy(), lists)
        attend = decode.attend(batch)
        for layer in range(LAYERS):
            qkv = torch.randn(5, (8 + 2 * 2) * 8)
            want = [
                harness.oracle.attend(r, layer, c.start, qkv[i : i + 1])
                for i, (r, c) in enumerate(zip(requests, chunks))
            ]
            assert (attend(layer, qkv.clone())[:3].double() - torch.cat(want)).abs().max() < 1e-5, position


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16(backend):
    torch.manual_seed(0)
    harness = Harness(backend, make_config(4, 2, 16), 4, 20, torch.float16)

    def check(error):
        assert error < 0.02

    random_steps(harness, random.Random(5), 10, 12, check)


@pytest.mark.parametrize("budget", [1, 700, 10**9])
def test_decodes_of_equal_and_unequal_lengths_gathered_in_any_pieces(budget, monkeypatch):
    """Rows of one length go together, as many as the budget of a gather allows."""
    monkeypatch.setitem(GATHER_BYTES, "cpu", budget)
    torch.manual_seed(1)
    harness = Harness("torch", make_config(4, 2, 8), 2, 60)
    lengths = [5, 5, 5, 1, 7, 7, 5]
    requests = [Request(InputRequest(prompt_token_ids=[1] * n, output_len=5), i) for i, n in enumerate(lengths)]
    assert harness.step([Chunk(r, 0, r.num_prefill) for r in requests]) < 1e-5
    for _ in range(3):
        assert harness.step([Chunk(r, r.num_computed, 1) for r in requests]) < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize("heads", [(3, 3, 8), (9, 3, 16), (8, 2, 8), (8, 1, 16)], ids=str)
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_decodes_together_are_what_each_is_alone(page_size, heads, dtype, tolerance, monkeypatch):
    """The fast form against the plain one, with anything from no padding to all rows as long as the longest; slots
    behind a row's own tokens are NaN in the pages and infinite in what an earlier gather left behind.
    """
    draw, config = random.Random(page_size), make_config(*heads)
    torch.manual_seed(page_size)
    calls = set()
    for _ in range(6):
        lengths = [draw.choice([1, 40, draw.randint(1, 120)]) for _ in range(draw.randint(3, 7))]
        num_pages = sum(pages_for(length + 1, page_size) for length in lengths)
        harness = Harness("torch", config, page_size, num_pages, dtype)
        requests = [Request(InputRequest(prompt_token_ids=[1] * n, output_len=5), i) for i, n in enumerate(lengths)]
        assert harness.step([Chunk(r, 0, r.num_prefill) for r in requests]) < tolerance
        host, attend = harness.attend([Chunk(r, r.num_computed, 1) for r in requests])
        q, k, v = attend.append(1, torch.randn(host.num_tokens, config.q_size + 2 * config.kv_size).to(dtype))
        alone = torch.cat([attend._piece(1, row, q[row : row + 1]) for row in range(len(requests))])
        for padding in (0, 1000, 10**9):
            monkeypatch.setitem(PADDING_BYTES, "cpu", padding)
            monkeypatch.setitem(GATHER_BYTES, "cpu", draw.choice([10**9, 100_000]))
            attend.groups = attend._decode_groups()
            calls.add((len(requests), len(attend.groups)))
            for scratch in _scratch_memory.values():
                scratch.fill_(torch.inf)
            assert (attend._decodes(1, q).double() - alone.double()).abs().max() < tolerance
    assert any(1 < count < rows for rows, count in calls) and any(count == 1 for rows, count in calls)


def test_a_padded_step_against_the_oracle(monkeypatch):
    """Rows are put in another order to be grouped, and their outputs back."""
    monkeypatch.setitem(PADDING_BYTES, "cpu", 10**9)
    torch.manual_seed(4)
    harness = Harness("torch", make_config(9, 3, 16), 16, 60)
    requests = [Request(InputRequest(prompt_token_ids=[1] * n, output_len=9), n) for n in (33, 2, 90, 17, 64, 40)]
    assert harness.step([Chunk(r, 0, r.num_prefill) for r in requests]) < 1e-5
    for _ in range(4):
        assert harness.step([Chunk(r, r.num_computed, 1) for r in requests]) < 1e-5


def test_inside_and_outside_inference_mode():
    """What is kept between steps must be writable in both."""
    for inference in (True, False):
        with torch.inference_mode(inference):
            harness = Harness("torch", make_config(2, 1, 8), 2, 99)
            (request,) = [Request(InputRequest(prompt_token_ids=[1] * 90, output_len=4))]
            assert harness.step([Chunk(request, 0, 90)]) < 1e-5
            assert harness.step([Chunk(request, 90, 1)]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_harness_sees_a_stale_slot(backend):
    """Poison in a slot that is read: the oracle must disagree, or the tests above prove nothing."""
    torch.manual_seed(2)
    harness = Harness(backend, make_config(2, 1, 16), 2, 10)
    request = Request(InputRequest(prompt_token_ids=[1, 2, 3], output_len=4))
    assert harness.step([Chunk(request, 0, 3)]) < 1e-5
    harness.pool.layers[1][request.pages.indices[0], 1, 1] = torch.nan
    error = harness.step([Chunk(request, 3, 1)])
    assert not error < 1e-5

"""The compiled Triton kernels against a float64 oracle on the GPU: random shapes, three dtypes, poisoned pages.

Compiling takes most of the time. What a kernel is compiled for (dtype, head size, page size, group, tiles) is therefore
varied by example, bfloat16 most, and not in all combinations; lengths, which compile nothing, are drawn at random.
"""

import random

import pytest
import torch

from common.kernels import matvec, paged_decode, paged_prefill, rms_norm, rope_append, silu_mul, small_gemm
from common.kernels.hopper_gemm import runs_hopper_gemm
from common.kernels.linear import (
    HOPPER_ROWS,
    MOST_ROWS,
    Linear,
    choose,
    linear_add,
    linear_float32,
    norm_gate_up_silu,
    norm_linear,
)
from common.kernels.rms_norm import Norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def examples(names, **by_dtype):
    """Parametrise over `dtype` and `names`: each dtype (bf16, f16, f32) with its own examples."""
    dtypes = {"bf16": BF16, "f16": F16, "f32": F32}
    rows = [(dtypes[name], *(v if isinstance(v, tuple) else (v,))) for name, values in by_dtype.items() for v in values]
    ids = ["-".join(str(value).removeprefix("torch.") for value in row) for row in rows]
    return pytest.mark.parametrize(f"dtype, {names}", rows, ids=ids)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    yield
    torch.set_default_device("cpu")


def close(got, want, dtype):
    assert got.dtype == dtype and torch.isfinite(got).all()
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


@examples("rows, features", bf16=[(1, 4096), (1024, 4096), (7, 576), (3, 8191)], f16=[(7, 576)], f32=[(3, 8191)])
def test_rms_norm(dtype, rows, features):
    shape = (rows, features)
    x, residual = (torch.randn(shape) * 3).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[1]).to(dtype)
    total = x + residual
    for got, source in (
        (rms_norm.rms_norm_triton(x, Norm(weight, 1e-5)), x),
        (rms_norm.add_rms_norm_triton(x, residual, Norm(weight, 1e-5))[0], total),
    ):
        want = source.double() / (source.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        close(got, want, dtype)
    assert torch.equal(rms_norm.add_rms_norm_triton(x, residual, Norm(weight, 1e-5))[1], total)


@examples("rows, features", bf16=[(1, 28672), (70000, 6), (129, 1000)], f16=[(129, 1000)], f32=[(5, 28672)])
def test_silu_mul(dtype, rows, features):
    x = (torch.randn(rows, features) * 4).to(dtype)
    gate, up = x.double().chunk(2, -1)
    close(silu_mul.silu_mul_triton(x), gate * gate.sigmoid() * up, dtype)


@examples(
    "outputs, features",
    bf16=[(1536, 576), (1001, 4096), (128, 14336), (96, 28672)],
    f16=[(1536, 576)],
    f32=[(1001, 4096)],
)
def test_matvec(dtype, outputs, features):
    rows = 1
    x, weight = torch.randn(rows, features).to(dtype), (torch.randn(2 * outputs, features) * features**-0.5).to(dtype)
    norm, residual = torch.randn(features).to(dtype), torch.randn(rows, outputs).to(dtype)
    x64, w64 = x.double(), weight.double()
    normed = x64 / (x64.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * norm.double()
    close(matvec.matvec(x, weight, norm_weight=norm, eps=0.1), normed @ w64.T, dtype)
    close(matvec.matvec(x, weight[:outputs], residual=residual), x64 @ w64[:outputs].T + residual.double(), dtype)
    gate, up = (normed @ w64.T).chunk(2, -1)
    close(matvec.matvec(x, weight, norm_weight=norm, eps=0.1, silu=True), gate * gate.sigmoid() * up, dtype)


LONG = (128, 14336)
TILES = {  # (BLOCK_N, BLOCK_T, BLOCK_K, splits, num_warps, stages, TMA): not what _plan takes for these shapes
    BF16: [(64, 64, 64, 4, 4, 3, False), (64, 32, 128, 3, 4, 3, True), (128, 128, 64, 1, 8, 3, True)],
    F16: [(64, 64, 64, 4, 4, 3, False)],
    F32: [],
}


@examples(
    "rows, outputs, features",
    bf16=[(5, 1536, 576), (16, *LONG), (33, 1000, 4096), (100, 1536, 576), (256, *LONG)],
    f16=[(33, 1536, 576), (100, 1000, 4096)],
    f32=[(5, 1000, 4096), (100, 1536, 576)],
)
def test_small_gemm(dtype, rows, outputs, features):
    x, weight = torch.randn(rows, features).to(dtype), (torch.randn(2 * outputs, features) * features**-0.5).to(dtype)
    residual = torch.randn(rows, outputs).to(dtype)
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    for plan in (None, *(plan for plan in TILES[dtype] if outputs == 1536 and (hopper or not plan[-1]))):
        for _ in range(2):
            got = small_gemm.small_gemm(x, weight[:outputs], residual=residual, plan=plan)
            close(got, gate + residual.double(), dtype)
        close(small_gemm.small_gemm(x, weight, silu=True, plan=plan), gate * gate.sigmoid() * up, dtype)


@examples("rows", bf16=[1, 2, 32, 33, 128, 200], f16=[1, 33], f32=[1, 200])
def test_named_operations_agree_whatever_runs(dtype, rows):
    features, width = 1024, 2816
    qkv, down, gate_up = (
        Linear((torch.randn(shape) * shape[1] ** -0.5).to(dtype))
        for shape in ((1536, features), (features, width), (2 * width, features))
    )
    norm = Norm(torch.rand(features).to(dtype), 1e-5)
    x, a = torch.randn(rows, features).to(dtype), torch.randn(rows, width).to(dtype)
    x64, weights = x.double(), [w.weight.double() for w in (qkv, down, gate_up)]
    normed = x64 / (x64.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    close(norm_linear(x, norm, qkv), normed @ weights[0].T, dtype)
    close(linear_add(a, down, x.clone()), x64 + a.double() @ weights[1].T, dtype)
    gate, up = (normed @ weights[2].T).chunk(2, -1)
    close(norm_gate_up_silu(x, norm, gate_up), gate * gate.sigmoid() * up, dtype)
    logits = linear_float32(x, qkv)
    assert logits.dtype == torch.float32
    close(logits.to(dtype), x64 @ weights[0].T, dtype)
    half_on_hopper = torch.cuda.get_device_capability() >= (9, 0) and dtype != torch.float32
    for name, linear, given in (("norm_linear", qkv, x), ("linear_add", down, a), ("norm_gate_up_silu", gate_up, x)):
        if rows == 1:
            want = "matvec"
        elif rows in HOPPER_ROWS.get(name, ()) and runs_hopper_gemm(given, linear.weight):
            want = "hopper_gemm"
        else:
            want = "small_gemm" if half_on_hopper and rows <= MOST_ROWS[name] else "library"
        assert choose(given, linear, name) == want, name


class Paged:
    """Random sequences in shuffled pages; every slot that no sequence uses is NaN."""

    def __init__(self, lengths, kv_heads, head_dim, page_size, dtype):
        used = [-(-length // page_size) for length in lengths]
        order = torch.randperm(sum(used) + 2).tolist()
        columns = max(used) + 1 | 1  # an odd stride whatever the lengths: one kernel serves them all
        self.table = torch.full((len(lengths), columns), order.pop(), dtype=torch.int32)
        self.pages = torch.full((len(order) + 1, 2, page_size, kv_heads, head_dim), float("nan"), dtype=dtype)
        self.lens = torch.tensor(lengths, dtype=torch.int32)
        self.kv = [torch.randn(2, length, kv_heads, head_dim).to(dtype) for length in lengths]
        for b, kv in enumerate(self.kv):
            padded = torch.nn.functional.pad(kv, (0, 0, 0, 0, 0, used[b] * page_size - kv.shape[1]), value=float("nan"))
            ids = torch.tensor([order.pop() for _ in range(used[b])], dtype=torch.int32)
            self.table[b, : used[b]] = ids
            self.pages[ids.long()] = padded.unflatten(1, (-1, page_size)).transpose(0, 1)

    def attend(self, b, q, seen):
        """The oracle: q [n, Hq, d], query i over the first seen[i] tokens, in float64."""
        k, v = self.kv[b].double()
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("nhd,thd->hnt", q.double(), k) * q.shape[-1] ** -0.5
        hidden = torch.arange(k.shape[0])[None, :] >= torch.as_tensor(seen)[:, None]
        return torch.einsum("hnt,thd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def tables(context, head_dim):
    angles = torch.arange(context).double()[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return angles.cos().float(), angles.sin().float()


def random_lengths(draw, count, longest):
    """Short, long and everything between; now and then at the edge of a page or block."""
    return [
        min(draw.choice([1, draw.randint(1, 64), 64 * draw.randint(1, 20), longest]), longest) for _ in range(count)
    ]


ATTENTION = {
    "bf16": [(4, 128, 16), (1, 64, 1), (8, 128, 256), (4, 80, 3), (8, 64, 64), (3, 64, 16)],
    "f16": [(4, 128, 16), (8, 64, 1)],
    "f32": [(4, 128, 16), (1, 64, 64), (8, 80, 3)],
}


@examples("group, head_dim, page_size", **ATTENTION)
def test_paged_decode(dtype, group, head_dim, page_size):
    draw, plans = random.Random(f"{group} {head_dim}"), [None]
    if dtype.itemsize == 2 and (group, head_dim, page_size) in ((4, 128, 16), (8, 64, 64)):
        plans += [(1, 64, 4, 3, False), (7, 32, 4, 4, True), (64, 64, 4, 5, True)]
    for lengths in ([5000, 1, 17, 333, 1024], *(random_lengths(draw, 5, 3000) for _ in range(4))):
        check_decode(lengths, 2, group, head_dim, page_size, dtype, plans)


@pytest.mark.parametrize("batch", [1, 70, 300, 520])
def test_paged_decode_of_small_and_large_batches(batch):
    """Each is split and tiled in its own way (paged_decode._plan)."""
    lengths = random_lengths(random.Random(batch), batch, 9000 if batch == 1 else 700)
    check_decode(lengths, 2, 4, 128, 16, BF16, [None])


def check_decode(lengths, kv_heads, group, head_dim, page_size, dtype, plans):
    cache = Paged(lengths, kv_heads, head_dim, page_size, dtype)
    q = torch.randn(len(lengths), kv_heads * group, head_dim).to(dtype)
    want = torch.cat([cache.attend(b, q[b : b + 1], [n]) for b, n in enumerate(lengths)])
    for plan in plans:
        for _ in range(2):  # the second begins while the first one ends
            options = {"early": True, "plan": plan}
            close(paged_decode.paged_decode_triton(q, cache.pages, cache.table, cache.lens, **options), want, dtype)


@examples(
    "heads, kv_heads, head_dim, page_size",
    bf16=[(32, 8, 128, 16), (9, 3, 64, 5), (4, 4, 40, 1)],
    f16=[(32, 8, 128, 16)],
    f32=[(9, 3, 64, 5)],
)
def test_rope_append_and_decode_agree_with_the_plain_versions(dtype, heads, kv_heads, head_dim, page_size):
    check_rope_append_and_decode([700, 1, 65], heads, kv_heads, head_dim, page_size, dtype)


def test_rope_append_and_decode_agree_where_the_batch_is_balanced():
    lengths = random_lengths(random.Random(0), 200, 700)
    check_rope_append_and_decode(lengths, 32, 8, 128, 16, BF16)


def check_rope_append_and_decode(lengths, heads, kv_heads, head_dim, page_size, dtype):
    cache = Paged(lengths, kv_heads, head_dim, page_size, dtype)
    cos, sin = tables(800, head_dim)
    qkv = torch.randn(len(lengths), (heads + 2 * kv_heads) * head_dim).to(dtype)
    plain, fused, apart = cache.pages.clone(), cache.pages.clone(), cache.pages.clone()
    want = paged_decode.rope_append_decode_reference(
        qkv.clone(), plain, cache.table, cache.lens, cos, sin, heads, out_dtype=torch.float64
    )
    got = paged_decode.rope_append_decode_triton(qkv.clone(), fused, cache.table, cache.lens, cos, sin, heads)
    close(got, want, dtype)
    rows = torch.arange(len(lengths), dtype=torch.int32)
    q, _, _ = rope_append.rope_append_triton(qkv, apart, cache.table, rows, cache.lens - 1, cos, sin, heads)
    close(paged_decode.paged_decode_triton(q, apart, cache.table, cache.lens), want, dtype)
    for pages in (fused, apart):
        assert torch.equal(pages.isnan(), plain.isnan())
        close(pages.nan_to_num(), plain.nan_to_num(), dtype)


@examples("group, head_dim, page_size", **ATTENTION)
def test_paged_prefill(dtype, group, head_dim, page_size):
    draw = random.Random(f"{group} {head_dim}")
    check_prefill([(0, 700), (1000, 1), (333, 200), (0, 5), (64, 129)], group, head_dim, page_size, dtype)
    for _ in range(3):
        pieces = [(draw.choice([0, draw.randint(1, 800)]), draw.choice([1, draw.randint(1, 400)])) for _ in range(5)]
        check_prefill(pieces, group, head_dim, page_size, dtype)


def test_paged_prefill_without_context_and_in_the_tiles_of_long_prompts():
    pieces = [(0, 700), (0, 1), (0, 128), (0, 65), (0, 300)]
    check_prefill(pieces, 4, 128, 16, BF16, context=False)
    check_prefill(pieces, 4, 128, 16, BF16, context=False, tiles=(128, 64, 8, 3))
    check_prefill([(100, 300), (0, 1), (129, 128)], 4, 128, 16, BF16, tiles=(128, 64, 8, 3))


def check_prefill(pieces, group, head_dim, page_size, dtype, **options):
    cache = Paged([prior + new for prior, new in pieces], 2, head_dim, page_size, dtype)
    q_indptr = torch.tensor([0, *(new for _, new in pieces)]).cumsum(0).int()
    q = torch.randn(int(q_indptr[-1]), 2 * group, head_dim).to(dtype)
    k, v = (torch.cat([cache.kv[s][i, prior:] for s, (prior, _) in enumerate(pieces)]) for i in (0, 1))
    want = torch.cat([
        cache.attend(s, q[q_indptr[s] : q_indptr[s + 1]], range(prior + 1, prior + new + 1))
        for s, (prior, new) in enumerate(pieces)
    ])  # fmt: skip
    arguments = (q, k, v, cache.pages, cache.table, q_indptr, cache.lens)
    close(paged_prefill.paged_prefill_triton(*arguments, **options), want, dtype)

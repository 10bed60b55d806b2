"""The compiled Triton kernels against a float64 oracle on the GPU: random shapes, three dtypes, poisoned pages."""

import pytest
import torch

from common.kernels import matvec, paged_decode, paged_prefill, rms_norm, rope_append, silu_mul, small_gemm
from common.kernels.linear import Linear, choose, linear_add, linear_float32, norm_gate_up_silu, norm_linear
from common.kernels.rms_norm import Norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).split(".")[1])


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


@DTYPES
@pytest.mark.parametrize("shape", [(1, 4096), (1024, 4096), (7, 576), (3, 8191)])
def test_rms_norm(dtype, shape):
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


@DTYPES
@pytest.mark.parametrize("shape", [(1, 28672), (70000, 6), (129, 1000)])
def test_silu_mul(dtype, shape):
    x = (torch.randn(shape) * 4).to(dtype)
    gate, up = x.double().chunk(2, -1)
    close(silu_mul.silu_mul_triton(x), gate * gate.sigmoid() * up, dtype)


@DTYPES
@pytest.mark.parametrize("outputs, features", [(1536, 576), (1001, 4096), (128, 14336), (96, 28672)])
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


@DTYPES
@pytest.mark.parametrize("rows", [5, 16, 33, 100, 256])
@pytest.mark.parametrize("outputs, features", [(1536, 576), (1000, 4096), (128, 14336)])
def test_small_gemm(dtype, rows, outputs, features):
    x, weight = torch.randn(rows, features).to(dtype), (torch.randn(2 * outputs, features) * features**-0.5).to(dtype)
    residual = torch.randn(rows, outputs).to(dtype)
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    plans = [None]
    if dtype.itemsize == 2:
        plans += [(64, 64, 64, 4, 4, 3, False)]
        if torch.cuda.get_device_capability() >= (9, 0):
            plans += [(64, 32, 128, 3, 4, 3, True), (128, 128, 64, 1, 8, 3, True)]
    for plan in plans:
        for _ in range(2):
            got = small_gemm.small_gemm(x, weight[:outputs], residual=residual, plan=plan)
            close(got, gate + residual.double(), dtype)
        close(small_gemm.small_gemm(x, weight, silu=True, plan=plan), gate * gate.sigmoid() * up, dtype)


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 32, 33, 128, 200])
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
    if rows == 1:
        assert choose(x, qkv, 0) == "matvec"
    elif torch.cuda.get_device_capability() >= (9, 0) and dtype != torch.float32:
        assert choose(x, qkv, rows) == "small_gemm" and choose(x, qkv, rows - 1) == "library"
    else:
        assert choose(x, qkv, rows) == "library"


class Paged:
    """Random sequences in shuffled pages; every slot that no sequence uses is NaN."""

    def __init__(self, lengths, kv_heads, head_dim, page_size, dtype):
        used = [-(-length // page_size) for length in lengths]
        order = torch.randperm(sum(used) + 2).tolist()
        self.table = torch.full((len(lengths), max(used) + 1), order.pop(), dtype=torch.int32)
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


@DTYPES
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("head_dim, page_size", [(64, 1), (128, 16), (128, 256), (80, 3), (64, 64)])
def test_paged_decode(dtype, group, head_dim, page_size):
    lengths = [5000, 1, 17, 333, 1024]
    cache = Paged(lengths, 2, head_dim, page_size, dtype)
    q = torch.randn(5, 2 * group, head_dim).to(dtype)
    want = torch.cat([cache.attend(b, q[b : b + 1], [n]) for b, n in enumerate(lengths)])
    for plan in (None, (1, 64, 4, 3), (7, 32, 4, 4), (64, 64, 4, 5)):
        plan = None if dtype == torch.float32 else plan
        for _ in range(2):
            close(paged_decode.paged_decode_triton(q, cache.pages, cache.table, cache.lens, plan=plan), want, dtype)


@DTYPES
@pytest.mark.parametrize("heads, kv_heads, head_dim, page_size", [(32, 8, 128, 16), (9, 3, 64, 5), (4, 4, 40, 1)])
def test_rope_append_and_decode_agree_with_the_plain_versions(dtype, heads, kv_heads, head_dim, page_size):
    lengths = [700, 1, 65]
    cache = Paged(lengths, kv_heads, head_dim, page_size, dtype)
    cos, sin = tables(800, head_dim)
    qkv = torch.randn(3, (heads + 2 * kv_heads) * head_dim).to(dtype)
    plain, fused, apart = cache.pages.clone(), cache.pages.clone(), cache.pages.clone()
    want = paged_decode.rope_append_decode_reference(
        qkv.clone(), plain, cache.table, cache.lens, cos, sin, heads, out_dtype=torch.float64
    )
    got = paged_decode.rope_append_decode_triton(qkv.clone(), fused, cache.table, cache.lens, cos, sin, heads)
    close(got, want, dtype)
    rows = torch.arange(3, dtype=torch.int32)
    q, _, _ = rope_append.rope_append_triton(qkv, apart, cache.table, rows, cache.lens - 1, cos, sin, heads)
    close(paged_decode.paged_decode_triton(q, apart, cache.table, cache.lens), want, dtype)
    for pages in (fused, apart):
        assert torch.equal(pages.isnan(), plain.isnan())
        close(pages.nan_to_num(), plain.nan_to_num(), dtype)


@DTYPES
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("head_dim, page_size", [(64, 1), (128, 16), (80, 3), (128, 256)])
def test_paged_prefill(dtype, group, head_dim, page_size):
    pieces = [(0, 700), (1000, 1), (333, 200), (0, 5), (64, 129)]
    cache = Paged([prior + new for prior, new in pieces], 2, head_dim, page_size, dtype)
    q_indptr = torch.tensor([0, *(new for _, new in pieces)]).cumsum(0).int()
    q = torch.randn(int(q_indptr[-1]), 2 * group, head_dim).to(dtype)
    k, v = (torch.cat([cache.kv[s][i, prior:] for s, (prior, _) in enumerate(pieces)]) for i in (0, 1))
    want = torch.cat([
        cache.attend(s, q[q_indptr[s] : q_indptr[s + 1]], range(prior + 1, prior + new + 1))
        for s, (prior, new) in enumerate(pieces)
    ])  # fmt: skip
    arguments = (q, k, v, cache.pages, cache.table, q_indptr, cache.lens)
    close(paged_prefill.paged_prefill_triton(*arguments), want, dtype)

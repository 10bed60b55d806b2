"""Every Triton kernel against a float64 oracle, in Triton's interpreter (float32 and float16, small shapes)."""

import pytest
import torch

from common.kernels import (
    balanced_decode,
    matvec,
    paged_decode,
    paged_prefill,
    rms_norm,
    rope_append,
    runtime,
    silu_mul,
    small_gemm,
)
from common.kernels.rms_norm import Norm

pytestmark = pytest.mark.skipif(
    not (runtime.HAS_TRITON and runtime.INTERPRETED),
    reason="needs Triton's interpreter (tests/gpu has the compiled ones)",
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def close(got, want, dtype):
    assert got.dtype == dtype and torch.isfinite(got).all()
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (3, 2048)])
def test_rms_norm(dtype, shape):
    x, residual, weight = (
        randn(*shape, dtype=dtype) * 3,
        randn(*shape, dtype=dtype, seed=1),
        randn(shape[1], dtype=dtype),
    )
    want = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    close(rms_norm.rms_norm_triton(x, Norm(weight, 1e-5)), want, dtype)
    close(rms_norm.rms_norm_reference(x, Norm(weight, 1e-5)), want, dtype)
    total = x + residual
    want = total.double() / (total.double().pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * weight.double()
    normed, added = rms_norm.add_rms_norm_triton(
        x, residual, Norm(weight, 0.5)
    )  # an eps large enough to be missed if ignored
    close(normed, want, dtype)
    assert torch.equal(added, total)


def test_rms_norm_of_strided_rows():
    x = randn(6, 80)[:, :64]
    norm = Norm(torch.ones(64), 1e-6)
    close(rms_norm.rms_norm_triton(x, norm), rms_norm.rms_norm_reference(x.contiguous(), norm), x.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 6), (3, 200), (2, 2, 5000)])
def test_silu_mul(dtype, shape):
    x = randn(*shape, dtype=dtype) * 4
    gate, up = x.double().chunk(2, -1)
    close(silu_mul.silu_mul_triton(x), gate / (1 + (-gate).exp()) * up, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("outputs, features", [(64, 128), (37, 100), (130, 576)])
def test_matvec(dtype, outputs, features):
    rows = 1
    x, weight = randn(rows, features, dtype=dtype), randn(2 * outputs, features, dtype=dtype) * features**-0.5
    norm, residual = randn(features, dtype=dtype), randn(rows, outputs, dtype=dtype)
    x64, w64 = x.double(), weight.double()
    normed = x64 / (x64.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * norm.double()
    close(matvec.matvec(x, weight), x64 @ w64.T, dtype)
    close(matvec.matvec(x, weight, norm_weight=norm, eps=0.1), normed @ w64.T, dtype)
    close(matvec.matvec(x, weight[:outputs], residual=residual), x64 @ w64[:outputs].T + residual.double(), dtype)
    gate, up = (normed @ w64.T).chunk(2, -1)
    want = gate * gate.sigmoid() * up
    close(matvec.matvec(x, weight, norm_weight=norm, eps=0.1, silu=True), want, dtype)
    close(
        matvec.matvec_reference(x.double(), w64, norm_weight=norm.double(), eps=0.1, silu=True).to(dtype), want, dtype
    )
    assert matvec.matvec(x, weight, out_dtype=torch.float32).dtype == torch.float32


class Paged:
    """Random sequences in shuffled pages; every slot that no sequence uses is NaN."""

    def __init__(self, lengths, kv_heads, head_dim, page_size, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        used = [-(-length // page_size) for length in lengths]
        order = torch.randperm(sum(used) + 2, generator=generator).tolist()
        self.table = torch.full((len(lengths), max([*used, 1]) + 1), order.pop(), dtype=torch.int32)
        shape = (len(order) + 1, 2, page_size, kv_heads, head_dim)
        self.pages = torch.full(shape, float("nan"), dtype=dtype)
        self.lens = torch.tensor(lengths, dtype=torch.int32)
        self.kv = []
        for b, length in enumerate(lengths):
            kv = torch.randn(2, length, kv_heads, head_dim, generator=generator).to(dtype)
            self.kv.append(kv)
            for i in range(used[b]):
                self.table[b, i] = page = order.pop()
                piece = kv[:, i * page_size : (i + 1) * page_size]
                self.pages[page, :, : piece.shape[1]] = piece

    def attend(self, b, q, length=None):
        """The oracle for one query [Hq, d] over the first `length` tokens, in float64."""
        k, v = self.kv[b][:, :length].double()
        group = q.shape[0] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        p = (torch.einsum("hd,thd->ht", q.double(), k) * q.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("ht,thd->hd", p, v)


DECODE_CASES = [
    # lengths, query heads, KV heads, head_dim, page size, plan (splits, BLOCK_KV, warps, stages, peel)
    ((1,), 1, 1, 64, 1, (1, 32, 4, 2, False)),
    ((33, 1, 64), 4, 1, 64, 16, (3, 16, 4, 2, True)),
    ((70, 5), 8, 2, 32, 3, (4, 16, 4, 2, True)),
    ((100, 16), 6, 6, 40, 64, (2, 32, 4, 2, True)),
    ((40, 300), 8, 1, 128, 256, (8, 32, 4, 2, False)),
    ((17,), 9, 3, 64, 2, None),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", DECODE_CASES)
def test_paged_decode(dtype, case):
    lengths, heads, kv_heads, head_dim, page_size, plan = case
    cache = Paged(lengths, kv_heads, head_dim, page_size, dtype)
    q = randn(len(lengths), heads, head_dim, dtype=dtype)
    want = torch.stack([cache.attend(b, q[b]) for b in range(len(lengths))])
    close(paged_decode.reference(q, cache.pages, cache.table, cache.lens), want, dtype)
    for early in (False, True):
        options = {"early": early, "plan": plan}
        close(paged_decode.paged_decode_triton(q, cache.pages, cache.table, cache.lens, **options), want, dtype)


def test_a_first_block_is_held_in_registers_only_where_enough_programs_still_fit(monkeypatch):
    """132 multiprocessors; blocks of 128 tokens in registers leave room for two programs on each."""
    monkeypatch.setattr(paged_decode, "num_sms", lambda device: 132)
    monkeypatch.setattr(paged_decode, "capability", lambda device: (9, 0))
    plans = {
        batch: paged_decode._plan(batch, 8, 8192, 256, torch.device("cuda")) for batch in (1, 8, 16, 32, 48, 64, 256)
    }
    assert {batch: plan[4] for batch, plan in plans.items()} == {
        1: True, 8: True, 16: False, 32: True, 48: False, 64: True, 256: False,
    }  # fmt: skip
    assert [plans[batch][1] for batch in (1, 8, 16, 32, 48, 64)] == [64, 32, 128, 128, 128, 64]


def test_paged_decode_of_an_empty_row_is_zero():
    cache = Paged((0, 20), 2, 32, 4, torch.float32)
    q = randn(2, 4, 32)
    out = paged_decode.paged_decode_triton(q, cache.pages, cache.table, cache.lens)
    assert (out[0] == 0).all() and torch.isfinite(out).all()
    close(out[1], cache.attend(1, q[1]), torch.float32)


def tables(context, head_dim):
    angles = torch.arange(context).float()[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    return angles.cos(), angles.sin()


def rotate(x, position):
    """The oracle: complex multiplication in float64, x [..., d] at one position."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-torch.arange(half).double() * 2 / x.shape[-1])
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, kv_heads, head_dim, page_size", [(4, 2, 64, 4), (3, 3, 40, 1), (9, 3, 16, 16)])
@pytest.mark.parametrize("version", [rope_append.reference, rope_append.rope_append_triton])
def test_rope_append(dtype, heads, kv_heads, head_dim, page_size, version):
    positions = torch.tensor([0, 1, 2, 7, 3, -1], dtype=torch.int32)
    slots = torch.tensor([1, 1, 1, 0, 0, 1], dtype=torch.int32)
    table = torch.randperm(32).view(2, 16).int()
    pages = torch.full((33, 2, page_size, kv_heads, head_dim), 7.0, dtype=dtype)
    qkv = randn(6, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    original = qkv.clone().unflatten(-1, (-1, head_dim))
    cos, sin = tables(16, head_dim)
    q, k, v = version(qkv, pages, table, slots, positions, cos, sin, heads)
    touched = torch.zeros(pages.shape[0], page_size, dtype=torch.bool)
    for t, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist())):
        want = rotate(original[t, : heads + kv_heads], max(position, 0))
        close(torch.cat((q[t], k[t])), want, dtype)
        assert torch.equal(v[t], original[t, heads + kv_heads :])
        if position >= 0:
            page, offset = int(table[slot, position // page_size]), position % page_size
            assert torch.equal(pages[page, 0, offset], k[t]) and torch.equal(pages[page, 1, offset], v[t])
            touched[page, offset] = True
    assert (pages.transpose(1, 2)[~touched] == 7.0).all()  # nothing else was written


def append_and_attend(cache, qkv, heads):
    """The oracle of a decode step: puts the newest k and v into `cache.kv`; the rotated queries' attention [B, Hq,
    d].
    """
    kv_heads, head_dim = cache.kv[0].shape[2:]
    want = []
    for b, new in enumerate(qkv.unflatten(-1, (-1, head_dim))):
        newest = cache.kv[b].shape[1] - 1
        cache.kv[b][0, -1] = rotate(new[heads : heads + kv_heads], newest).to(qkv.dtype)
        cache.kv[b][1, -1] = new[heads + kv_heads :]
        want.append(cache.attend(b, rotate(new[:heads], newest).to(qkv.dtype)))
    return torch.stack(want)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", DECODE_CASES[1:5])
def test_rope_append_decode(dtype, case):
    lengths, heads, kv_heads, head_dim, page_size, plan = case
    cache = Paged(lengths, kv_heads, head_dim, page_size, dtype)
    qkv = randn(len(lengths), (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cos, sin = tables(max(lengths), head_dim)
    want = append_and_attend(cache, qkv, heads)
    for version, kwargs in (
        (paged_decode.rope_append_decode_triton, {"plan": plan}),
        (paged_decode.rope_append_decode_triton, {"plan": plan, "early": True}),
        (paged_decode.rope_append_decode_reference, {}),
    ):
        pages = cache.pages.clone()
        out = version(qkv.clone(), pages, cache.table, cache.lens, cos, sin, heads, **kwargs)
        close(out, want, dtype)
        for b, length in enumerate(lengths):
            page, offset = int(cache.table[b, (length - 1) // page_size]), (length - 1) % page_size
            close(pages[page, :, offset], cache.kv[b][:, -1], dtype)


BALANCED_CASES = [
    # lengths, query heads, KV heads, head_dim, page size, programs a multiprocessor (there are 4, and 4 shares a head)
    ((1,), 1, 1, 64, 1, 1),  # more shares than blocks
    ((70, 5, 1, 16, 33), 8, 2, 32, 3, 2),  # shares that begin and end inside a row, or hold several whole ones
    ((150, 1), 6, 2, 40, 64, 12),  # a row cut many times
    ((32, 32, 32, 32), 3, 1, 64, 16, 1),  # borders that fall on rows' ends: nothing to merge
    ((1, 2, 200, 3, 90), 9, 3, 64, 16, 3),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", BALANCED_CASES)
def test_balanced_decode(dtype, case):
    lengths, heads, kv_heads, head_dim, page_size, per_sm = case
    cache = Paged(lengths, kv_heads, head_dim, page_size, dtype)
    plan, rows = (per_sm, 16, 1, 2), range(len(lengths))
    q = randn(len(lengths), heads, head_dim, dtype=dtype)
    want = torch.stack([cache.attend(b, q[b]) for b in rows])
    for early in (False, True):
        given = (q, None, cache.pages, cache.table, cache.lens, None, None, early, plan)
        close(balanced_decode.balanced_decode_triton(*given), want, dtype)

    qkv = randn(len(lengths), (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    tables_ = tables(max(lengths), head_dim)
    want = append_and_attend(cache, qkv, heads)
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 1)
    given = (q, (k, v), cache.pages, cache.table, cache.lens, tables_, None, True, plan)
    close(balanced_decode.balanced_decode_triton(*given), want, dtype)
    for b, length in enumerate(lengths):
        page, offset = int(cache.table[b, (length - 1) // page_size]), (length - 1) % page_size
        close(cache.pages[page, :, offset], cache.kv[b][:, -1], dtype)


def test_balanced_decode_of_an_empty_row_is_zero():
    cache = Paged((0, 20, 0), 2, 32, 4, torch.float32)
    q = randn(3, 4, 32)
    out = paged_decode.paged_decode_triton(q, cache.pages, cache.table, cache.lens, balanced=True)
    assert (out[[0, 2]] == 0).all() and torch.isfinite(out).all()
    close(out[1], cache.attend(1, q[1]), torch.float32)


def test_a_batch_that_fills_the_device_is_balanced(monkeypatch):
    monkeypatch.setattr(paged_decode, "capability", lambda device: (9, 0))
    taken = {batch: paged_decode._balances(batch, 8, torch.device("cuda")) for batch in (1, 63, 64, 256, 2000)}
    assert taken == {1: False, 63: False, 64: True, 256: True, 2000: False}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "pieces, heads, kv_heads, head_dim, page_size, tiles",
    [
        (((0, 1),), 1, 1, 16, 1, None),
        (((0, 40), (7, 1), (33, 17)), 4, 2, 32, 4, (16, 16, 4, 2)),
        (((5, 16), (0, 33), (100, 30)), 3, 1, 40, 16, (32, 16, 4, 1)),
        (((20, 50), (0, 0), (1, 3)), 2, 2, 64, 256, (16, 32, 4, 1)),
    ],
)
def test_paged_prefill(dtype, pieces, heads, kv_heads, head_dim, page_size, tiles):
    cache = Paged([prior + new for prior, new in pieces], kv_heads, head_dim, page_size, dtype)
    q_indptr = torch.tensor([0, *(new for _, new in pieces)]).cumsum(0).int()
    q = randn(int(q_indptr[-1]), heads, head_dim, dtype=dtype)
    k, v = (torch.cat([cache.kv[s][i, prior:] for s, (prior, _) in enumerate(pieces)]) for i in (0, 1))
    # The new tokens are read from k and v: in the pages they are poison.
    for s, (prior, new) in enumerate(pieces):
        for position in range(prior, prior + new):
            cache.pages[cache.table[s, position // page_size], :, position % page_size] = float("nan")
    want = [
        cache.attend(s, q[q_indptr[s] + i], prior + i + 1) for s, (prior, new) in enumerate(pieces) for i in range(new)
    ]
    arguments = (q, k, v, cache.pages, cache.table, q_indptr, cache.lens)
    close(paged_prefill.reference(*arguments), torch.stack(want), dtype)
    close(paged_prefill.paged_prefill_triton(*arguments, tiles=tiles), torch.stack(want), dtype)
    if not any(prior for prior, _ in pieces):
        close(paged_prefill.paged_prefill_triton(*arguments, context=False), torch.stack(want), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "rows, outputs, features, plan",
    [
        (2, 64, 64, None),
        (17, 40, 100, (16, 16, 32, 1, 4, 2, False)),
        (40, 100, 256, (32, 64, 32, 3, 4, 2, False)),
        (33, 64, 128, (32, 16, 64, 2, 4, 2, True)),
    ],
)
def test_small_gemm(dtype, rows, outputs, features, plan):
    x, weight = randn(rows, features, dtype=dtype), randn(2 * outputs, features, dtype=dtype) * features**-0.5
    residual = randn(rows, outputs, dtype=dtype)
    product = x.double() @ weight.double().T
    gate, up = product.chunk(2, -1)
    for _ in range(2):  # twice: the first call must leave the arrival counters at zero
        got = small_gemm.small_gemm(x, weight[:outputs], residual=residual, plan=plan)
        close(got, gate + residual.double(), dtype)
    close(small_gemm.small_gemm(x, weight, silu=True, plan=plan), gate * gate.sigmoid() * up, dtype)
    close(small_gemm.small_gemm(x, weight, out_dtype=torch.float32, plan=plan), product, torch.float32) if (
        dtype == torch.float32
    ) else None

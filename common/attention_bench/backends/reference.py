"""What attention should give, to a higher precision than any backend: the check before a backend is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from common.attention_bench.backends.base import DecodeCase, DecodeInputs, PrefillCase, PrefillInputs

FLOAT64_FLOPS = 1e11  # up to here the reference is float64, which consumer cards do at a sixty-fourth of their speed
CPU_FLOAT64_FLOPS = 1e9
BLOCK_SCORES = 1 << 26  # scores held at a time
# Largest error of one output row (a token and head), relative to that row. A row is a weighted mean of n values, so
# losing one of n equal keys moves it by about 1/sqrt(n), 2 % at 4k; rounding to 16 bits moves it by 0.1 to 0.4 %.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}


def reference(case: PrefillCase | DecodeCase, inputs: PrefillInputs | DecodeInputs) -> torch.Tensor:
    """[tokens, Hq, d] in float64 where that is quick, else in float32: softmax(q k' / sqrt(d)) v, block by block."""
    if isinstance(inputs, DecodeInputs):
        k, v = inputs.packed
        q_lens = (1,) * case.batch
    else:
        k, v, q_lens = inputs.k, inputs.v, case.q_lens
    limit = FLOAT64_FLOPS if case.device.type == "cuda" else CPU_FLOAT64_FLOPS
    dtype = torch.float64 if case.flops <= limit else torch.float32
    out = torch.empty(inputs.q.shape, dtype=dtype, device=case.device)
    q_begin = kv_begin = 0
    with _ieee_products():
        for q_len, kv_len in zip(q_lens, case.kv_lens):
            q_end, kv_end = q_begin + q_len, kv_begin + kv_len
            keys, values = k[kv_begin:kv_end].to(dtype), v[kv_begin:kv_end].to(dtype)
            out[q_begin:q_end] = _one_sequence(inputs.q[q_begin:q_end], keys, values, dtype)
            q_begin, kv_begin = q_end, kv_end
    return out


def _one_sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q [n, Hq, d]; k, v [m, Hkv, d], m >= n. Query i sees the keys 0 .. m - n + i."""
    (n, num_heads, head_dim), (m, num_kv_heads, _) = q.shape, k.shape
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    keys, values = k.permute(1, 2, 0), v.transpose(0, 1)  # [Hkv, d, m], [Hkv, m, d]
    rows = max(1, BLOCK_SCORES // (num_heads * m))
    for begin in range(0, n, rows):
        end = min(begin + rows, n)
        block = q[begin:end].to(dtype).view(end - begin, num_kv_heads, -1, head_dim)
        block = block.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)  # [Hkv, group * rows, d]
        scores = (block @ keys) * head_dim**-0.5
        position = torch.arange(m - n + begin, m - n + end, device=q.device)
        hidden = torch.arange(m, device=q.device)[None, :] > position[:, None]  # [rows, m]
        scores = scores.view(num_kv_heads, -1, end - begin, m).masked_fill_(hidden, -torch.inf)
        part = scores.softmax(-1).view(num_kv_heads, -1, m) @ values
        out[begin:end] = part.view(num_heads, end - begin, head_dim).transpose(0, 1)
    return out


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a row of `out`, relative to the row's length; infinite for NaN. `out` may be any view of
    expected's shape."""
    out = out.reshape(expected.shape)
    worst = 0.0
    for got, want in zip(out.split(4096), expected.split(4096)):  # in pieces: a converted copy of all may not fit
        error = (got.to(want.dtype) - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)
        worst = max(worst, error.nan_to_num(nan=torch.inf).max().item())
    return worst


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    """float32 products in float32, whatever the caller allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

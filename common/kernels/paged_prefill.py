"""Prefill attention over KV pages: causal, grouped queries, packed sequences of unequal length, prior context in pages.

The tokens of all prompt pieces are packed; a program takes a tile of one sequence's queries and one head. It walks the
prior context through the page table, then the new tokens' own k and v where they still lie side by side in the output
of the qkv product (no page look-ups, and the pages just written need not be read back). The mask is aligned
bottom-right: query i of a piece sees the whole prior context and the new tokens 0..i.

A tile finds its sequence on the device, by bisection over q_indptr, so nothing waits for the host.
"""

from __future__ import annotations

import math

import torch

from common.kernels.runtime import (
    capability,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    runs_triton,
    tl,
)


def reference(q, k, v, pages, page_table, q_indptr, kv_lens, scale=None):
    """The plain version of `paged_prefill`, sequence by sequence, in float32."""
    num_kv_heads, head_dim = pages.shape[3:]
    group = q.shape[1] // num_kv_heads
    out = torch.zeros_like(q)
    bounds = q_indptr.tolist()
    for s, (begin, end, kv_len) in enumerate(zip(bounds, bounds[1:], kv_lens.tolist())):
        context = kv_len - (end - begin)
        used = page_table[s, : -(-context // pages.shape[2])].long()
        prior = pages[used].transpose(0, 1).reshape(2, -1, num_kv_heads, head_dim)[:, :context]
        keys = torch.cat((prior[0], k[begin:end])).float().repeat_interleave(group, dim=1)
        values = torch.cat((prior[1], v[begin:end])).float().repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,uhd->htu", q[begin:end].float(), keys) * (scale or head_dim**-0.5)
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(context)
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("htu,uhd->thd", p, values).to(q.dtype)
    return out


@jit
def _attend(
    acc, l, m, q, k_ptr, v_ptr, table_row, stride_page, stride_token, begin, end, first_query, scale_log2, d,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the keys begin..end to the running softmax of one query tile; query i sees keys up to first_query + i."""
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_N)
        valid = token < end
        if PAGED:
            page = tl.load(table_row + token // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
            row = page * stride_page + (token % PAGE_SIZE) * stride_token
        else:
            row = token.to(tl.int64) * stride_token
        offset = row[:, None] + d[None, :]
        if MASKED:
            mask = valid[:, None] & (d < HEAD_DIM)[None, :]
        else:
            mask = (d < HEAD_DIM)[None, :] & (token >= 0)[:, None]
        k = tl.load(k_ptr + offset, mask=mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if MASKED:
            seen = valid[None, :] & (token[None, :] <= first_query + tl.arange(0, BLOCK_M)[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1) * scale_log2)
        # Rows that have seen nothing yet (tile rows past the end of the sequence) keep m = -inf.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p = tl.exp2(scores * scale_log2 - shift[:, None])
        rescale = tl.exp2(m - shift)
        l = l * rescale + tl.sum(p, axis=1)
        acc = acc * rescale[:, None]
        v = tl.load(v_ptr + offset, mask=mask, other=0.0)  # zeroed where masked: 0 * NaN is NaN
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m = m_new
    return acc, l, m


@jit(varies=["num_seqs"], unaligned=["table_ptr", "indptr_ptr", "lens_ptr"])
def _paged_prefill_kernel(
    q_ptr, k_ptr, v_ptr, pages_ptr, table_ptr, indptr_ptr, lens_ptr, out_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_page, stride_kv, stride_token, stride_head, stride_table,
    stride_ot, num_seqs, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CONTEXT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    kv_head = head // GROUP
    # The last tiles of a sequence see the most keys: they go first, so that the device runs dry on short ones.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    # Sequence s owns the tiles from q_indptr[s] // BLOCK_M + s on: at least as many as it needs.
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(indptr_ptr + middle) // BLOCK_M + middle <= tile:
            low = middle
        else:
            high = middle
    first = tl.load(indptr_ptr + low)
    length = tl.load(indptr_ptr + low + 1) - first
    row0 = (tile - (first // BLOCK_M + low)) * BLOCK_M
    if row0 >= length:
        return
    context = tl.load(lens_ptr + low) - length
    first64 = first.to(tl.int64)
    i = row0 + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask_q = (i < length)[:, None] & (d < HEAD_DIM)[None, :]
    t = (first64 + i)[:, None]
    q = tl.load(q_ptr + t * stride_qt + head * stride_qh + d[None, :], mask=mask_q, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if CONTEXT:
        page_k = pages_ptr + kv_head * stride_head
        table_row = table_ptr + low.to(tl.int64) * stride_table
        whole = context // BLOCK_N * BLOCK_N
        acc, l, m = _attend(
            acc, l, m, q, page_k, page_k + stride_kv, table_row, stride_page, stride_token, 0, whole, 0, scale_log2,
            d, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, True, False, STAGES,
        )  # fmt: skip
        acc, l, m = _attend(
            acc, l, m, q, page_k, page_k + stride_kv, table_row, stride_page, stride_token, whole, context, context,
            scale_log2, d, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, True, True, 1,
        )  # fmt: skip
    new_k = k_ptr + first64 * stride_kt + kv_head * stride_kh
    new_v = v_ptr + first64 * stride_kt + kv_head * stride_kh
    whole = row0 // BLOCK_N * BLOCK_N  # blocks that every query of the tile sees
    acc, l, m = _attend(
        acc, l, m, q, new_k, new_v, table_ptr, 0, stride_kt, 0, whole, 0, scale_log2,
        d, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, False, False, STAGES,
    )  # fmt: skip
    acc, l, m = _attend(
        acc, l, m, q, new_k, new_v, table_ptr, 0, stride_kt, whole, tl.minimum(row0 + BLOCK_M, length), row0,
        scale_log2, d, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, False, True, 1,
    )  # fmt: skip
    l = tl.where(l > 0, l, 1.0)
    out = out_ptr + t * stride_ot + head * HEAD_DIM + d[None, :]
    tl.store(out, (acc / l[:, None]).to(out_ptr.dtype.element_ty), mask=mask_q)


def _tiles(head_dim, element_size, average_length, device):
    """(BLOCK_M, BLOCK_N, num_warps, stages): measured on an H200 for 16-bit heads of up to 128; small ones elsewhere
    (float32, wide heads and devices with little shared memory)."""
    if head_dim > 128 and capability(device) < (8, 0):  # 64 KiB of shared memory
        return 32, 16, 4, 1
    if element_size > 2:
        return 32, 32, 4, 1
    if head_dim > 128 or capability(device) not in {(8, 0), (9, 0)}:
        return 64, 32, 4, 2
    return (128, 64, 8, 3) if average_length > 8192 else (64, 64, 4, 3)


def paged_prefill_triton(q, k, v, pages, page_table, q_indptr, kv_lens, scale=None, *, context=True, tiles=None):
    """The Triton version of `paged_prefill`; `tiles` overrides (BLOCK_M, BLOCK_N, num_warps, stages)."""
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = q_indptr.shape[0] - 1
    page_size, num_kv_heads = pages.shape[2:4]
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1 and k.stride() == v.stride()
    block_m, block_n, num_warps, stages = tiles or _tiles(
        head_dim, q.element_size(), num_tokens // max(1, num_seqs), q.device
    )
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    _paged_prefill_kernel[(num_heads, num_tokens // block_m + num_seqs)](
        q, k, v, pages, page_table, q_indptr, kv_lens, out, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        *pages.stride()[:4], page_table.stride(0), out.stride(0), num_seqs,
        (scale or head_dim**-0.5) * math.log2(math.e),
        GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, PAGE_SIZE=page_size, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_D=max(16, next_power_of_2(head_dim)), CONTEXT=context, STAGES=stages,
        **launch_options(q.device, num_warps=num_warps),
    )  # fmt: skip
    return out


def paged_prefill(q, k, v, pages, page_table, q_indptr, kv_lens, scale=None, *, context=True):
    """Causal attention of packed prompt pieces over their prior context in pages and over themselves.

    q [T, Hq, d]; k, v [T, Hkv, d], the new tokens', rotated, with equal strides; pages [P, 2, page_size, Hkv, d];
    page_table int32 [S, max_pages], a line for each piece; q_indptr int32 [S + 1]; kv_lens int32 [S], each piece's
    prior context and new tokens together. context: False where no piece has any prior context, which saves its code.
    Returns [T, Hq, d]. Nothing waits for the host.
    """
    if runs_triton(q):
        return paged_prefill_triton(q, k, v, pages, page_table, q_indptr, kv_lens, scale, context=context)
    return reference(q, k, v, pages, page_table, q_indptr, kv_lens, scale)

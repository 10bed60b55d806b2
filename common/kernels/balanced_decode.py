"""Decode attention over KV pages where the batch alone fills the device: all programs get equally much to read.

A program a sequence and KV head, as in paged_decode.py, leaves multiprocessors idle at the end of the last wave: 160
rows are 1,280 programs where 1,056 run at once, and of unequal lengths the longest ends last. Here as many programs are
started as run at once, and the blocks of BLOCK_KV tokens of all sequences, one after another, are divided evenly among
them (the idea is stream-K's, arXiv 2301.03598), one program for each KV head of a share. A program reads the lengths,
finds its share, and attends to one piece of a sequence's context after another. The heads of a share walk through it
side by side: a token's K of all heads are neighbours in memory, and memory gives neighbours faster. Where a share's
border cuts a sequence in two, both programs leave their part and its log-sum-exp, and a second small kernel merges
them. Lengths are read on the device, so one CUDA graph serves any.
"""

from __future__ import annotations

import math

import torch

from common.kernels.decode_block import append_newest, attend_block, load_block, rotated, rotation
from common.kernels.runtime import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    num_sms,
    tl,
)

BLOCK_ROWS = 256  # lengths that a program looks at at once
MAX_ROWS = 1024


@jit
def _num_blocks(length, BLOCK_KV: tl.constexpr):
    """Blocks of a sequence's context; an empty one has one, so that somebody writes its zeros."""
    return tl.maximum(tl.cdiv(length, BLOCK_KV), 1)


@jit
def _blocks_before(lens_ptr, batch, BLOCK_ROWS: tl.constexpr, BLOCK_KV: tl.constexpr):
    """Of every row: its number, how many blocks it has, and how many all rows up to it have together."""
    row = tl.arange(0, BLOCK_ROWS)
    lengths = tl.load(lens_ptr + row, mask=row < batch, other=0)
    blocks = tl.where(row < batch, _num_blocks(lengths, BLOCK_KV), 0)
    return row, blocks, tl.cumsum(blocks, 0)


@jit(varies=["batch"], unaligned=["lens_ptr"])
def _balanced_decode_kernel(
    q_ptr, k_new_ptr, v_new_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr, lens_ptr, out_ptr, partial_ptr, lse_ptr,
    stride_qb, stride_qh, stride_nb, stride_nh, stride_page, stride_kv, stride_token, stride_head, stride_table,
    stride_ob, stride_cos, scale_log2, batch,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_ROWS: tl.constexpr, STAGES: tl.constexpr, ROPE: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    kv_head = tl.program_id(0)
    share = tl.program_id(1)
    row, blocks, ends = _blocks_before(lens_ptr, batch, BLOCK_ROWS, BLOCK_KV)
    total = tl.sum(blocks)
    size = tl.cdiv(total, tl.num_programs(1))
    first = share * size
    last = tl.minimum(first + size, total)
    b = tl.sum((ends <= first).to(tl.int32))  # the row in which the share begins, and that row's first block
    row_first = tl.sum(tl.where(row < b, blocks, 0))
    head_base = pages_ptr + kv_head * stride_head
    if EARLY and PDL:
        gdc_wait()

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    mask_d = (d < HEAD_DIM)[None, :]
    mask_q = (g < GROUP)[:, None] & mask_d
    at = first
    while at < last:
        length = tl.load(lens_ptr + b)
        count = _num_blocks(length, BLOCK_KV)
        block = at - row_first
        taken = tl.minimum(count - block, last - at)
        has_newest = block + taken == count
        newest = tl.maximum(length - 1, 0)
        end = tl.minimum((block + taken) * BLOCK_KV, newest if ROPE else length)
        row64 = b.to(tl.int64)
        table_row = table_ptr + row64 * stride_table

        q_row = row64 * stride_qb + (kv_head * GROUP + g)[:, None] * stride_qh
        m = tl.full([BLOCK_G], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        if ROPE:
            cos, sin = rotation(cos_ptr, sin_ptr, newest, stride_cos, d, HEAD_DIM)
            q = rotated(q_ptr, q_row, d[None, :], cos, sin, mask_q, HEAD_DIM // 2)
            if has_newest & (length > 0):
                page_new = tl.load(table_row + newest // PAGE_SIZE).to(tl.int64)
                row_new = row64 * stride_nb + kv_head * stride_nh
                slot = head_base + page_new * stride_page + (newest % PAGE_SIZE) * stride_token
                m, l, acc = append_newest(
                    q, l, acc, k_new_ptr, v_new_ptr, row_new, slot, stride_kv, d, cos, sin, mask_d, scale_log2, HEAD_DIM
                )
        else:
            q = tl.load(q_ptr + q_row + d[None, :], mask=mask_q, other=0.0)

        for start in tl.range(block * BLOCK_KV, end, BLOCK_KV, num_stages=STAGES):
            k, v, valid = load_block(
                head_base, table_row, start, end, d, mask_d, stride_page, stride_kv, stride_token, BLOCK_KV, PAGE_SIZE
            )
            m, l, acc = attend_block(q, k, v, valid, m, l, acc, scale_log2)

        l = tl.where(l > 0, l, 1.0)  # length 0: zeros
        acc = acc / l[:, None]
        if taken == count:
            out = out_ptr + row64 * stride_ob + (kv_head * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
            tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask_q)
        else:  # a program leaves at most two parts: of the sequence that its share begins in, and of the one it ends in
            part = ((2 * share + (at > first).to(tl.int32)) * tl.num_programs(0) + kv_head) * GROUP + g
            tl.store(partial_ptr + part[:, None] * HEAD_DIM + d[None, :], acc, mask=mask_q)
            tl.store(lse_ptr + part, m + tl.log2(l), mask=g < GROUP)
        at += taken
        row_first += tl.where(has_newest, count, 0)
        b += has_newest.to(tl.int32)


@jit(varies=["batch", "shares"], unaligned=["lens_ptr"])
def _merge_shares_kernel(
    partial_ptr, lse_ptr, lens_ptr, out_ptr, stride_ob, batch, shares,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a row's query heads of one KV head. A row that lies in one share has nothing to merge."""
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    kv_head = tl.program_id(0)
    b = tl.program_id(1)
    row, blocks, _ = _blocks_before(lens_ptr, batch, BLOCK_ROWS, BLOCK_KV)
    size = tl.cdiv(tl.sum(blocks), shares)
    first = tl.sum(tl.where(row < b, blocks, 0))
    first_share, last_share = first // size, (first + _num_blocks(tl.load(lens_ptr + b), BLOCK_KV) - 1) // size
    if EARLY and PDL:
        gdc_wait()  # also where nothing is merged: the next kernel waits for this one alone, and `out` must be there
    if first_share < last_share:
        g = tl.arange(0, BLOCK_G)
        d = tl.arange(0, BLOCK_D)
        mask = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        m = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for share in range(first_share, last_share + 1):
            part = ((2 * share + (share * size < first).to(tl.int32)) * tl.num_programs(0) + kv_head) * GROUP + g
            lse = tl.load(lse_ptr + part, mask=g < GROUP, other=0.0)
            y = tl.load(partial_ptr + part[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
            m_new = tl.maximum(m, lse)
            weight, rescale = tl.exp2(lse - m_new), tl.exp2(m - m_new)
            acc = acc * rescale[:, None] + y * weight[:, None]
            total = total * rescale + weight
            m = m_new
        out = out_ptr + b.to(tl.int64) * stride_ob + (kv_head * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
        tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def _plan(row_bytes):
    """(programs a multiprocessor, BLOCK_KV, num_warps, stages), measured on an H200 for rows of 256 bytes
    (docs/performance.md): as many one-warp programs as the registers of a multiprocessor have room for."""
    return 8, 32 if row_bytes <= 128 else 16, 1, 4


def balanced_decode_triton(q, new, pages, page_table, kv_lens, tables, scale, early, plan=None):
    """q [B, Hq, d], rotated where `new` is None; new: the newest tokens' k and v [B, Hkv, d] of the qkv product, to be
    rotated with `tables` (cos, sin), appended and attended to; the rest as for `paged_decode.paged_decode`.

    B is at most MAX_ROWS. `plan` overrides (programs a multiprocessor, BLOCK_KV, num_warps, stages).
    """
    batch, num_heads, head_dim = q.shape
    page_size, num_kv_heads = pages.shape[2:4]
    k_new, v_new = new if new else (q, q)
    cos, sin = tables if tables else (q, q)
    per_sm, block_kv, num_warps, stages = plan or _plan(head_dim * q.element_size())
    shares = max(1, per_sm * num_sms(q.device) // num_kv_heads)
    group, block_d = num_heads // num_kv_heads, max(16, next_power_of_2(head_dim))
    block_rows = max(BLOCK_ROWS, next_power_of_2(batch))
    out = torch.empty(batch, num_heads, head_dim, dtype=q.dtype, device=q.device)
    partial = torch.empty(shares * 2 * num_heads * head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(shares * 2 * num_heads, dtype=torch.float32, device=q.device)
    _balanced_decode_kernel[(num_kv_heads, shares)](
        q, k_new, v_new, cos, sin, pages, page_table, kv_lens, out, partial, lse,
        q.stride(0), q.stride(1), k_new.stride(0), k_new.stride(1), *pages.stride()[:4], page_table.stride(0),
        out.stride(0), cos.stride(0), (scale or head_dim**-0.5) * math.log2(math.e), batch,
        GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size, BLOCK_G=max(16, next_power_of_2(group)), BLOCK_D=block_d,
        BLOCK_KV=block_kv, BLOCK_ROWS=block_rows, STAGES=stages, ROPE=bool(new), EARLY=early,
        **launch_options(q.device, num_warps=num_warps),
    )  # fmt: skip
    _merge_shares_kernel[(num_kv_heads, batch)](
        partial, lse, kv_lens, out, out.stride(0), batch, shares,
        GROUP=group, HEAD_DIM=head_dim, BLOCK_G=next_power_of_2(group), BLOCK_D=block_d, BLOCK_KV=block_kv,
        BLOCK_ROWS=block_rows, EARLY=early, **launch_options(q.device, num_warps=1),
    )  # fmt: skip
    return out

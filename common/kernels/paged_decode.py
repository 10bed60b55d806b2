"""Decode attention over KV pages: one query token a sequence, split over the context where the batch is small.

A program takes one sequence, one KV head with the query heads that share it, and a part of the context, as in
flash-decoding. The grid is fixed by the batch and the number of parts, and lengths are read on the device, so one CUDA
graph serves any lengths. A second small kernel merges the parts: one program a head, which was faster than letting the
last program to arrive merge all heads of its group. `rope_append_decode` starts from the raw output of the qkv product:
it rotates q, and the program that owns the newest token rotates k, appends k and v to the page, and attends to them
first.
"""

from __future__ import annotations

import math

import torch

from common.kernels.balanced_decode import MAX_ROWS, balanced_decode_triton
from common.kernels.decode_block import append_newest, attend_block, load_block, rotated, rotation
from common.kernels.rope_append import reference as rope_append_reference
from common.kernels.runtime import (
    capability,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    num_sms,
    runs_triton,
    tl,
)

BALANCED_FROM = 512  # sequences times KV heads from which on balanced_decode.py is faster, on an H200


def reference(q, pages, page_table, kv_lens, scale=None, out_dtype=None):
    """The plain version: q [B, Hq, d]; pages [P, 2, page_size, Hkv, d]; page_table int [B, max_pages]; kv_lens int [B]
    (the newest token included). Returns [B, Hq, d] in out_dtype, q's unless given, computed in float32; a sequence of
    length 0 gives zeros."""
    num_kv_heads, head_dim = pages.shape[3:]
    group = q.shape[1] // num_kv_heads
    out = torch.zeros_like(q, dtype=out_dtype)
    for b, length in enumerate(kv_lens.tolist()):
        if length == 0:
            continue
        used = page_table[b, : -(-length // pages.shape[2])].long()
        k, v = pages[used].transpose(0, 1).reshape(2, -1, num_kv_heads, head_dim)[:, :length].float()
        grouped = q[b].float().view(num_kv_heads, group, head_dim)
        scores = torch.einsum("hgd,thd->hgt", grouped, k) * (scale or head_dim**-0.5)
        out[b] = torch.einsum("hgt,thd->hgd", scores.softmax(-1), v).reshape(q.shape[1:])
    return out


def rope_append_decode_reference(qkv, pages, page_table, kv_lens, cos, sin, num_heads, scale=None, out_dtype=None):
    """The plain version of `rope_append_decode`."""
    rows = torch.arange(qkv.shape[0], device=qkv.device)
    q, _, _ = rope_append_reference(qkv, pages, page_table, rows, kv_lens - 1, cos, sin, num_heads)
    return reference(q, pages, page_table, kv_lens, scale, out_dtype)


@jit
def _part(length, split, splits, BLOCK_KV: tl.constexpr):
    """(first token, end, number of parts that hold tokens): a part is a whole number of blocks, and the last one that
    holds tokens has the newest. Length 0 has one part, empty."""
    size = tl.maximum(tl.cdiv(tl.cdiv(length, BLOCK_KV), splits), 1) * BLOCK_KV
    return split * size, tl.minimum(split * size + size, length), tl.maximum(tl.cdiv(length, size), 1)


@jit(varies=["splits"], unaligned=["lens_ptr"])
def _paged_decode_kernel(
    q_ptr, k_new_ptr, v_new_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr, lens_ptr, out_ptr, partial_ptr, lse_ptr,
    stride_qb, stride_qh, stride_nb, stride_nh, stride_page, stride_kv, stride_token, stride_head, stride_table,
    stride_ob, stride_cos, scale_log2, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_KV: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, ROPE: tl.constexpr, EARLY: tl.constexpr,
    PEEL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP
    b = tl.program_id(2).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    length = tl.load(lens_ptr + b)
    begin, end, active = _part(length, split, splits, BLOCK_KV)
    if split >= active:
        return
    newest = tl.maximum(length - 1, 0)
    if ROPE:
        end = tl.minimum(end, newest)
    head_base = pages_ptr + kv_head * stride_head
    table_row = table_ptr + b * stride_table
    mask_d = (d < HEAD_DIM)[None, :]

    if PEEL:  # the first block is asked for before the wait: on a short context it is all there is
        k0, v0, valid0 = load_block(
            head_base, table_row, begin, end, d, mask_d, stride_page, stride_kv, stride_token, BLOCK_KV, PAGE_SIZE
        )
        begin += BLOCK_KV

    mask_q = (g < GROUP)[:, None] & mask_d
    q_row = b * stride_qb + (kv_head * GROUP + g)[:, None] * stride_qh
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if ROPE:
        cos, sin = rotation(cos_ptr, sin_ptr, newest, stride_cos, d, HEAD_DIM)
        page_new = tl.load(table_row + newest // PAGE_SIZE).to(tl.int64)
        if EARLY and PDL:
            gdc_wait()
        q = rotated(q_ptr, q_row, d[None, :], cos, sin, mask_q, HEAD_DIM // 2)
        if (split == active - 1) & (length > 0):
            row = b * stride_nb + kv_head * stride_nh
            slot = head_base + page_new * stride_page + (newest % PAGE_SIZE) * stride_token
            m, l, acc = append_newest(
                q, l, acc, k_new_ptr, v_new_ptr, row, slot, stride_kv, d, cos, sin, mask_d, scale_log2, HEAD_DIM
            )
    else:
        if EARLY and PDL:
            gdc_wait()
        q = tl.load(q_ptr + q_row + d[None, :], mask=mask_q, other=0.0)

    if PEEL:
        m, l, acc = attend_block(q, k0, v0, valid0, m, l, acc, scale_log2)
    for start in tl.range(begin, end, BLOCK_KV, num_stages=STAGES):
        k, v, valid = load_block(
            head_base, table_row, start, end, d, mask_d, stride_page, stride_kv, stride_token, BLOCK_KV, PAGE_SIZE
        )
        m, l, acc = attend_block(q, k, v, valid, m, l, acc, scale_log2)

    head = kv_head * GROUP + g
    l = tl.where(l > 0, l, 1.0)  # length 0: zeros
    acc = acc / l[:, None]
    if SPLIT:
        at = (b * splits + split) * num_heads + head
        tl.store(partial_ptr + at[:, None] * HEAD_DIM + d[None, :], acc, mask=mask_q)
        tl.store(lse_ptr + at, m + tl.log2(l), mask=g < GROUP)
    else:
        out = out_ptr + b * stride_ob + head[:, None] * HEAD_DIM + d[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask_q)


@jit(varies=["splits"], unaligned=["lens_ptr"])
def _merge_kernel(
    partial_ptr, lse_ptr, lens_ptr, out_ptr, stride_ob, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_S: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: one head, its parts weighted by their log-sum-exp. All are asked for at once: what a merge costs is
    not bytes but round trips."""
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    head = tl.program_id(0)
    num_heads = tl.num_programs(0)
    b = tl.program_id(1).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    _, _, active = _part(tl.load(lens_ptr + b), 0, splits, BLOCK_KV)
    at = (b * splits + s) * num_heads + head
    mask = (s < active)[:, None] & (d < HEAD_DIM)[None, :]
    if EARLY and PDL:
        gdc_wait()
    lse = tl.load(lse_ptr + at, mask=s < active, other=float("-inf"))
    part = tl.load(partial_ptr + at[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    m = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(weight, axis=0)
    y = tl.sum(part * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + b * stride_ob + head * HEAD_DIM + d, y.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def _balances(batch, num_kv_heads, device):
    """Whether the batch fills the device without being split: then what counts is that all programs end together."""
    return capability(device) >= (9, 0) and batch <= MAX_ROWS and batch * num_kv_heads >= BALANCED_FROM


def _plan(batch, num_kv_heads, max_len, row_bytes, device):
    """(splits, BLOCK_KV, num_warps, stages, peel), measured on an H200 (docs/performance.md) for rows of 256 bytes.

    Parts beyond a short context cost nothing (their programs end at once), so a small batch always gets as many as a
    long one needs. Wider rows take fewer tokens at a time, and devices with less shared memory a small choice.
    peel: whether a program that may start early has its first block in registers before it waits. Of 128 tokens that
    takes 188 to 213 registers a thread, so that two programs fit on a multiprocessor and not three: only where no more
    are wanted.
    """
    programs = batch * num_kv_heads
    splits, num_warps, stages = round(4 * num_sms(device) / programs), 2, 4
    block_kv = 64 if max_len > 8192 else 16 if programs <= 16 else 32
    if capability(device) < (8, 0):
        stages = 2
    elif capability(device) >= (9, 0):
        if programs <= 8 and max_len <= 8192:
            # One sequence: parts of 64 tokens, up to 4,096 of context one block each, loaded before the wait.
            splits, block_kv, num_warps, stages = 64, 64, 4, 2
        elif 128 <= programs < 512:
            splits, block_kv, num_warps, stages = round(3 * num_sms(device) / programs), 128, 4, 3
            splits = splits if programs < 256 else 1
        elif 512 <= programs < 1024:
            splits, block_kv, num_warps, stages = 1, 64, 4, 3
        elif programs >= 1024:
            splits, block_kv, num_warps = 1, 32, 1
    block_kv = max(16, min(block_kv, block_kv * 256 // next_power_of_2(row_bytes)))
    splits = max(1, min(splits, 64))
    peel = programs < 1024 and (block_kv < 128 or programs * splits <= 2 * num_sms(device))
    return splits, block_kv, num_warps, stages, peel


def _launch(q, new, pages, page_table, kv_lens, tables, scale, early, plan, balanced):
    batch, num_heads, head_dim = q.shape
    _, _, page_size, num_kv_heads, _ = pages.shape
    if balanced is None:
        balanced = plan is None and _balances(batch, num_kv_heads, q.device)
    if balanced:
        return balanced_decode_triton(q, new, pages, page_table, kv_lens, tables, scale, early)
    k_new, v_new = new if new else (q, q)
    cos, sin = tables if tables else (q, q)
    splits, block_kv, num_warps, stages, peel = plan or _plan(
        batch, num_kv_heads, page_table.shape[1] * page_size, head_dim * q.element_size(), q.device
    )
    out = torch.empty(batch, num_heads, head_dim, dtype=q.dtype, device=q.device)
    num_parts = batch * splits * num_heads if splits > 1 else 0
    partial = torch.empty(num_parts * head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_parts, dtype=torch.float32, device=q.device)
    group, block_d = num_heads // num_kv_heads, max(16, next_power_of_2(head_dim))
    _paged_decode_kernel[(splits, num_kv_heads, batch)](
        q, k_new, v_new, cos, sin, pages, page_table, kv_lens, out, partial, lse,
        q.stride(0), q.stride(1), k_new.stride(0), k_new.stride(1), *pages.stride()[:4], page_table.stride(0),
        out.stride(0), cos.stride(0), (scale or head_dim**-0.5) * math.log2(math.e), splits,
        GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size, BLOCK_G=max(16, next_power_of_2(group)), BLOCK_D=block_d,
        BLOCK_KV=block_kv, STAGES=stages, SPLIT=splits > 1, ROPE=bool(new), EARLY=early,
        PEEL=early and peel,
        **launch_options(q.device, num_warps=num_warps),
    )  # fmt: skip
    if splits > 1:
        block_s = next_power_of_2(splits)
        merge_warps = max(1, min(4, block_s * block_d // 1024))
        _merge_kernel[(num_heads, batch)](
            partial, lse, kv_lens, out, out.stride(0), splits, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_KV=block_kv,
            BLOCK_S=block_s, EARLY=early, **launch_options(q.device, num_warps=merge_warps),
        )  # fmt: skip
    return out


def paged_decode_triton(q, pages, page_table, kv_lens, scale=None, *, early=False, plan=None, balanced=None):
    """The Triton version of `paged_decode`. plan: overrides (splits, BLOCK_KV, num_warps, stages, peel); balanced: the
    choice between a program a sequence and KV head (False) and shares of equal size (True)."""
    return _launch(q, None, pages, page_table, kv_lens, None, scale, early, plan, balanced)


def rope_append_decode_triton(
    qkv, pages, page_table, kv_lens, cos, sin, num_heads, scale=None, *, early=False, plan=None, balanced=None
):
    """The Triton version of `rope_append_decode`."""
    num_kv_heads, head_dim = pages.shape[3:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return _launch(q, (k, v), pages, page_table, kv_lens, (cos, sin), scale, early, plan, balanced)


def paged_decode(q, pages, page_table, kv_lens, scale=None, *, early=False):
    """One query token a sequence over its pages; arguments and result as in `reference`, page_table and kv_lens int32.

    early: as for `rope_append_decode`, of all tokens. Nothing waits for the host, and the grid does not depend on the
    lengths: one CUDA graph serves any of them.
    """
    if runs_triton(q):
        return paged_decode_triton(q, pages, page_table, kv_lens, scale, early=early)
    return reference(q, pages, page_table, kv_lens, scale)


def rope_append_decode(qkv, pages, page_table, kv_lens, cos, sin, num_heads, scale=None, *, early=False):
    """A decode step's attention from the raw qkv product: rotate q and k, append k and v to their page, attend.

    qkv [B, (Hq + 2 Hkv) d]; pages [P, 2, page_size, Hkv, d]; page_table int32 [B, max_pages]; kv_lens int32 [B], the
    newest token included, so that its position is kv_lens - 1; cos, sin float32 [context, d / 2]. Returns [B, Hq, d].
    Rows of padding (a CUDA graph's bucket) need a length of at least 1 and a page of their own to write to.

    early: page_table, kv_lens and the K and V of earlier tokens were complete before the kernel just before this one
    began, and may be read before it ends: so it is in a decode step, where the qkv product comes between.
    """
    if runs_triton(qkv):
        return rope_append_decode_triton(qkv, pages, page_table, kv_lens, cos, sin, num_heads, scale, early=early)
    return rope_append_decode_reference(qkv, pages, page_table, kv_lens, cos, sin, num_heads, scale)

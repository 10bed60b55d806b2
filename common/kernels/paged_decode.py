"""Decode attention over KV pages: one query token a sequence, split over the context where the batch is small.

A program takes one sequence, one KV head with the query heads that share it, and a part of the context, as in
flash-decoding. The grid is fixed by the batch and the number of parts, and lengths are read on the device, so one CUDA
graph serves any lengths. The parts of one head are merged by whichever program finishes last: it counts arrivals with
an atomic, which saves a second kernel. `rope_append_decode` starts from the raw output of the qkv product: it rotates
q, and the program that owns the newest token rotates k, appends k and v to the page, and attends to them first.
"""

from __future__ import annotations

import math

import torch

from common.kernels.rope_append import reference as rope_append_reference
from common.kernels.runtime import (
    arrival_counters,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    num_sms,
    runs_triton,
    tl,
)


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
def _rotated(ptr, row, d, cos, sin, mask, HALF: tl.constexpr):
    """Rows of one head, rotated half-split in float32 and rounded to their own dtype: row [N, 1], d [1, D]."""
    x = tl.load(ptr + row + d, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(ptr + row + tl.where(d < HALF, d + HALF, d - HALF), mask=mask, other=0.0).to(tl.float32)
    return (x * cos + tl.where(d < HALF, -partner, partner) * sin).to(ptr.dtype.element_ty)


@jit
def _merge(
    partial_ptr, lse_ptr, out_ptr, active, head, stride_part, num_heads,
    GROUP: tl.constexpr, GROUP_P2: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Weights the `active` parts of GROUP heads by their log-sum-exp (base 2) and stores the sum at out_ptr [GROUP, d].

    PARTS parts are asked for at once: what a merge costs is not bytes but the round trips to L2, one after another.
    """
    g = tl.arange(0, GROUP_P2)
    d = tl.arange(0, BLOCK_D)
    m = tl.full([GROUP_P2], float("-inf"), tl.float32)
    l = tl.zeros([GROUP_P2], tl.float32)
    acc = tl.zeros([GROUP_P2, BLOCK_D], tl.float32)
    for first in range(0, active, PARTS):
        s = first + tl.arange(0, PARTS)
        mask = (s < active)[:, None] & (g < GROUP)[None, :]
        lse = tl.load(
            lse_ptr + s[:, None] * num_heads + (head + g)[None, :], mask=mask, other=float("-inf"), cache_modifier=".cg"
        )
        part = tl.load(
            partial_ptr + s[:, None, None] * stride_part + (head + g)[None, :, None] * HEAD_DIM + d[None, None, :],
            mask=mask[:, :, None] & (d < HEAD_DIM)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(lse, axis=0))
        shift = tl.where(g < GROUP, m_new, 0.0)  # heads of the padding have no parts
        weight = tl.exp2(lse - shift[None, :])
        old = tl.exp2(m - shift)
        acc = acc * old[:, None] + tl.sum(part * weight[:, :, None], axis=0)
        l = l * old + tl.sum(weight, axis=0)
        m = m_new
    l = tl.where(l > 0, l, 1.0)
    mask_out = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    out = out_ptr + g[:, None] * HEAD_DIM + d[None, :]
    tl.store(out, (acc / l[:, None]).to(out_ptr.dtype.element_ty), mask=mask_out)


@jit
def _paged_decode_kernel(
    q_ptr, k_new_ptr, v_new_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr, lens_ptr, out_ptr,
    partial_ptr, lse_ptr, arrivals_ptr,
    stride_qb, stride_qh, stride_nb, stride_nh, stride_page, stride_kv, stride_token, stride_head, stride_table,
    stride_ob, stride_cos, scale_log2, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_KV: tl.constexpr, STAGES: tl.constexpr, GROUP_P2: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr,
    ROPE: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    length = tl.load(lens_ptr + b)
    # A part is a whole number of blocks; the last of the `active` parts holds the newest token.
    part = tl.maximum(tl.cdiv(tl.cdiv(length, BLOCK_KV), splits), 1) * BLOCK_KV
    active = tl.maximum(tl.cdiv(length, part), 1)
    if split >= active:
        return
    begin = split * part
    end = tl.minimum(begin + part, length)
    head_base = pages_ptr + kv_head * stride_head
    table_row = table_ptr + b * stride_table
    mask_q = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    q_row = b * stride_qb + (kv_head * GROUP + g)[:, None] * stride_qh
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if ROPE:
        HALF: tl.constexpr = HEAD_DIM // 2
        newest = tl.maximum(length - 1, 0)
        end = tl.minimum(end, newest)
        angle = newest.to(tl.int64) * stride_cos + tl.where(d < HALF, d, d - HALF)
        cos = tl.load(cos_ptr + angle, mask=d < HEAD_DIM, other=0.0)[None, :]
        sin = tl.load(sin_ptr + angle, mask=d < HEAD_DIM, other=0.0)[None, :]
        page_new = tl.load(table_row + newest // PAGE_SIZE).to(tl.int64)
        if EARLY and PDL:
            gdc_wait()
        q = _rotated(q_ptr, q_row, d[None, :], cos, sin, mask_q, HALF)
        if (split == active - 1) & (length > 0):
            # The newest token starts the running softmax from registers: nothing waits for its way through memory.
            one = (tl.arange(0, 1) * 0)[:, None] + (b * stride_nb + kv_head * stride_nh)
            mask_d = (d < HEAD_DIM)[None, :]
            k_new = _rotated(k_new_ptr, one, d[None, :], cos, sin, mask_d, HALF)
            v_new = tl.load(v_new_ptr + one + d[None, :], mask=mask_d, other=0.0)
            slot = head_base + page_new * stride_page + (newest % PAGE_SIZE) * stride_token + d[None, :]
            tl.store(slot, k_new, mask=mask_d)
            tl.store(slot + stride_kv, v_new, mask=mask_d)
            m = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scale_log2
            l += 1.0
            acc += v_new.to(tl.float32)
    else:
        if EARLY and PDL:
            gdc_wait()
        q = tl.load(q_ptr + q_row + d[None, :], mask=mask_q, other=0.0)

    for start in tl.range(begin, end, BLOCK_KV, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_KV)
        valid = token < end
        page = tl.load(table_row + token // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
        offset = (page * stride_page + (token % PAGE_SIZE) * stride_token)[:, None] + d[None, :]
        mask = valid[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(head_base + offset, mask=mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale_log2
        scores = tl.where(valid[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        p = tl.exp2(scores - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        # Unused slots hold anything, NaN included, and 0 * NaN is NaN: the mask zeroes V while it is loaded.
        v = tl.load(head_base + stride_kv + offset, mask=mask, other=0.0)
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        l = l * rescale + tl.sum(p, axis=1)
        m = m_new

    head = kv_head * GROUP
    l = tl.where(l > 0, l, 1.0)  # length 0: zeros
    out = out_ptr + b * stride_ob + (head + g)[:, None] * HEAD_DIM + d[None, :]
    if SPLIT and active > 1:
        num_heads = num_kv_heads * GROUP
        stride_part = num_heads * HEAD_DIM
        partial_ptr += b * splits * stride_part
        lse_ptr += b * splits * num_heads
        here = partial_ptr + split * stride_part + (head + g)[:, None] * HEAD_DIM + d[None, :]
        tl.store(here, acc / l[:, None], mask=mask_q)
        tl.store(lse_ptr + split * num_heads + head + g, m + tl.log2(l), mask=g < GROUP)
        tl.debug_barrier()  # all of this program's stores come before its arrival is counted
        arrivals_ptr += b * num_kv_heads + kv_head
        if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == active - 1:
            tl.store(arrivals_ptr, 0)  # for the next call
            tl.debug_barrier()
            _merge(
                partial_ptr, lse_ptr, out_ptr + b * stride_ob + head * HEAD_DIM, active, head, stride_part, num_heads,
                GROUP, GROUP_P2, HEAD_DIM, BLOCK_D, PARTS,
            )  # fmt: skip
    else:
        tl.store(out, (acc / l[:, None]).to(out_ptr.dtype.element_ty), mask=mask_q)


def _plan(batch, num_kv_heads, max_len, head_dim, element_size, device):
    """(splits, BLOCK_KV, num_warps, stages): enough programs to fill the device, no part under one block."""
    block_kv = 32 if head_dim * element_size > 128 else 64
    splits = max(1, round(6 * num_sms(device) / (batch * num_kv_heads)))
    return min(splits, 64, max(1, -(-max_len // block_kv))), block_kv, 2, 4


def _launch(q, new, pages, page_table, kv_lens, tables, scale, early, plan):
    batch, num_heads, head_dim = q.shape
    _, _, page_size, num_kv_heads, _ = pages.shape
    group = num_heads // num_kv_heads
    k_new, v_new = new if new else (q, q)
    cos, sin = tables if tables else (q, q)
    splits, block_kv, num_warps, stages = plan or _plan(
        batch, num_kv_heads, page_table.shape[1] * page_size, head_dim, q.element_size(), q.device
    )
    out = torch.empty(batch, num_heads, head_dim, dtype=q.dtype, device=q.device)
    stored = splits if splits > 1 else 0
    partial = torch.empty(batch * stored * num_heads * head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch * stored * num_heads, dtype=torch.float32, device=q.device)
    block_d = max(16, next_power_of_2(head_dim))
    group_p2 = next_power_of_2(group)
    # Of the parts asked for at once, a thread holds 32 numbers.
    parts = max(1, min(next_power_of_2(splits), 32 * 32 * num_warps // (group_p2 * block_d)))
    _paged_decode_kernel[(splits, num_kv_heads, batch)](
        q, k_new, v_new, cos, sin, pages, page_table, kv_lens, out, partial, lse, arrival_counters(q.device),
        q.stride(0), q.stride(1), k_new.stride(0), k_new.stride(1), *pages.stride()[:4], page_table.stride(0),
        out.stride(0), cos.stride(0), (scale or head_dim**-0.5) * math.log2(math.e), splits,
        GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size, BLOCK_G=max(16, group_p2), BLOCK_D=block_d,
        BLOCK_KV=block_kv, STAGES=stages, GROUP_P2=group_p2, PARTS=parts, SPLIT=splits > 1, ROPE=bool(new), EARLY=early,
        **launch_options(q.device, num_warps=num_warps),
    )  # fmt: skip
    return out


def paged_decode_triton(q, pages, page_table, kv_lens, scale=None, *, early=False, plan=None):
    """The Triton version of `reference`. For `early` see `rope_append_decode`; `plan` overrides (splits, BLOCK_KV,
    num_warps, stages)."""
    return _launch(q, None, pages, page_table, kv_lens, None, scale, early, plan)


def rope_append_decode_triton(
    qkv, pages, page_table, kv_lens, cos, sin, num_heads, scale=None, *, early=False, plan=None
):
    """The Triton version of `rope_append_decode`."""
    num_kv_heads, head_dim = pages.shape[3:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return _launch(q, (k, v), pages, page_table, kv_lens, (cos, sin), scale, early, plan)


def paged_decode(q, pages, page_table, kv_lens, scale=None, *, early=False):
    """One query token a sequence over its pages; arguments and result as in `reference`, page_table and kv_lens int32.

    Nothing waits for the host, and the grid does not depend on the lengths: one CUDA graph serves any of them.
    """
    if runs_triton(q):
        return paged_decode_triton(q, pages, page_table, kv_lens, scale, early=early)
    return reference(q, pages, page_table, kv_lens, scale)


def rope_append_decode(qkv, pages, page_table, kv_lens, cos, sin, num_heads, scale=None, *, early=False):
    """A decode step's attention from the raw qkv product: rotate q and k, append k and v to their page, attend.

    qkv [B, (Hq + 2 Hkv) d]; pages [P, 2, page_size, Hkv, d]; page_table int32 [B, max_pages]; kv_lens int32 [B], the
    newest token included, so that its position is kv_lens - 1; cos, sin float32 [context, d / 2]. Returns [B, Hq, d].
    Rows of padding (a CUDA graph's bucket) need a length of at least 1 and a page of their own to write to.

    early: page_table and kv_lens were not written by the kernel just before this one, and may be read before it ends.
    """
    if runs_triton(qkv):
        return rope_append_decode_triton(qkv, pages, page_table, kv_lens, cos, sin, num_heads, scale, early=early)
    return rope_append_decode_reference(qkv, pages, page_table, kv_lens, cos, sin, num_heads, scale)

"""Rotary embedding of q and k fused with appending k and v to their KV pages.

Apart, this is three small kernels that each read what the previous one wrote; together, the output of the qkv product
is read once. Rotation is half-split (Hugging Face's "rotate_half"), with angles and arithmetic in float32.
"""

from __future__ import annotations

import torch

from common.kernels.runtime import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    runs_triton,
    tl,
)


def reference(qkv, pages, page_table, slots, positions, cos, sin, num_heads):
    """The plain version of `rope_append`."""
    num_kv_heads, head_dim = pages.shape[3:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    rotated = heads[:, : num_heads + num_kv_heads]
    at = positions.clamp(min=0).long()
    c, s = cos[at][:, None], sin[at][:, None]
    x1, x2 = rotated.float().chunk(2, dim=-1)
    rotated.copy_(torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    real = positions >= 0
    at, page_size = at[real], pages.shape[2]
    page = page_table[slots[real].long(), at // page_size].long()
    pages[page, 0, at % page_size] = k[real]
    pages[page, 1, at % page_size] = v[real]
    return q, k, v


@jit(unaligned=["slots_ptr", "positions_ptr"])
def _rope_append_kernel(
    qkv_ptr, pages_ptr, table_ptr, slots_ptr, positions_ptr, cos_ptr, sin_ptr,
    stride_t, stride_page, stride_kv, stride_token, stride_head, stride_table, stride_cos,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H of one token's heads (q, then k, then v)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    HALF: tl.constexpr = HEAD_DIM // 2
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (d < HALF)[None, :]
    position = tl.load(positions_ptr + t)
    at = tl.maximum(position, 0)

    low = qkv_ptr + t * stride_t + head[:, None] * HEAD_DIM + d[None, :]
    x1 = tl.load(low, mask=mask)
    x2 = tl.load(low + HALF, mask=mask)
    angle = at.to(tl.int64) * stride_cos + d
    cos = tl.load(cos_ptr + angle, mask=d < HALF)[None, :]
    sin = tl.load(sin_ptr + angle, mask=d < HALF)[None, :]
    rotates = (head < NUM_HEADS + NUM_KV_HEADS)[:, None]
    y1 = (x1.to(tl.float32) * cos - x2.to(tl.float32) * sin).to(x1.dtype)
    y2 = (x2.to(tl.float32) * cos + x1.to(tl.float32) * sin).to(x1.dtype)
    y1 = tl.where(rotates, y1, x1)
    y2 = tl.where(rotates, y2, x2)
    tl.store(low, y1, mask=mask & rotates)
    tl.store(low + HALF, y2, mask=mask & rotates)

    slot = tl.load(slots_ptr + t).to(tl.int64)
    page = tl.load(table_ptr + slot * stride_table + at // PAGE_SIZE, mask=position >= 0, other=0).to(tl.int64)
    is_v = head >= NUM_HEADS + NUM_KV_HEADS
    kv_head = head - NUM_HEADS - tl.where(is_v, NUM_KV_HEADS, 0)
    base = pages_ptr + page * stride_page + (at % PAGE_SIZE) * stride_token
    entry = base + (tl.where(is_v, stride_kv, 0) + kv_head * stride_head)[:, None] + d[None, :]
    mask_kv = mask & (head >= NUM_HEADS)[:, None] & (position >= 0)
    tl.store(entry, y1, mask=mask_kv)
    tl.store(entry + HALF, y2, mask=mask_kv)


def rope_append_triton(qkv, pages, page_table, slots, positions, cos, sin, num_heads):
    """The Triton version of `rope_append`."""
    num_tokens = qkv.shape[0]
    _, _, page_size, num_kv_heads, head_dim = pages.shape
    total = num_heads + 2 * num_kv_heads
    # A decode step has few tokens: spread their heads over programs. A prompt has many: 16 heads a program.
    block_h = min(next_power_of_2(total), 4 if num_tokens <= 64 else 16)
    block_d = next_power_of_2(head_dim // 2)
    _rope_append_kernel[(num_tokens, -(-total // block_h))](
        qkv, pages, page_table, slots, positions, cos, sin, qkv.stride(0), *pages.stride()[:4], page_table.stride(0),
        cos.stride(0), NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, PAGE_SIZE=page_size,
        BLOCK_H=block_h, BLOCK_D=block_d,
        **launch_options(qkv.device, num_warps=max(1, min(4, block_h * block_d // 128))),
    )  # fmt: skip
    return qkv.unflatten(-1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)


def rope_append(qkv, pages, page_table, slots, positions, cos, sin, num_heads):
    """Rotates q and k of qkv in place, appends k and v to their pages, and returns views (q, k, v) of qkv.

    qkv [T, (Hq + 2 Hkv) d], the last dimension contiguous; pages [P, 2, page_size, Hkv, d]; page_table int32
    [slots, max_pages]; slots int32 [T], the table's row of each token; positions int32 [T], below 0 to append nothing;
    cos, sin float32 [context, d / 2]. Returns q [T, Hq, d], k and v [T, Hkv, d].
    """
    function = rope_append_triton if runs_triton(qkv) else reference
    return function(qkv, pages, page_table, slots, positions, cos, sin, num_heads)

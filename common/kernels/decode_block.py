"""What the kernels of decode attention share: queries and the newest key rotated, the newest token stored and attended
to from registers, and blocks of K and V read through the page table and attended to.
"""

from __future__ import annotations

from common.kernels.runtime import jit, tl


@jit
def rotated(ptr, row, d, cos, sin, mask, HALF: tl.constexpr):
    """Rows of one head, rotated half-split in float32 and rounded to their own dtype: row [N, 1], d [1, D]."""
    x = tl.load(ptr + row + d, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(ptr + row + tl.where(d < HALF, d + HALF, d - HALF), mask=mask, other=0.0).to(tl.float32)
    return (x * cos + tl.where(d < HALF, -partner, partner) * sin).to(ptr.dtype.element_ty)


@jit
def rotation(cos_ptr, sin_ptr, position, stride, d, HEAD_DIM: tl.constexpr):
    """(cos, sin) [1, D] of a position: the tables hold half a head, the other half turns alike."""
    HALF: tl.constexpr = HEAD_DIM // 2
    angle = position.to(tl.int64) * stride + tl.where(d < HALF, d, d - HALF)
    cos = tl.load(cos_ptr + angle, mask=d < HEAD_DIM, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=d < HEAD_DIM, other=0.0)[None, :]
    return cos, sin


@jit
def append_newest(
    q, l, acc, k_new_ptr, v_new_ptr, row, slot, stride_kv, d, cos, sin, mask_d, scale_log2, HEAD_DIM: tl.constexpr
):
    """Rotates and stores the newest key and value, and begins the running softmax with them, from registers: nothing
    waits for their way through memory. row: where they come from; slot: where the key goes, stride_kv before the value.
    """
    one = (tl.arange(0, 1) * 0)[:, None] + row
    k_new = rotated(k_new_ptr, one, d[None, :], cos, sin, mask_d, HEAD_DIM // 2)
    v_new = tl.load(v_new_ptr + one + d[None, :], mask=mask_d, other=0.0)
    tl.store(slot + d[None, :], k_new, mask=mask_d)
    tl.store(slot + d[None, :] + stride_kv, v_new, mask=mask_d)
    m = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scale_log2
    return m, l + 1.0, acc + v_new.to(tl.float32)


@jit
def load_block(
    head_base, table_row, first, end, d, mask_d, stride_page, stride_kv, stride_token, BLOCK_KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Keys and values [BLOCK_KV, D] of the tokens from `first`, and which of them come before `end`. Unused slots hold
    anything, NaN included, and 0 * NaN is NaN: the mask zeroes them while they are loaded.
    """
    token = first + tl.arange(0, BLOCK_KV)
    valid = token < end
    page = tl.load(table_row + token // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
    offset = (page * stride_page + (token % PAGE_SIZE) * stride_token)[:, None] + d[None, :]
    k = tl.load(head_base + offset, mask=valid[:, None] & mask_d, other=0.0)
    v = tl.load(head_base + stride_kv + offset, mask=valid[:, None] & mask_d, other=0.0)
    return k, v, valid


@jit
def attend_block(q, k, v, valid, m, l, acc, scale_log2):
    """One block of keys and values into the running softmax: m [G] in base 2, l [G], acc [G, d]."""
    scores = tl.dot(q, k.T, input_precision="ieee") * scale_log2
    scores = tl.where(valid[None, :], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, axis=1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet, and nothing in this block
    p = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(m - shift)
    acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, l * rescale + tl.sum(p, axis=1), acc

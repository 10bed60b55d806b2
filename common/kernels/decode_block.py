"""What the kernels of decode attention share: a head's rows rotated, and one block of K and V attended to."""

from __future__ import annotations

from common.kernels.runtime import jit, tl


@jit
def rotated(ptr, row, d, cos, sin, mask, HALF: tl.constexpr):
    """Rows of one head, rotated half-split in float32 and rounded to their own dtype: row [N, 1], d [1, D]."""
    x = tl.load(ptr + row + d, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(ptr + row + tl.where(d < HALF, d + HALF, d - HALF), mask=mask, other=0.0).to(tl.float32)
    return (x * cos + tl.where(d < HALF, -partner, partner) * sin).to(ptr.dtype.element_ty)


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

"""Matrix-vector products for decode: y = W x for the one row of a batch-1 step, with their neighbours fused.

Such a step reads every weight once and does two operations with each, so its time is bytes over read bandwidth plus
whatever the memory system idles between kernels. Two things keep it busy here. A program holds a few whole rows of W
in registers and asks for all of them at once, so each multiprocessor has 128 KB in flight. And it asks for them
*before* it waits for the previous kernel (programmatic dependent launch): weights depend on nothing, so they arrive
while the previous kernel drains, and only the vector is read after the wait.

RMSNorm is folded in: y = (W (g*x)) / rms(x), so the sum of squares is taken beside the product, not before it. It is
computed again in every program from a vector that sits in L1, which costs less than a kernel of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.kernels.runtime import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    num_sms,
    tl,
)

MAX_IN_FEATURES = 32768  # a row of W is held in the registers of one program


def matvec_reference(x, weight, *, norm_weight=None, eps=0.0, residual=None, silu=False):
    """The plain version, in x's dtype: [rms_norm] -> W x -> [silu(gate) * up] -> [+ residual].

    x [T, K]; weight [N, K]; norm_weight [K]; residual [T, N]; with silu, weight is [2F, K], gate rows first, and the
    result [T, F].
    """
    if norm_weight is not None:
        x = F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * norm_weight
    y = F.linear(x, weight)
    if silu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


@jit
def _matvec_kernel(
    x_ptr, w_ptr, w_up_ptr, norm_ptr, residual_ptr, out_ptr, N, K, stride_wn, eps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, SILU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs. N counts outputs (F of a [2F, K] weight with SILU)."""
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Even shapes load without a predicate.
    if EVEN_N and EVEN_K:
        mask = None
    elif EVEN_K:
        mask = (n < N)[:, None] & (k >= 0)[None, :]
    else:
        mask = (n < N)[:, None] & (k < K)[None, :]
    tile = n.to(tl.int64)[:, None] * stride_wn + k[None, :]
    w = tl.load(w_ptr + tile, mask=mask, eviction_policy="evict_first")
    if SILU:
        w_up = tl.load(w_up_ptr + tile, mask=mask, eviction_policy="evict_first")
    if NORM:
        g = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
        x = x * g
    y = tl.sum(w.to(tl.float32) * x[None, :], axis=1) * scale
    if SILU:
        up = tl.sum(w_up.to(tl.float32) * x[None, :], axis=1) * scale
        y = y * tl.sigmoid(y) * up
    if ADD:
        y += residual
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


def _tile(num_outputs: int, row_bytes: int, device: torch.device) -> tuple[int, int]:
    """(BLOCK_N, num_warps): two rows of W a program, or 16 KB of short ones, 128 bytes a thread; fewer rows where that
    would leave multiprocessors idle."""
    block_n = max(2 if row_bytes <= 65536 else 1, min(16, 16384 // row_bytes))
    while block_n > 1 and num_outputs // block_n < 4 * num_sms(device):
        block_n //= 2
    return block_n, max(1, min(16, block_n * row_bytes // 4096))


def matvec(x, weight, *, norm_weight=None, eps=0.0, residual=None, silu=False, out_dtype=None):
    """The Triton version of `matvec_reference` for one row, accumulated in float32 and rounded once at the end.

    x [1, K] with K of at most MAX_IN_FEATURES; weight [N, K]; all with contiguous rows; out_dtype: x's unless given
    (float32 for logits). In a chain of kernels it starts reading the weight before the previous kernel has finished, so
    a weight must not be written by a kernel that comes shortly before it in the same stream.
    """
    (rows, in_features), num_outputs = x.shape, weight.shape[0] // 2 if silu else weight.shape[0]
    assert rows == 1 and in_features <= MAX_IN_FEATURES and weight.stride(1) == 1 and x.stride(1) == 1
    out = torch.empty(1, num_outputs, dtype=out_dtype or x.dtype, device=x.device)
    block_k = next_power_of_2(in_features)
    block_n, num_warps = _tile(num_outputs, block_k * weight.element_size() * (2 if silu else 1), x.device)
    _matvec_kernel[(-(-num_outputs // block_n),)](
        x, weight, weight[num_outputs:] if silu else weight, x if norm_weight is None else norm_weight,
        x if residual is None else residual, out, num_outputs, in_features, weight.stride(0), eps,
        BLOCK_N=block_n, BLOCK_K=block_k, EVEN_N=num_outputs % block_n == 0, EVEN_K=block_k == in_features,
        NORM=norm_weight is not None, ADD=residual is not None, SILU=silu,
        **launch_options(x.device, num_warps=num_warps),
    )  # fmt: skip
    return out

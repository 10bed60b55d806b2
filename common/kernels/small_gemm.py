"""Products of 2 to 256 rows: y = x W^T where reading W costs more than the arithmetic.

The weight is the tall operand: a program takes BLOCK_N rows of W and all (or BLOCK_T) rows of x, so W is read from
memory once and the matrix units see W^T-shaped tiles of 64 or 128 by T. Where N gives too few programs to keep the
memory system busy, K is split; the parts are summed in a fixed order by whichever program of a tile arrives last, so a
result does not depend on timing. Residual addition and silu(gate) * up are part of the epilogue.
"""

from __future__ import annotations

import torch

from common.kernels.runtime import (
    HAS_TRITON,
    arrival_counters,
    capability,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    num_sms,
    tl,
)

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor


@jit
def _tile(
    ptr, stride, row, k, rows, K, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_K] of a row-major matrix from (row, k), zero outside; `ptr` is a descriptor with TMA."""
    if TMA:
        tile = ptr.load([row, k])
    else:
        r = row + tl.arange(0, BLOCK_R)
        c = k + tl.arange(0, BLOCK_K)
        mask = (r < rows)[:, None] & (c < K)[None, :]
        tile = tl.load(ptr + r.to(tl.int64)[:, None] * stride + c[None, :], mask=mask, other=0.0, eviction_policy=HINT)
    return tile


@jit(varies=["T"])
def _small_gemm_kernel(
    x_ptr, w_ptr, w_up_ptr, residual_ptr, out_ptr, partial_ptr, arrivals_ptr,
    T, N, K, stride_xt, stride_wn, stride_rt, stride_ot,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    ADD: tl.constexpr, SILU: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    t0 = tl.program_id(2) * BLOCK_T
    n0 = tile_n * BLOCK_N
    blocks = tl.cdiv(K, BLOCK_K)
    first = blocks * split // SPLITS
    last = blocks * (split + 1) // SPLITS
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    acc_up = acc
    if PDL:
        gdc_wait()
    for block in tl.range(first, last, num_stages=STAGES):
        k = block * BLOCK_K
        x = _tile(x_ptr, stride_xt, t0, k, T, K, BLOCK_T, BLOCK_K, TMA, "evict_last").T
        w = _tile(w_ptr, stride_wn, n0, k, N, K, BLOCK_N, BLOCK_K, TMA, "evict_first")
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if SILU:
            w_up = _tile(w_up_ptr, stride_wn, n0, k, N, K, BLOCK_N, BLOCK_K, TMA, "evict_first")
            acc_up = tl.dot(w_up, x, acc_up, input_precision="ieee")

    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    if SPLITS > 1:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_T * (2 if SILU else 1)
        tile = tl.program_id(2) * tl.num_programs(0) + tile_n
        parts = partial_ptr + tile.to(tl.int64) * (SPLITS * SIZE) + n[:, None] * BLOCK_T + t[None, :]
        tl.store(parts + split * SIZE, acc)
        if SILU:
            tl.store(parts + split * SIZE + BLOCK_N * BLOCK_T, acc_up)
        tl.debug_barrier()  # all of this program's stores come before its arrival is counted
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") != SPLITS - 1:
            return
        tl.store(arrivals_ptr + tile, 0)  # for the next call
        tl.debug_barrier()
        # Its own part is at hand; the others are asked for at once and added in the order of the parts.
        own = acc
        own_up = acc_up
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        acc_up = acc
        for s in tl.static_range(SPLITS):
            other = tl.load(parts + s * SIZE, mask=(n >= 0)[:, None] & (s != split), other=0.0, cache_modifier=".cg")
            acc += tl.where(s == split, own, other)
            if SILU:
                other = tl.load(
                    parts + s * SIZE + BLOCK_N * BLOCK_T, mask=(n >= 0)[:, None] & (s != split), other=0.0,
                    cache_modifier=".cg",
                )  # fmt: skip
                acc_up += tl.where(s == split, own_up, other)
    if SILU:
        acc = acc * tl.sigmoid(acc) * acc_up
    y = acc.T
    row = t0.to(tl.int64) + t
    mask = (row < T)[:, None] & (n0 + n < N)[None, :]
    if ADD:
        y += tl.load(residual_ptr + row[:, None] * stride_rt + (n0 + n)[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + row[:, None] * stride_ot + (n0 + n)[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


def small_gemm_pays(x: torch.Tensor) -> bool:
    """Whether it was measured faster than the library: 16-bit numbers on Hopper, in rows that descriptors take."""
    return capability(x.device) == (9, 0) and x.element_size() == 2 and x.shape[-1] % 8 == 0 and x.stride(0) % 8 == 0


def _plan(rows, outputs, features, silu, x):
    """(BLOCK_N, BLOCK_T, BLOCK_K, splits, num_warps, stages, TMA); measured on an H200 for Hopper, a safe choice
    elsewhere: later devices with 99 KiB of shared memory (12.0) could not hold Hopper's tiles. Loads through
    descriptors (TMA) want rows of whole 16-byte pieces."""
    block_t = min(128, max(16, next_power_of_2(rows)))
    if x.element_size() > 2:
        return 32, min(block_t, 32), 32, 1, 4, 2, False
    if capability(x.device) != (9, 0) or features % 8 or x.stride(0) % 8:
        return 64, min(block_t, 64), 64, 1, 4, 3, False
    splits = max(1, min(4, num_sms(x.device) // -(-outputs // 64), features // 512))
    if silu:
        return (64, block_t, 64, splits, 8, 6, True) if block_t > 64 else (64, block_t, 128, splits, 4, 4, True)
    return 64, block_t, 256 if block_t <= 32 else 128, splits, 4, 4, True


def small_gemm(x, weight, *, residual=None, silu=False, out_dtype=None, plan=None):
    """x [T, K] times weight [N, K]^T, accumulated in float32 and rounded once: [T, N], + residual [T, N] where given;
    with silu, weight is [2F, K], gate rows first, and the result silu(gate) * up, [T, F].

    x, weight, residual with contiguous rows; out_dtype: x's unless given (float32 for logits); `plan` overrides
    (BLOCK_N, BLOCK_T, BLOCK_K, splits, num_warps, stages, TMA).
    """
    rows, features = x.shape
    outputs = weight.shape[0] // 2 if silu else weight.shape[0]
    assert x.stride(1) == weight.stride(1) == 1
    block_n, block_t, block_k, splits, num_warps, stages, tma = plan or _plan(rows, outputs, features, silu, x)
    out = torch.empty(rows, outputs, dtype=out_dtype or x.dtype, device=x.device)
    tiles_n, tiles_t = -(-outputs // block_n), -(-rows // block_t)
    size = tiles_n * tiles_t * splits * block_n * block_t * (2 if silu else 1) if splits > 1 else 0
    partial = torch.empty(size, dtype=torch.float32, device=x.device)
    gate, up = (weight[:outputs], weight[outputs:]) if silu else (weight, weight)
    x_arg, gate_arg, up_arg = x, gate, up
    if tma:
        x_arg = TensorDescriptor.from_tensor(x, [block_t, block_k])
        gate_arg, up_arg = (TensorDescriptor.from_tensor(w, [block_n, block_k]) for w in (gate, up))
    _small_gemm_kernel[(tiles_n, splits, tiles_t)](
        x_arg, gate_arg, up_arg, x if residual is None else residual, out, partial, arrival_counters(x.device), rows,
        outputs, features, x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_K=block_k, SPLITS=splits, ADD=residual is not None, SILU=silu,
        TMA=tma, STAGES=stages, **launch_options(x.device, num_warps=num_warps),
    )  # fmt: skip
    return out

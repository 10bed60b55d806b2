"""RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight, accumulated in float32; alone, and fused with the
residual addition before it.

Bound by bytes: each element is read once and written once, so a program of the fast version keeps its rows in registers
between the sum of squares and the scaling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.kernels.runtime import (
    Kernels,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    runs_triton,
    tl,
)

MAX_FEATURES = 32768  # a row is held in the registers of one program


@dataclass(frozen=True)
class Norm:
    """A norm's parameters: `weight` [D] in the model's dtype, the checkpoint's own `eps`, and how it is computed."""

    weight: torch.Tensor
    eps: float
    kernels: Kernels = Kernels.ALL


def rms_norm_reference(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """[T, D] -> [T, D] in x's dtype. Squares of float16 activations overflow past 256: hence float32 inside."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * (wide * scale).to(x.dtype)


def add_rms_norm_reference(x: torch.Tensor, residual: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), each [T, D]."""
    total = x + residual
    return rms_norm_reference(total, norm), total


@jit(varies=["T"])
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, T, D, stride_x, stride_r, stride_o, stride_s, eps,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < T) & (d < D)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * stride_x + d, mask=mask, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(residual_ptr + row * stride_r + d, mask=mask, other=0.0)).to(x.dtype)
        tl.store(total_ptr + row * stride_s + d, x, mask=mask)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, axis=1) / D + eps)
    tl.store(out_ptr + row * stride_o + d, (x32 * scale[:, None] * weight).to(x.dtype), mask=mask)


def _launch(x, residual, norm):
    """Several short rows, or one long row, a program; measured on an H200, 8 warps suit a row of 4,096."""
    rows = x.reshape(-1, x.shape[-1])
    residual_rows = rows if residual is None else residual.reshape(rows.shape)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    total = out if residual is None else torch.empty_like(out)
    block_d = next_power_of_2(rows.shape[1])
    block_t = max(1, 1024 // block_d)
    _rms_norm_kernel[(-(-rows.shape[0] // block_t),)](
        rows, residual_rows, norm.weight, out, total, *rows.shape, rows.stride(0), residual_rows.stride(0),
        out.stride(0), total.stride(0), norm.eps, BLOCK_T=block_t, BLOCK_D=block_d, ADD=residual is not None,
        **launch_options(x.device, num_warps=max(1, min(16, block_t * block_d // 512))),
    )  # fmt: skip
    return out.view(x.shape), total.view(x.shape)


def rms_norm_triton(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """[T, D] -> [T, D] for D of at most MAX_FEATURES, rounded once."""
    return _launch(x, None, norm)[0]


def add_rms_norm_triton(x: torch.Tensor, residual: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded before it is normalised, as unfused code does."""
    return _launch(x, residual, norm)


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """[T, D] -> [T, D]."""
    if norm.kernels > Kernels.PLAIN and runs_triton(x) and x.shape[-1] <= MAX_FEATURES:
        return rms_norm_triton(x, norm)
    return rms_norm_reference(x, norm)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), each [T, D]."""
    if runs_triton(x) and x.shape[-1] <= MAX_FEATURES:
        return add_rms_norm_triton(x, residual, norm)
    return add_rms_norm_reference(x, residual, norm)

"""SwiGLU's activation (arXiv 2002.05202): silu(gate) * up, in one pass over the fused output of gate_up."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.kernels.runtime import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    runs_triton,
    tl,
)

MAX_GRID_ROWS = 65535  # what the second dimension of a CUDA grid holds


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 F] (gate first) -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@jit
def _silu_mul_kernel(x_ptr, out_ptr, F, stride_x, stride_o, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(1).to(tl.int64)
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    gate = tl.load(x_ptr + t * stride_x + f, mask=mask).to(tl.float32)
    up = tl.load(x_ptr + t * stride_x + F + f, mask=mask).to(tl.float32)
    tl.store(out_ptr + t * stride_o + f, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 F] -> [T, F] (any leading dimensions), in float32 and rounded once."""
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    features = rows.shape[1] // 2
    out = torch.empty(rows.shape[0], features, dtype=rows.dtype, device=rows.device)
    block = min(2048, max(64, next_power_of_2(features)))
    for first in range(0, rows.shape[0], MAX_GRID_ROWS):
        part = rows[first : first + MAX_GRID_ROWS]
        _silu_mul_kernel[(-(-features // block), part.shape[0])](
            part, out[first:], features, rows.stride(0), out.stride(0), BLOCK=block,
            **launch_options(rows.device, num_warps=max(1, block // 256)),
        )  # fmt: skip
    return out.view(*gate_up.shape[:-1], features)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 F] (gate first) -> [T, F]."""
    return silu_mul_triton(gate_up) if runs_triton(gate_up) else silu_mul_reference(gate_up)

"""Step 1: one program takes 128 elements.

Predicted: well below the copy's speed. With the usual four warps a program, each thread has a single 4-byte load in
flight, and 8192 x 8192 elements are half a million programs, each of which costs its start.
Measured: 318.2 us = 1,687 GB/s (one H200, CUDA graph over distinct buffers), 40 % of the copy. silu/CUDA's first step
has one 4-byte load a thread too and took 216.7 us with half as many blocks: starting programs seems to cost as well.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def silu_kernel(input_ptr, output_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(input_ptr + offsets, mask=mask).to(tl.float32)
    y = x / (1.0 + tl.exp(-x))
    tl.store(output_ptr + offsets, y.to(output_ptr.dtype.element_ty), mask=mask)


def silu_triton(input: torch.Tensor) -> torch.Tensor:
    x = input.contiguous()
    output = torch.empty_like(x)
    block = 128
    silu_kernel[(triton.cdiv(x.numel(), block),)](x, output, x.numel(), BLOCK=block)
    return output

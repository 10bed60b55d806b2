"""Step 2: 1024 elements a program.

What changed: BLOCK. A thread now has eight elements, and Triton turns them into 16-byte loads because they lie together
and the pointers are multiples of 16 (it checks when it launches).
Predicted: close to the copy.
Measured: not yet.
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
    block = 1024
    silu_kernel[(triton.cdiv(x.numel(), block),)](x, output, x.numel(), BLOCK=block)
    return output

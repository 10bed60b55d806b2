"""Step 2: eight 16-byte loads in flight a thread, and nothing kept in the cache.

What changed: 4096 elements for four warps are 32 a thread, eight independent 16-byte loads in float32, so the memory
system always has work waiting. Data that is used once is marked evict_first. Offsets are 64-bit: a tensor may have more
than 2^31 elements.
Predicted: the copy of the same bytes, and the end of the ladder.
Measured: 137.7 us = 3,899 GB/s (one H200, CUDA graph over distinct buffers), 2.3 times step 1 and 92.5 % of the copy.
A copy in CUDA with four loads in flight and hints of the same kind took 134.6 us, one with one vector a thread and no
hints 127.3: so the copy it was modelled on is itself not the quickest. Step 3 takes 127.9.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def silu_kernel(input_ptr, output_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(input_ptr + offsets, mask=mask, eviction_policy="evict_first").to(tl.float32)
    y = x / (1.0 + tl.exp(-x))
    tl.store(output_ptr + offsets, y.to(output_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


def silu_triton(input: torch.Tensor) -> torch.Tensor:
    x = input.contiguous()
    output = torch.empty_like(x)
    block = 4096
    silu_kernel[(triton.cdiv(x.numel(), block),)](x, output, x.numel(), BLOCK=block, num_warps=4)
    return output

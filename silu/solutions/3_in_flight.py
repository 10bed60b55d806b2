"""Step 3: several 16-byte loads in flight a thread, offsets of 64 bits, nothing kept in the cache.

What changed: 4096 elements for four warps are 32 a thread, eight independent 16-byte loads in float32, so the memory
system always has work waiting. Data that is used once is marked evict_first. Offsets are 64-bit: a tensor may have more
than 2^31 elements.
Predicted: the copy of the same bytes. The limit is memory.
Measured: not yet.

A non-contiguous input is copied first (`contiguous`), which doubles its cost: reading with strides in the kernel would
save that, and is left as an exercise. One whose elements fill memory without gaps (a transposed matrix) needs neither:
the function is pointwise, so the order does not matter.
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


def _fills_its_memory(x: torch.Tensor) -> bool:
    """Whether the elements lie together, in whatever order: then empty_like keeps that order."""
    strides = sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size != 1)
    step = 1
    for stride, size in strides:
        if stride != step:
            return False
        step *= size
    return True


def silu_triton(input: torch.Tensor) -> torch.Tensor:
    x = input if _fills_its_memory(input) else input.contiguous()
    output = torch.empty_like(x)
    block = 4096
    silu_kernel[(triton.cdiv(x.numel(), block),)](x, output, x.numel(), BLOCK=block, num_warps=4)
    return output

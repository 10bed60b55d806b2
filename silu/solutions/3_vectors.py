"""Step 3: 1024 elements a program, no hints. The simplest kernel that uses 16-byte loads is the fastest.

What changed: a quarter of the elements a program, so eight a thread, which Triton turns into two 16-byte loads: it sees
that they lie together, and checks when it launches that the pointers and n are multiples of 16. (Where n is not, the
mask could end inside a vector, and the loads have 4 bytes.) And an input that is not contiguous is copied only where it
must.
Predicted: (when it stood before step 2) close to the copy.
Measured: 127.9 us = 4,199 GB/s (one H200, CUDA graph over distinct buffers), 99.6 % of the copy; torch and
torch.compile took 128.1 and 128.0 us beside it. An earlier run had offsets of 32 bits here and took 127.7: as
predicted, those of 64 change nothing that shows. The limit is memory. Enough warps hide its latency; more loads a
thread (step 2) bring nothing, and they take registers: compiled for sm_90 it is 47 a thread there, which leaves room
for 1,280 threads a multiprocessor, not 2,048. Whether that, the loads or the hints cost its 9.8 us is not known: an
exercise.

A tensor with gaps between its elements is copied first (`contiguous`), which doubles its cost: reading with strides in
the kernel would save that, and is left as an exercise. One whose elements fill memory (a transposed matrix) needs
neither: the function is pointwise, so the order does not matter.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def silu_kernel(input_ptr, output_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(input_ptr + offsets, mask=mask).to(tl.float32)
    y = x / (1.0 + tl.exp(-x))
    tl.store(output_ptr + offsets, y.to(output_ptr.dtype.element_ty), mask=mask)


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
    block = 1024
    silu_kernel[(triton.cdiv(x.numel(), block),)](x, output, x.numel(), BLOCK=block)
    return output

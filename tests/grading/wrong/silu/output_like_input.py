# A mistake on purpose: the copy's elements are written into an output with the input's strides.
import torch
import triton
import triton.language as tl


@triton.jit
def silu_kernel(input_ptr, output_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(input_ptr + offsets, mask=mask).to(tl.float32)
    y = x / (1.0 + tl.exp(-x))
    tl.store(output_ptr + offsets, y, mask=mask)


def silu_triton(input):
    x = input.contiguous()
    output = torch.empty_like(input)
    n = x.numel()
    silu_kernel[(triton.cdiv(n, 1024),)](x, output, n, BLOCK=1024)
    return output

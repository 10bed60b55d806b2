"""Lab: SiLU in Triton. Fill in the TODOs, then grade:  python silu/grade.py

    output[i] = input[i] * sigmoid(input[i]),   sigmoid(x) = 1 / (1 + exp(-x))

`silu_triton(input)` returns a new tensor of the input's shape and dtype (float32, float16 or bfloat16), for any number
of elements, contiguous or not, and leaves its input alone. silu_torch.py is the reference; README.md has the idea.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def silu_kernel(input_ptr, output_ptr, n, BLOCK: tl.constexpr):
    # TODO 2: which elements are this program's? tl.program_id, tl.arange; and which of them exist (mask)?
    # TODO 3: load, compute in float32, store.
    pass


def silu_triton(input: torch.Tensor) -> torch.Tensor:
    # TODO 1: allocate the output, choose a BLOCK, launch enough programs: silu_kernel[grid](...)
    # TODO 4: a transposed or sliced input has gaps between its elements. What does your kernel read then?
    raise NotImplementedError("silu_triton: start with TODO 1")

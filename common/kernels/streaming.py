"""The two simplest kernels, whose speed is a GPU's memory ceiling: copy a buffer, and read one.

    copy(src, dst)          every byte read once and written once: the ceiling of elementwise work
    read(src, partial)      every byte read once, next to nothing written: the ceiling of decode

They take int32 words, so that no value can be slow or NaN. `python -m common.roofline` measures with them.
"""

import torch
import triton
import triton.language as tl

# (words a program and step, steps a program, warps): which is fastest differs between GPUs, so several are tried.
# A thread moves 16 bytes a load in all of them.
COPY_CONFIGS = ((1024, 4), (2048, 4), (4096, 8), (8192, 8), (16384, 16))
READ_CONFIGS = ((2048, 8, 8), (4096, 4, 8), (4096, 16, 8), (8192, 4, 16), (8192, 16, 16))
ALIGN_WORDS = 1 << 17  # a buffer length that every configuration divides


@triton.jit
def _copy_kernel(src, dst, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst + at, tl.load(src + at))


@triton.jit
def _read_kernel(src, partial, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):  # unrolled: all loads are in flight before the first is added
        total += tl.load(src + at + step * BLOCK)
    tl.store(partial + tl.program_id(0), tl.sum(total))


def copy(src: torch.Tensor, dst: torch.Tensor, config: tuple[int, int] = COPY_CONFIGS[2]) -> None:
    """dst[:] = src. Both int32 [n] on one CUDA device, contiguous, n a multiple of ALIGN_WORDS."""
    _check(src, dst)
    if src.shape != dst.shape:
        raise ValueError(f"copy from {tuple(src.shape)} to {tuple(dst.shape)}")
    block, warps = config
    _copy_kernel[(src.numel() // block,)](src, dst, BLOCK=block, num_warps=warps)


def read(src: torch.Tensor, partial: torch.Tensor, config: tuple[int, int, int] = READ_CONFIGS[1]) -> None:
    """partial[p] = sum of program p's piece of src (modulo 2^32). src int32 [n] as in `copy`.

    partial: int32 of at least n / (config[0] * config[1]) elements; `n / 16384` is enough for any configuration.
    """
    _check(src, partial)
    block, steps, warps = config
    programs = src.numel() // (block * steps)
    if partial.numel() < programs:
        raise ValueError(f"partial holds {partial.numel()} sums, {programs} are needed")
    _read_kernel[(programs,)](src, partial, BLOCK=block, STEPS=steps, num_warps=warps)


def _check(src: torch.Tensor, other: torch.Tensor) -> None:
    for tensor in (src, other):
        if tensor.dtype != torch.int32 or not tensor.is_contiguous() or tensor.dim() != 1:
            raise ValueError("streaming kernels take contiguous one-dimensional int32 tensors")
    if src.numel() == 0 or src.numel() % ALIGN_WORDS:
        raise ValueError(f"streaming kernels take a multiple of {ALIGN_WORDS} words, not {src.numel()}")

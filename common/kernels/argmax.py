"""The index of each row's largest logit: greedy sampling of a decode step.

torch's reduction gives one row to one block; a batch of one then waits 28 us for a single multiprocessor to read the
whole vocabulary. Here a row is split over many programs, and the last of them to arrive merges their results.
"""

from __future__ import annotations

import torch

from common.kernels.runtime import (
    arrival_counters,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    num_sms,
    runs_triton,
    tl,
)

BLOCK = 2048


def argmax_reference(logits: torch.Tensor) -> torch.Tensor:
    """[R, V] -> int64 [R]."""
    return logits.argmax(-1)


@jit(varies=["splits"])
def _argmax_kernel(
    logits_ptr, out_ptr, best_ptr, index_ptr, arrivals_ptr, V, stride_r, splits,
    BLOCK: tl.constexpr, SPLITS_P2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a part of one row. Of equal logits the first wins, in a part and between parts."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0)
    part = tl.cdiv(tl.cdiv(V, BLOCK), splits) * BLOCK
    begin = split * part
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK], tl.int32) + begin + lane
    for start in range(begin, tl.minimum(begin + part, V), BLOCK):
        v = start + lane
        x = tl.load(logits_ptr + row * stride_r + v, mask=v < V, other=float("-inf")).to(tl.float32)
        index = tl.where(x > best, v, index)
        best = tl.maximum(x, best)
    top = tl.max(best, axis=0)
    first = tl.min(tl.where(best == top, index, 0x7FFFFFFF), axis=0)
    slot = row * splits + split
    tl.store(best_ptr + slot, top)
    tl.store(index_ptr + slot, first)
    tl.debug_barrier()  # the stores come before this program's arrival is counted
    if tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel", scope="gpu") == splits - 1:
        tl.store(arrivals_ptr + row, 0)  # for the next call
        s = tl.arange(0, SPLITS_P2)
        tops = tl.load(best_ptr + row * splits + s, mask=s < splits, other=float("-inf"), cache_modifier=".cg")
        indices = tl.load(index_ptr + row * splits + s, mask=s < splits, other=0x7FFFFFFF, cache_modifier=".cg")
        winner = tl.min(tl.where(tops == tl.max(tops, axis=0), indices, 0x7FFFFFFF), axis=0)
        tl.store(out_ptr + row, winner.to(tl.int64))


def argmax_triton(logits: torch.Tensor) -> torch.Tensor:
    """The Triton version of `argmax_reference`, for finite logits."""
    rows, vocab_size = logits.shape
    splits = max(1, min(-(-vocab_size // BLOCK), 2 * num_sms(logits.device) // rows))
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    best = torch.empty(rows * splits, dtype=torch.float32, device=logits.device)
    index = torch.empty(rows * splits, dtype=torch.int32, device=logits.device)
    _argmax_kernel[(splits, rows)](
        logits, out, best, index, arrival_counters(logits.device), vocab_size, logits.stride(0), splits,
        BLOCK=BLOCK, SPLITS_P2=next_power_of_2(splits), **launch_options(logits.device, num_warps=8),
    )  # fmt: skip
    return out


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Greedy ids: logits [R, V], finite -> int64 [R]; of equal logits the first."""
    return (argmax_triton if runs_triton(logits) else argmax_reference)(logits)

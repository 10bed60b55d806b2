"""Our own Triton kernels, the ones that the pipeline of section 3 runs: prefill over pages and paged decode.

On a CPU Triton's interpreter runs them, far too slowly to time: there they are checked, by `check_interpreted`.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import torch

from common.attention_bench.backends.base import (
    Backend,
    Case,
    DecodeCase,
    DecodeInputs,
    PrefillCase,
    PrefillInputs,
    Prepared,
)
from common.attention_bench.backends.reference import TOLERANCE, reference, relative_error
from common.attention_bench.options import Heads

PRIOR_PAGE_SIZE = 16


class TritonKernels(Backend):
    name = "triton"
    ours = True
    max_head_dim = 256

    def missing(self, device: torch.device) -> str | None:
        from common.kernels import runtime

        if not runtime.HAS_TRITON:
            return "not installed: pip install triton (Linux)"
        if device.type != "cuda":
            return "checked in Triton's interpreter on a CPU, not timed"
        return None

    def unsupported(self, case: Case) -> str | None:
        from common.kernels import runtime

        if case.device.type == "cuda" and not runtime.runs_triton(torch.empty(0, dtype=case.dtype, device=case.device)):
            return f"this card does not run Triton kernels in {str(case.dtype).removeprefix('torch.')}"
        return super().unsupported(case)

    def prepare(self, case: Case) -> Prepared:
        bind = partial(_bind_decode, False) if isinstance(case, DecodeCase) else partial(_bind_prefill, case)
        return Prepared(bind)


class BalancedTriton(TritonKernels):
    """Decode in shares of equal size: what a step takes from 64 sequences on (common/kernels/balanced_decode.py)."""

    name = "triton-balanced"
    phases = ("decode",)

    def prepare(self, case: Case) -> Prepared:
        return Prepared(partial(_bind_decode, True))


def _bind_decode(balanced: bool, x: DecodeInputs):
    from common.kernels.paged_decode import paged_decode_triton

    case = x.case  # early, as in a decode step: the context, its table and length are there before the queries
    return lambda: paged_decode_triton(x.q, x.pages, case.page_table, case.lengths, early=True, balanced=balanced)


def _bind_prefill(case: PrefillCase, x: PrefillInputs):
    """The newest keys as they lie side by side, those before the first query in pages."""
    from common.kernels.paged_prefill import paged_prefill_triton

    lengths = torch.tensor(case.kv_lens, dtype=torch.int32, device=case.device)
    priors = [kv - q for q, kv in zip(case.q_lens, case.kv_lens)]
    counts = [-(-prior // PRIOR_PAGE_SIZE) for prior in priors]
    h = case.heads
    shape = (max(1, sum(counts)), 2, PRIOR_PAGE_SIZE, h.num_kv_heads, h.head_dim)
    pages = torch.zeros(shape, dtype=case.dtype, device=case.device)
    table = torch.zeros(case.batch, max(1, *counts), dtype=torch.int32, device=case.device)
    new_k, new_v, begin = [], [], 0
    for row, (k, v) in enumerate(zip(x.k.split(case.kv_lens), x.v.split(case.kv_lens))):
        count, prior = counts[row], priors[row]
        table[row, :count] = torch.arange(begin, begin + count, dtype=torch.int32)
        for which, tensor, new in ((0, k, new_k), (1, v, new_v)):
            part = tensor.new_zeros(count * PRIOR_PAGE_SIZE, *tensor.shape[1:])
            part[:prior] = tensor[:prior]
            pages[begin : begin + count, which] = part.view(count, PRIOR_PAGE_SIZE, *tensor.shape[1:])
            new.append(tensor[prior:])
        begin += count
    k, v = (torch.cat(new_k), torch.cat(new_v)) if any(priors) else (x.k, x.v)
    return lambda: paged_prefill_triton(x.q, k, v, pages, table, case.cu_q, lengths, context=any(priors))


def use_interpreter() -> bool:
    """Have the kernels interpreted in this process, if they are not imported yet. Returns whether they are."""
    if "common.kernels.runtime" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        from common.kernels import runtime
    except ImportError:
        return False
    return runtime.HAS_TRITON and runtime.INTERPRETED


def check_interpreted(phase: str, heads: Heads) -> tuple[float, float]:
    """(relative error, tolerance) of our kernels in float32 on a small ragged case with this group and head size.

    Needs `use_interpreter()`.
    """
    small = Heads(2 * heads.group, 2, heads.head_dim)
    cpu = torch.device("cpu")
    if phase == "prefill":
        case: Case = PrefillCase(small, (3, 37), (20, 37), torch.float32, cpu)
    else:
        case = DecodeCase(small, (1, 17, 70), 16, torch.float32, cpu)
    inputs = case.inputs()
    want = reference(case, inputs)
    ours = [backend for backend in BACKENDS if phase in backend.phases]
    return max(relative_error(b.prepare(case).bind(inputs)(), want) for b in ours), TOLERANCE[case.dtype]


BACKENDS = (TritonKernels(), BalancedTriton())

"""torch's varlen_attn: flash attention over sequences of unequal length, packed side by side.

Its signature differs between versions (2.11 and 2.13 among them), so it is looked at before the call. Decode uses the
packed form too: paged K/V is only in later versions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch

from common.attention_bench.backends.base import Case, CudaBackend, DecodeCase, Prepared, first_tensor


@functools.lru_cache
def _find() -> Callable | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def options(function: Callable, *, causal: bool, grouped: bool) -> dict:
    """The keyword arguments by which this version of `varlen_attn` is told of a causal mask and of grouped heads."""
    known, chosen = inspect.signature(function).parameters, {}
    if causal and "is_causal" in known:
        chosen["is_causal"] = True
    elif causal:
        chosen["window_size"] = (-1, 0)
    if grouped and "enable_gqa" in known:
        chosen["enable_gqa"] = True
    return chosen


class TorchVarlen(CudaBackend):
    name = "torch-varlen"
    paged = False

    def missing(self, device: torch.device) -> str | None:
        if _find() is None:
            return f"torch {torch.__version__} has no varlen_attn: pip install -U torch"
        return super().missing(device)

    def prepare(self, case: Case) -> Prepared:
        varlen_attn = _find()
        decode = isinstance(case, DecodeCase)
        chosen = options(varlen_attn, causal=not decode, grouped=case.heads.group > 1)
        bounds = (case.cu_q, case.cu_kv, 1 if decode else max(case.q_lens), max(case.kv_lens))

        def bind(x):
            q, (k, v) = x.q, x.packed if decode else (x.k, x.v)
            return lambda: first_tensor(varlen_attn(q, k, v, *bounds, **chosen))

        return Prepared(bind)


BACKENDS = (TorchVarlen(),)

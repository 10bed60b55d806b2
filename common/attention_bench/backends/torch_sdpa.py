"""torch's scaled_dot_product_attention, one backend for each of its kernels: flash, cuDNN, efficient, math.

It takes [B, H, S, d] with no pages. `is_causal=True` is aligned top-left, so it is used only where queries and keys are
equally many; other cases get a mask, which flash refuses on CUDA. In decode the query heads that share a K/V head are
laid along the query dimension: every kernel then reads K and V once, whether it knows grouped heads or not.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.attention_bench.backends.base import (
    Backend,
    Call,
    Case,
    DecodeCase,
    DecodeInputs,
    PrefillCase,
    PrefillInputs,
    Prepared,
    Unsupported,
)

_HEADINGS = ("not used because", "not compiled", "been runtime disabled", "No available kernel")


class TorchSDPA(Backend):
    paged = False

    def __init__(self, name: str, kernel: SDPBackend, *, on_cpu: bool, takes_mask: bool = True):
        self.name, self.kernel, self.on_cpu, self.takes_mask = name, kernel, on_cpu, takes_mask

    def missing(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" or self.on_cpu else "needs a CUDA device"

    def unsupported(self, case: Case) -> str | None:
        needs_mask = len(set(case.kv_lens)) > 1 if isinstance(case, DecodeCase) else case.seq_len is None
        if needs_mask and not self.takes_mask and case.device.type == "cuda":
            return "takes no mask: equal lengths only"
        return super().unsupported(case)

    def workspace_bytes(self, case: Case) -> int:
        if self.kernel != SDPBackend.MATH:
            return 0
        q_lens = case.q_lens if isinstance(case, PrefillCase) else (1,) * case.batch
        # Scores, masked scores and probabilities in float32, of all heads at once; K and V repeated for every head.
        scores = 12 * case.heads.num_heads * sum(q * kv for q, kv in zip(q_lens, case.kv_lens))
        return scores + 8 * sum(case.kv_lens) * case.heads.num_heads * case.heads.head_dim

    def prepare(self, case: Case) -> Prepared:
        return Prepared(self._bind_decode if isinstance(case, DecodeCase) else lambda x: self._bind_prefill(case, x))

    def _bind_prefill(self, case: PrefillCase, x: PrefillInputs) -> Call:
        grouped = {"enable_gqa": True} if case.heads.group > 1 else {}
        if case.seq_len is not None:
            q, k, v = (t.view(case.batch, case.seq_len, *t.shape[1:]).transpose(1, 2) for t in (x.q, x.k, x.v))
            return lambda: self._attend(q, k, v, is_causal=True, **grouped).transpose(1, 2)
        pieces = []
        queries, keys, values = x.q.split(case.q_lens), x.k.split(case.kv_lens), x.v.split(case.kv_lens)
        for q, k, v in zip(queries, keys, values):
            seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
            pieces.append([t.transpose(0, 1)[None] for t in (q, k, v)] + [seen])

        def call() -> torch.Tensor:
            parts = [self._attend(q, k, v, attn_mask=seen, **grouped) for q, k, v, seen in pieces]
            return torch.cat([part[0].transpose(0, 1) for part in parts])

        return call

    def _bind_decode(self, x: DecodeInputs) -> Call:
        case = x.case
        k, v = x.padded
        q = x.q.view(case.batch, case.heads.num_kv_heads, case.heads.group, case.heads.head_dim)
        if len(set(case.kv_lens)) == 1:
            return lambda: self._attend(q, k, v)
        mask = case.mask[:, None, None, :].expand(-1, case.heads.num_kv_heads, case.heads.group, -1)
        return lambda: self._attend(q, k, v, attn_mask=mask)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        try:
            with sdpa_kernel(self.kernel):
                return F.scaled_dot_product_attention(q, k, v, **options)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not _is_refusal(error):
                raise
        with warnings.catch_warnings(record=True) as caught:  # asked again, for torch tells its reasons as warnings
            warnings.simplefilter("always")
            try:
                with sdpa_kernel(self.kernel):
                    F.scaled_dot_product_attention(q, k, v, **options)
            except RuntimeError:
                pass
        reasons = [str(warning.message).split(" (Triggered")[0].strip() for warning in caught]
        reasons = [reason for reason in reasons if not any(heading in reason for heading in _HEADINGS)]
        raise Unsupported(reasons[0] if reasons else "torch has no such kernel for this shape")


def _is_refusal(error: RuntimeError) -> bool:
    return any(text in str(error) for text in ("No available kernel", "No viable backend"))


BACKENDS = (
    TorchSDPA("torch-flash", SDPBackend.FLASH_ATTENTION, on_cpu=True, takes_mask=False),
    TorchSDPA("torch-cudnn", SDPBackend.CUDNN_ATTENTION, on_cpu=False),
    TorchSDPA("torch-efficient", SDPBackend.EFFICIENT_ATTENTION, on_cpu=False),
    TorchSDPA("torch-math", SDPBackend.MATH, on_cpu=True),
)

"""FlashInfer: fa2 and fa3 prefill, decode on CUDA cores and on tensor cores.

`plan()` is told every dtype (it takes float16 for q otherwise) and gets its index arrays on the CPU, for it copies them
there anyway. Each case has a wrapper of its own, because a plan lives in the wrapper; the large float workspace is
shared, for calls follow one another on one stream.
"""

from __future__ import annotations

import functools
import importlib.util
from itertools import accumulate

import torch

from common.attention_bench.backends.base import CudaBackend, DecodeCase, PrefillCase, Prepared
from common.errors import first_line

WORKSPACE_BYTES = 256 << 20


@functools.lru_cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class FlashInfer(CudaBackend):
    head_dim_multiple = 16

    def missing(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("flashinfer") is None:
            return "not installed: pip install flashinfer-python"
        reason = super().missing(device)
        if reason:
            return reason
        try:
            import flashinfer  # noqa: F401
        except Exception as error:  # built for another torch or driver: whatever it raises, it is not usable
            return f"cannot be imported ({first_line(error)})"
        return None


class FlashInferPrefill(FlashInfer):
    phases = ("prefill",)

    def __init__(self, kernel: str):
        self.name, self.kernel = f"flashinfer-{kernel}", kernel

    def missing(self, device: torch.device) -> str | None:
        reason = super().missing(device)
        if reason is None and self.kernel == "fa3" and torch.cuda.get_device_capability(device)[0] != 9:
            return "fa3 needs a Hopper card (compute capability 9.0)"
        return reason

    def prepare(self, case: PrefillCase) -> Prepared:
        import flashinfer

        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(case.device), "NHD", backend=self.kernel)
        h = case.heads
        bounds = case.cu_q.cpu(), case.cu_kv.cpu()

        def plan():
            wrapper.plan(
                *bounds, h.num_heads, h.num_kv_heads, h.head_dim, causal=True,
                q_data_type=case.dtype, kv_data_type=case.dtype,
            )  # fmt: skip

        plan()
        return Prepared(lambda x: lambda: wrapper.run(x.q, x.k, x.v), plan)


class FlashInferDecode(FlashInfer):
    phases = ("decode",)

    def __init__(self, cores: str):
        self.name, self.tensor_cores = f"flashinfer-{cores}", cores == "tensor-core"

    def prepare(self, case: DecodeCase) -> Prepared:
        import flashinfer

        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(case.device), "NHD", use_tensor_cores=self.tensor_cores
        )
        h, counts = case.heads, case.pages_per_sequence
        indptr = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        indices = torch.tensor(case.page_ids, dtype=torch.int32)
        last = torch.tensor([(length - 1) % case.page_size + 1 for length in case.kv_lens], dtype=torch.int32)

        def plan():
            wrapper.plan(
                indptr, indices, last, h.num_heads, h.num_kv_heads, h.head_dim, case.page_size,
                q_data_type=case.dtype, kv_data_type=case.dtype,
            )  # fmt: skip

        plan()
        return Prepared(lambda x: lambda: wrapper.run(x.q, x.pages), plan)


BACKENDS = (
    FlashInferPrefill("fa2"),
    FlashInferPrefill("fa3"),
    FlashInferDecode("cuda-core"),
    FlashInferDecode("tensor-core"),
)

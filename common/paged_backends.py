"""Which attention backend reads the pages: chosen in one place, by what is installed, and said.

torch        gathers pages; plain and exact, on every device; the CPU's default
triton       our kernels; on GPUs, and under Triton's interpreter for tests
flashinfer   FlashInfer's wrappers, planned once a step; on GPUs where it is installed
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.attention import Attend
from common.errors import UserError
from common.kv_cache import DistKVPool
from common.llama import Llama
from common.paged_attention import TorchPagedAttend, TritonPagedAttend
from common.paged_batch import DeviceBatch, HostBatch

NAMES = ("torch", "triton", "flashinfer")


@dataclass(frozen=True)
class Backend:
    """A choice and why. head_major: the memory layout it wants of the pool; captures: whether CUDA graphs can hold
    it.
    """

    name: str
    reason: str
    head_major: bool
    captures: bool


def pick_backend(name: str, model: Llama) -> Backend:
    """Resolve "auto", or check that what was asked for can run here. Raises UserError naming what is missing."""
    on_gpu = model.device.type == "cuda"
    has_triton = importlib.util.find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "auto":
        if not on_gpu:
            return Backend("torch", "the device is a CPU", head_major=True, captures=False)
        if has_triton:
            return Backend("triton", "Triton is installed", head_major=False, captures=True)
        return Backend("torch", "Triton is not installed", head_major=True, captures=False)
    reason = f"--backend {name}"
    if name == "torch":
        return Backend(name, reason, head_major=True, captures=False)
    if name == "triton":
        if not has_triton:
            raise UserError("--backend triton: Triton is not installed; pip install triton (Linux)")
        if not on_gpu and not interpreted:
            raise UserError("--backend triton: needs a CUDA device, or TRITON_INTERPRET=1 for its slow interpreter")
        return Backend(name, reason, head_major=False, captures=on_gpu)
    if name == "flashinfer":
        if importlib.util.find_spec("flashinfer") is None:
            raise UserError("--backend flashinfer: it is not installed; pip install flashinfer-python")
        if not on_gpu:
            raise UserError("--backend flashinfer: needs a CUDA device; use --backend torch")
        return Backend(name, reason, head_major=False, captures=False)
    raise UserError(f"--backend {name}: unknown; use auto, {', '.join(NAMES)}")


def make_attend(
    backend: Backend,
    model: Llama,
    pool: DistKVPool,
    host: HostBatch,
    batch: DeviceBatch,
    page_table: torch.Tensor,
    page_lists: Sequence[Sequence[int]],
) -> Attend:
    """The attend of one step. page_lists: each row's page numbers on the host; page_table: all lines on the device."""
    if backend.name == "triton":
        return TritonPagedAttend(model, pool, host.num_decodes, batch, page_table, host)
    if backend.name == "flashinfer":
        from common.flashinfer_attention import FlashInferAttend

        return FlashInferAttend(model, pool, host, batch, page_lists)
    return TorchPagedAttend(model, pool, host, batch, page_lists)

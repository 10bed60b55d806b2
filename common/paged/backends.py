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
from typing import Protocol

import numpy as np
import torch

from common.attention import Attend
from common.errors import UserError
from common.kernels.runtime import runs_triton
from common.kv_cache import DistKVPool
from common.llama import Llama
from common.paged.attention import TorchPagedAttend, TritonPagedAttend
from common.paged.batch import DeviceBatch, HostBatch

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
        if has_triton and runs_triton(model.embed_tokens):
            return Backend("triton", "Triton is installed", head_major=False, captures=True)
        why = "our Triton kernels do not run on this device" if has_triton else "Triton is not installed"
        return Backend("torch", why, head_major=True, captures=False)
    reason = f"--backend {name}"
    if name == "torch":
        return Backend(name, reason, head_major=True, captures=False)
    if name == "triton":
        if not has_triton:
            raise UserError("--backend triton: Triton is not installed; pip install triton (Linux)")
        if not on_gpu and not interpreted:
            raise UserError("--backend triton: needs a CUDA device, or TRITON_INTERPRET=1 for its slow interpreter")
        if on_gpu and not interpreted and not runs_triton(model.embed_tokens):
            raise UserError("--backend triton: our kernels need compute capability 7.5; use --backend torch")
        return Backend(name, reason, head_major=False, captures=on_gpu)
    if name == "flashinfer":
        if importlib.util.find_spec("flashinfer") is None:
            raise UserError("--backend flashinfer: it is not installed; pip install flashinfer-python")
        if not on_gpu:
            raise UserError("--backend flashinfer: needs a CUDA device; use --backend torch")
        _check_flashinfer(model)
        return Backend(name, reason, head_major=False, captures=True)
    raise UserError(f"--backend {name}: unknown; use auto, {', '.join(NAMES)}")


def _check_flashinfer(model: Llama) -> None:
    """UserError for what its kernels are not compiled for."""
    if model.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(model.dtype).removeprefix("torch.")
        raise UserError(f"--backend flashinfer: computes in float16 or bfloat16, not {dtype}; use --backend triton")
    if model.config.head_dim not in (64, 128, 256):
        raise UserError(
            f"--backend flashinfer: head_dim {model.config.head_dim} is not 64, 128 or 256; use --backend triton"
        )


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
        from common.paged.flashinfer import FlashInferAttend

        return FlashInferAttend(model, pool, host, batch, page_table, page_lists)
    return TorchPagedAttend(model, pool, host, batch, page_lists)


class GraphDecode(Protocol):
    """Decodes of one batch size in a CUDA graph."""

    def plan(self, kv_lens: np.ndarray, page_lists: Sequence[Sequence[int]]) -> None:
        """On the host, before the capture and before each replay."""

    def attend(self, batch: DeviceBatch) -> Attend:
        """The attend to capture; the tensors of `batch` are static."""


class TritonGraphDecode:
    """Our kernels read lengths and pages on the device: there is nothing to plan."""

    def __init__(self, model: Llama, pool: DistKVPool, page_table: torch.Tensor, size: int) -> None:
        self._model, self._pool, self._page_table, self._size = model, pool, page_table, size

    def plan(self, kv_lens: np.ndarray, page_lists: Sequence[Sequence[int]]) -> None:
        pass

    def attend(self, batch: DeviceBatch) -> Attend:
        return TritonPagedAttend(self._model, self._pool, self._size, batch, self._page_table)


def make_graph_decode(
    backend: Backend, model: Llama, pool: DistKVPool, page_table: torch.Tensor, size: int
) -> GraphDecode:
    """What a CUDA graph of `size` decodes is made of; only for backends that capture."""
    if backend.name == "flashinfer":
        from common.paged.flashinfer import FlashInferGraphDecode

        return FlashInferGraphDecode(model, pool, page_table, size)
    return TritonGraphDecode(model, pool, page_table, size)


def reserve_memory(backend: Backend, device: torch.device) -> None:
    """Take what a backend keeps for itself, so that it is not counted as free for pages."""
    if backend.name == "flashinfer":
        from common.paged.flashinfer import workspace

        workspace(device)

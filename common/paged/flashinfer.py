"""Attention over KV pages by FlashInfer: its decode wrapper for the rows that decode, its prefill wrapper for pieces.

A wrapper is planned once a step, on the host, for all layers: it divides the work over the device from the lengths.
The plan goes to the device through a pinned buffer that the wrapper owns, so a wrapper is planned again only when that
copy has been made. Steps overlap by one, so two wrappers used in turn hardly ever wait; those of CUDA graphs, one a
batch size, wait for their own last copy.

FlashInfer 0.6: `plan` reads index arrays on the host (CPU tensors, else it copies them back and waits) and takes
queries to be float16 unless told. Keys have no rotary embedding yet when they are asked for: we rotate and append.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from common.attention import Attend, rotary_table
from common.config import ModelConfig
from common.kernels.rope_append import rope_append
from common.kv_cache import DistKVPool
from common.llama import Llama
from common.paged.batch import DeviceBatch, HostBatch, kv_metadata

# For partial results of contexts that are split; 128 MB are recommended, large batches of many heads need more.
WORKSPACE_BYTES = 384 << 20
TENSOR_CORE_GROUP = 3  # query heads a KV head from which on decoding pays to use tensor cores

_workspaces: dict[torch.device, torch.Tensor] = {}
_turns: dict[torch.device, list[_Turn]] = {}


def workspace(device: torch.device) -> torch.Tensor:
    """The scratch memory of all wrappers of a device: they run one after another. Zero-filled, as FlashInfer asks."""
    if device not in _workspaces:
        _workspaces[device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return _workspaces[device]


class _Planned:
    """A wrapper that is planned again only after the copy of its last plan."""

    def __init__(self, wrapper: object) -> None:
        self.run = wrapper.run
        self._plan = wrapper.plan
        self._copied: torch.cuda.Event | None = None

    def plan(self, *arrays: torch.Tensor, shape: Sequence[int], **options: object) -> None:
        if self._copied is None:
            self._copied = torch.cuda.Event()
        else:
            self._copied.synchronize()
        self._plan(*arrays, *shape, **options)
        self._copied.record()


class _Turn:
    """The wrappers of one step."""

    def __init__(self, device: torch.device, use_tensor_cores: bool) -> None:
        import flashinfer

        memory = workspace(device)
        self.use_tensor_cores = use_tensor_cores
        self.decode = _Planned(
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(memory, "NHD", use_tensor_cores=use_tensor_cores)
        )
        self.prefill = _Planned(flashinfer.BatchPrefillWithPagedKVCacheWrapper(memory, "NHD"))


def _next_turn(device: torch.device, use_tensor_cores: bool) -> _Turn:
    turns = _turns.setdefault(device, [])
    if len(turns) < 2:
        turns.append(_Turn(device, use_tensor_cores))
        return turns[-1]
    turns.reverse()
    if turns[-1].use_tensor_cores != use_tensor_cores:  # another model, with other head counts
        turns[-1] = _Turn(device, use_tensor_cores)
    return turns[-1]


def _uses_tensor_cores(config: ModelConfig) -> bool:
    return config.num_attention_heads // config.num_key_value_heads >= TENSOR_CORE_GROUP


def _shape(config: ModelConfig, page_size: int) -> tuple[int, int, int, int]:
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim, page_size


class FlashInferAttend(Attend):
    """One step: D decodes first, then pieces of prompts.

    page_lists: each row's page numbers on the host; page_table: int32 [slots, max_pages] on the device.
    """

    def __init__(
        self,
        model: Llama,
        pool: DistKVPool,
        host: HostBatch,
        batch: DeviceBatch,
        page_table: torch.Tensor,
        page_lists: Sequence[Sequence[int]],
        decode: _Planned | None = None,
    ) -> None:
        self.config, self.pool, self.batch, self.page_table = model.config, pool, batch, page_table
        self.table = rotary_table(model.config, model.device)
        self.num_decodes = n = len(batch.slots) if decode is not None else host.num_decodes
        self.decode, self.prefill = decode, None
        if decode is not None:  # in a graph: planned before each replay
            return
        types = {"q_data_type": model.dtype, "kv_data_type": model.dtype}
        shape = _shape(model.config, pool.page_size)
        turn = _next_turn(model.device, _uses_tensor_cores(model.config))
        if n:
            m = kv_metadata(page_lists[:n], host.kv_lens[:n], host.query_lens[:n], pool.page_size, model.device)
            self.decode = turn.decode
            self.decode.plan(m["kv_indptr"], m["kv_indices"], m["kv_last_page_len"], shape=shape, **types)
        if len(host.slots) > n:
            m = kv_metadata(page_lists[n:], host.kv_lens[n:], host.query_lens[n:], pool.page_size, model.device)
            arrays = (m["qo_indptr"], m["kv_indptr"], m["kv_indices"], m["kv_last_page_len"])
            self.prefill = turn.prefill
            self.prefill.plan(*arrays, shape=shape, causal=True, **types)

    def append(self, layer: int, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotate q and k of `qkv` in place and put k and v into their pages; views of q, k, v."""
        slots, positions, table = self.batch.token_slots, self.batch.positions, self.table
        pages, num_heads = self.pool.layers[layer], self.config.num_attention_heads
        return rope_append(qkv, pages, self.page_table, slots, positions, table.cos, table.sin, num_heads)

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        q, _, _ = self.append(layer, qkv)
        n, pages, outputs = self.num_decodes, self.pool.layers[layer], []
        if n:
            outputs.append(self.decode.run(q[:n], pages))
        if len(q) > n:
            outputs.append(self.prefill.run(q[n:], pages))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out.view(len(qkv), self.config.q_size)


class FlashInferGraphDecode:
    """Decodes of one batch size inside a CUDA graph: `attend` is captured, `plan` is called before each replay.

    The graph reads the index arrays from buffers that `plan` fills, stream-ordered behind the step before.
    """

    def __init__(self, model: Llama, pool: DistKVPool, page_table: torch.Tensor, size: int) -> None:
        import flashinfer

        self._model, self._pool, self._page_table = model, pool, page_table
        device = model.device

        def buffer(length: int) -> torch.Tensor:
            return torch.zeros(length, dtype=torch.int32, device=device)

        self._decode = _Planned(
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace(device),
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=_uses_tensor_cores(model.config),
                paged_kv_indptr_buffer=buffer(size + 1),
                # Every page of the pool, and the scratch page once for each row of padding.
                paged_kv_indices_buffer=buffer(pool.capacity + size),
                paged_kv_last_page_len_buffer=buffer(size),
            )
        )

    def plan(self, kv_lens: np.ndarray, page_lists: Sequence[Sequence[int]]) -> None:
        """Before a replay: `kv_lens` [size] and the pages of each row."""
        model, page_size = self._model, self._pool.page_size
        m = kv_metadata(page_lists, kv_lens, np.ones_like(kv_lens), page_size, model.device)
        types = {"q_data_type": model.dtype, "kv_data_type": model.dtype}
        arrays = (m["kv_indptr"], m["kv_indices"], m["kv_last_page_len"])
        self._decode.plan(*arrays, shape=_shape(model.config, page_size), **types)

    def attend(self, batch: DeviceBatch) -> FlashInferAttend:
        return FlashInferAttend(self._model, self._pool, None, batch, self._page_table, (), self._decode)

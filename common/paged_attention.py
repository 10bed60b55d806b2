"""Attention over KV pages, plain and in Triton: two interchangeable attends for any mixture of pieces and decodes.

    TorchPagedAttend    gathers each row's pages, then attends as over contiguous memory: plain and exact
    TritonPagedAttend   our kernels read the pages where they lie (common/kernels/paged_decode.py, paged_prefill.py)

Both store the new tokens' K and V into the pages first. The FlashInfer attend is in common/flashinfer_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from common.attention import Attend, causal_attention, decode_attention, rotary_table
from common.kv_cache import DistKVPool
from common.llama import Llama
from common.paged_batch import DeviceBatch, HostBatch


class TorchPagedAttend(Attend):
    """Gathers pages into contiguous memory, one gather a layer for all decodes, and attends with torch.

    page_lists: each row's page numbers, as many as hold its `kv_lens` tokens.
    """

    def __init__(
        self, model: Llama, pool: DistKVPool, host: HostBatch, batch: DeviceBatch, page_lists: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(model, batch.positions)
        self.pool, self.host = pool, host
        self.lists = [np.asarray(pages, dtype=np.int64) for pages in page_lists]
        page_of_token = np.concatenate(
            [
                pages[np.arange(start, start + length) // pool.page_size]
                for pages, start, length in zip(self.lists, host.starts, host.query_lens)
            ]
        )
        self.pages = torch.from_numpy(page_of_token).to(model.device)
        self.offsets = (batch.positions % pool.page_size).long()
        self.runs = _runs_of_equal(host.kv_lens[: host.num_decodes].tolist())
        self.decode_blocks = self._blocks(self.lists[: host.num_decodes])

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        storage = self.pool.layers[layer]
        storage[self.pages, 0, self.offsets] = k
        storage[self.pages, 1, self.offsets] = v

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outputs = []
        if self.host.num_decodes:
            outputs.append(self._decodes(layer, q[: self.host.num_decodes]))
        start = self.host.num_decodes
        for row in range(self.host.num_decodes, len(self.host.slots)):
            tokens = slice(start, start + int(self.host.query_lens[row]))
            if self.host.starts[row] == 0:  # nothing in the pages yet: the new K and V are all there is
                outputs.append(causal_attention(*(t[tokens].unsqueeze(0) for t in (q, k, v))))
            else:
                outputs.append(self._piece(layer, row, q[tokens]))
            start = tokens.stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decodes(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """[D, Hq, d] -> [D, Hq, d]; rows of one length go as a batch, none is padded."""
        gathered = self._gather(layer, self.decode_blocks)
        outputs, first, begin = [], 0, 0
        for length, count in self.runs:
            num_pages = len(self.lists[first])
            end = begin + count * num_pages * 2 * self.config.num_key_value_heads
            kv = self._as_heads(gathered[begin:end], count, num_pages)[..., :length, :]
            outputs.append(decode_attention(q[first : first + count], kv[:, 0], kv[:, 1]))
            first, begin = first + count, end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _piece(self, layer: int, row: int, q: torch.Tensor) -> torch.Tensor:
        """A piece of a prompt [T_row, Hq, d] over what its pages hold, causal and aligned at the end."""
        gathered = self._gather(layer, self._blocks([self.lists[row]]))
        length = int(self.host.kv_lens[row])
        kv = self._as_heads(gathered, 1, len(self.lists[row]))[..., :length, :]  # [1, 2, Hkv, length, d]
        visible = torch.ones(len(q), length, dtype=torch.bool, device=q.device).tril(length - len(q))
        heads = q.transpose(0, 1).unsqueeze(0)
        out = F.scaled_dot_product_attention(heads, kv[:, 0], kv[:, 1], attn_mask=visible, enable_gqa=True)
        return out[0].transpose(0, 1)

    def _blocks(self, lists: Sequence[np.ndarray]) -> torch.Tensor:
        """Where each row's (K or V, head, page) blocks are in the pool's memory, in that order, row after row."""
        kv_heads = np.arange(2 * self.config.num_key_value_heads)[:, None]
        rows = [(pages[None, :] * len(kv_heads) + kv_heads).ravel() for pages in lists]
        return torch.from_numpy(np.concatenate(rows) if rows else np.empty(0, np.int64)).to(self.positions.device)

    def _gather(self, layer: int, blocks: torch.Tensor) -> torch.Tensor:
        """[number of blocks, page_size * d], into memory that is used again: fresh pages of a process are slow to
        touch.
        """
        stored = self.pool.layers[layer].transpose(2, 3)  # head-major: a head's tokens of a page are one block
        source = stored.flatten(0, 2).flatten(1)
        out = _scratch(len(blocks) * source.shape[1], source)
        return torch.index_select(source, 0, blocks, out=out.view(len(blocks), -1))

    def _as_heads(self, blocks: torch.Tensor, count: int, num_pages: int) -> torch.Tensor:
        """Gathered blocks of `count` rows -> [count, 2, Hkv, num_pages * page_size, d], without a copy."""
        c = self.config
        return blocks.view(count, 2, c.num_key_value_heads, num_pages * self.pool.page_size, c.head_dim)


_scratch_memory: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def _scratch(count: int, like: torch.Tensor) -> torch.Tensor:
    """`count` elements of memory for one layer's gather; the next layer's gather overwrites it."""
    key = (like.device, like.dtype)
    held = _scratch_memory.get(key)
    if held is None or len(held) < count:
        held = _scratch_memory[key] = torch.empty(count + count // 4, dtype=like.dtype, device=like.device)
    return held[:count]


def _runs_of_equal(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours of equal length, as (length, how many)."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


class TritonPagedAttend(Attend):
    """Our kernels: RoPE and appending fused, decode split over the context, prefill over packed rows and pages.

    It launches and never reads anything on the host, so a decode step can be captured in a CUDA graph.
    page_table: int32 [slots, max_pages] on the device; `batch` gives each row's line in it.
    """

    def __init__(
        self, model: Llama, pool: DistKVPool, num_decodes: int, batch: DeviceBatch, page_table: torch.Tensor
    ) -> None:
        self.config, self.pool, self.num_decodes, self.batch = model.config, pool, num_decodes, batch
        self.table = rotary_table(model.config, model.device)
        self.page_table = page_table
        self.rows_table = page_table.index_select(0, batch.slots)  # [R, max_pages], the rows' own lines in their order
        self.prefill_indptr = batch.q_indptr[num_decodes:] - num_decodes

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        from common.kernels.paged_decode import rope_append_decode_triton
        from common.kernels.paged_prefill import paged_prefill_triton
        from common.kernels.rope_append import rope_append_triton

        c, n, pages = self.config, self.num_decodes, self.pool.layers[layer]
        cos, sin = self.table.cos, self.table.sin
        outputs = []
        if n:
            outputs.append(
                rope_append_decode_triton(
                    qkv[:n], pages, self.rows_table[:n], self.batch.kv_lens[:n], cos, sin, c.num_attention_heads
                ).view(n, c.q_size)
            )
        if len(qkv) > n:
            slots, positions = self.batch.token_slots[n:], self.batch.positions[n:]
            q, k, v = rope_append_triton(
                qkv[n:], pages, self.page_table, slots, positions, cos, sin, c.num_attention_heads
            )
            out = paged_prefill_triton(q, k, v, pages, self.rows_table[n:], self.prefill_indptr, self.batch.kv_lens[n:])
            outputs.append(out.reshape(-1, c.q_size))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

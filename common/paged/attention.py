"""Attention over KV pages, plain and in Triton: two interchangeable attends for any mixture of pieces and decodes.

    TorchPagedAttend    gathers each row's pages, then attends as over contiguous memory: plain and exact
    TritonPagedAttend   our kernels read the pages where they lie (common/kernels/paged_decode.py, paged_prefill.py);
                        large batches of equal whole prompts take cuDNN's attention, which is faster there

Both store the new tokens' K and V into the pages first. The FlashInfer attend is in common/paged/flashinfer.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.attention import Attend, causal_attention, decode_attention, rotary_table
from common.kv_cache import DistKVPool
from common.llama import Llama
from common.paged.batch import DeviceBatch, HostBatch
from common.paged.groups import group_by_length

# Prompt tokens in a step from which cuDNN's attention pays for its slower launch: measured on an H200, 1,024 tokens
# lose 20 % of the whole prefill (the GPU waits for the CPU), 4,096 gain 2 %, 16,384 gain 1.5 %.
CUDNN_TOKENS = 4096


# Decodes are gathered and attended over this much at a time: on a CPU what is gathered is then read from its cache.
GATHER_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}

# A row is padded by at most this much K and V to go along with longer ones: what gathering and attending costs in the
# time of a call of its own (docs/performance.md). Measured on a CPU only; on a GPU nothing is padded.
PADDING_BYTES = {"cpu": 256 << 10, "cuda": 0}


class DecodeGroup(NamedTuple):
    """Decodes that are gathered and attended to together, all as long as the longest of them."""

    rows: torch.Tensor | slice  # their places among the step's decodes
    count: int
    length: int
    num_pages: int
    blocks: torch.Tensor  # where their pages lie, see `_blocks`; a shorter row ends in pages that only fill it up
    padding: torch.Tensor | None  # gathered [d] vectors behind a row's own tokens; None where nothing is padded
    mask: torch.Tensor | None  # [count, 1, 1, length], added to the scores: 0, and -inf on the padding


class TorchPagedAttend(Attend):
    """Gathers pages into contiguous memory and attends with torch.

    `_piece` is the plain form of it: one row, its pages, a causal mask. A decode is a piece of one token, but ten calls
    of a tenth of the work are slower than one, so decodes of about one length go together (`_decodes`).

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
        self.groups = self._decode_groups()

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
        """[D, Hq, d] -> [D, Hq, d]: for each row what `_piece` gives it alone."""
        out = torch.empty_like(q)
        for group in self.groups:
            gathered = self._gather(layer, group.blocks)
            if group.padding is not None:  # the mask is not enough: what lies there may be NaN, and 0 x NaN is NaN
                gathered.view(-1, self.config.head_dim).index_fill_(0, group.padding, 0)
            kv = self._as_heads(gathered, group.count, group.num_pages)[..., : group.length, :]
            out[group.rows] = decode_attention(q[group.rows], kv[:, 0], kv[:, 1], group.mask)
        return out

    def _decode_groups(self) -> list[DecodeGroup]:
        """The step's decodes in groups: the same for every layer, so made once."""
        lengths = self.host.kv_lens[: self.host.num_decodes].tolist()
        token_bytes = 2 * self.config.kv_size * self.pool.layers[0].element_size()
        device = self.pool.device.type
        most_padding, most_tokens = PADDING_BYTES[device] // token_bytes, GATHER_BYTES[device] // token_bytes
        groups = group_by_length(lengths, most_padding, most_tokens)
        return [self._decode_group(rows, [lengths[row] for row in rows]) for rows in groups]

    def _decode_group(self, rows: list[int], lengths: list[int]) -> DecodeGroup:
        """`rows`, the longest first."""
        device, count, length, num_pages = self.positions.device, len(rows), lengths[0], len(self.lists[rows[0]])
        lists = [np.resize(self.lists[row], num_pages) for row in rows]  # filled up with the row's own pages again
        padding = mask = None
        if lengths[-1] < length:
            hidden = np.arange(num_pages * self.pool.page_size) >= np.array(lengths)[:, None]  # [count, slots]
            heads = (count, 2 * self.config.num_key_value_heads, hidden.shape[1])  # the order of `_blocks`
            padding = torch.from_numpy(np.broadcast_to(hidden[:, None], heads).ravel().nonzero()[0]).to(device)
            mask = torch.zeros(count, 1, 1, length, dtype=self.pool.layers[0].dtype, device=device)
            mask.masked_fill_(torch.from_numpy(hidden[:, None, None, :length]).to(device), -torch.inf)
        rows_of_q = slice(rows[0], rows[-1] + 1)
        if rows != list(range(rows[0], rows[-1] + 1)):
            rows_of_q = torch.tensor(rows, device=device)
        return DecodeGroup(rows_of_q, count, length, num_pages, self._blocks(lists), padding, mask)

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
        with torch.inference_mode(False):  # it outlives the mode it is made in, and must be writable in either
            held = torch.empty(count + count // 4, dtype=like.dtype, device=like.device)
        _scratch_memory[key] = held
    return held[:count]


class TritonPagedAttend(Attend):
    """Our kernels: RoPE and appending fused, decode split over the context, prefill over packed rows and pages.

    It launches and never reads anything on the host, so a decode step can be captured in a CUDA graph.
    page_table: int32 [slots, max_pages] on the device; `batch` gives each row's line in it. host: the arrays of `batch`
    on the host, where the step runs eagerly: they tell whether cuDNN's attention may take the prompts.
    """

    def __init__(
        self,
        model: Llama,
        pool: DistKVPool,
        num_decodes: int,
        batch: DeviceBatch,
        page_table: torch.Tensor,
        host: HostBatch | None = None,
    ) -> None:
        self.config, self.pool, self.num_decodes, self.batch = model.config, pool, num_decodes, batch
        self.table = rotary_table(model.config, model.device)
        self.page_table = page_table
        self.rows_table = page_table.index_select(0, batch.slots)  # [R, max_pages], the rows' own lines in their order
        self.prefill_indptr = batch.q_indptr[num_decodes:] - num_decodes
        self.has_context = host is None or bool(host.starts[num_decodes:].any())
        self.cudnn_shape = _cudnn_shape(model, host) if host is not None else None

    def append(self, layer: int, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotate q and k of `qkv` in place and put k and v into their pages; views of q, k, v. Decodes do this inside
        their attention kernel; alone it is what a breakdown of a step times.
        """
        from common.kernels.rope_append import rope_append_triton

        slots, positions, num_heads = self.batch.token_slots, self.batch.positions, self.config.num_attention_heads
        pages, cos, sin = self.pool.layers[layer], self.table.cos, self.table.sin
        return rope_append_triton(qkv, pages, self.page_table, slots, positions, cos, sin, num_heads)

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        from common.kernels.paged_decode import rope_append_decode_triton
        from common.kernels.paged_prefill import paged_prefill_triton
        from common.kernels.rope_append import rope_append_triton

        c, n, pages = self.config, self.num_decodes, self.pool.layers[layer]
        cos, sin = self.table.cos, self.table.sin
        outputs = []
        if n:
            outputs.append(
                # early: the table and the lengths were there before this layer's product began
                rope_append_decode_triton(
                    qkv[:n],
                    pages,
                    self.rows_table[:n],
                    self.batch.kv_lens[:n],
                    cos,
                    sin,
                    c.num_attention_heads,
                    early=True,
                ).view(n, c.q_size)
            )
        if len(qkv) > n:
            slots, positions = self.batch.token_slots[n:], self.batch.positions[n:]
            q, k, v = rope_append_triton(
                qkv[n:], pages, self.page_table, slots, positions, cos, sin, c.num_attention_heads
            )
            if self.cudnn_shape is not None:
                out = cudnn_causal_attention(*(t.unflatten(0, self.cudnn_shape) for t in (q, k, v)))
            else:
                table, kv_lens = self.rows_table[n:], self.batch.kv_lens[n:]
                indptr, context = self.prefill_indptr, self.has_context  # without context it has more registers
                out = paged_prefill_triton(q, k, v, pages, table, indptr, kv_lens, context=context)
            outputs.append(out.reshape(-1, c.q_size))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _cudnn_shape(model: Llama, host: HostBatch) -> tuple[int, int] | None:
    """(number, length) of a step's prompts where cuDNN takes them: whole, equally long, and together long enough."""
    n = host.num_decodes
    lengths = host.query_lens[n:]
    if lengths.sum() < CUDNN_TOKENS or host.starts[n:].any() or (lengths != lengths[0]).any():
        return None
    c = model.config
    if not _cudnn_runs(model.device, model.dtype, c.num_attention_heads, c.num_key_value_heads, c.head_dim):
        return None
    return len(lengths), int(lengths[0])


def cudnn_causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B, S, Hq, d], k, v [B, S, Hkv, d] -> [B * S, Hq, d] by cuDNN. RuntimeError where it does not support them."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


@functools.lru_cache
def _cudnn_runs(device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Tried once: what cuDNN supports depends on its version and the device."""
    q, k = (torch.zeros(1, 128, heads, head_dim, device=device, dtype=dtype) for heads in (num_heads, num_kv_heads))
    try:
        cudnn_causal_attention(q, k, k)
    except RuntimeError:
        return False
    return True

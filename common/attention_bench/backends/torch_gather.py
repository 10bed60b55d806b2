"""Paged decode with torch alone: copy the pages of each sequence together, then attend to the copy.

What one writes without a kernel that knows pages. It reads K and V, writes them and reads them again, so it can reach a
third of the memory's speed at best; the kernels that walk the page table themselves are there to save that. It is the
one implementation with pages that a CPU can be timed with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.attention_bench.backends.base import Backend, DecodeCase, Prepared


class TorchGather(Backend):
    name = "torch-gather"
    phases = ("decode",)

    def prepare(self, case: DecodeCase) -> Prepared:
        h, slots = case.heads, case.page_table.shape[1] * case.page_size
        position = torch.arange(slots, device=case.device)
        mask = None
        if any(length != slots for length in case.kv_lens):  # empty slots of last pages, and shorter sequences
            mask = (position[None, :] < case.lengths[:, None])[:, None, None, :]
            mask = mask.expand(-1, h.num_kv_heads, h.group, -1)
        table = case.page_table.long()

        def bind(x):
            q = x.q.view(case.batch, h.num_kv_heads, h.group, h.head_dim)

            def call() -> torch.Tensor:
                gathered = x.pages[table].transpose(1, 2)  # [B, 2, pages, page_size, Hkv, d]
                k, v = gathered.reshape(case.batch, 2, slots, h.num_kv_heads, h.head_dim).transpose(2, 3).unbind(1)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            return call

        return Prepared(bind)


BACKENDS = (TorchGather(),)

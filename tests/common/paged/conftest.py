"""FlashInfer without a GPU: a stand-in for its wrappers, that the tests of this folder can ask for."""

import sys
from types import SimpleNamespace

import pytest
import torch


class StandIn:
    """FlashInfer's two wrappers as far as they are used: `plan` has their signatures (0.6.13) and keeps the arrays,
    `run` reads K and V by them, as FlashInfer documents the arrays. tests/gpu has the real ones.
    """

    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False, **buffers
    ):
        assert kv_layout == "NHD" and not float_workspace_buffer.any()
        self.buffers = buffers if use_cuda_graph else None

    def _keep(self, qo_indptr, indptr, indices, last_page_len, shape, page_size, causal, dtype, q_type):
        assert all(t.dtype == torch.int32 for t in (qo_indptr, indptr, indices, last_page_len)) and q_type == dtype
        if self.buffers is not None:
            assert len(last_page_len) == len(self.buffers["paged_kv_last_page_len_buffer"])
            assert len(indices) <= len(self.buffers["paged_kv_indices_buffer"])
        self.arrays = [t.tolist() for t in (qo_indptr, indptr, indices, last_page_len)]
        self.shape, self.page_size, self.causal = shape, page_size, causal

    def run(self, q, paged_kv_cache):
        num_heads, num_kv_heads, head_dim = self.shape
        assert q.shape[1:] == (num_heads, head_dim) and paged_kv_cache.shape[1:] == (
            2, self.page_size, num_kv_heads, head_dim,
        )  # fmt: skip
        qo_indptr, indptr, indices, last = self.arrays
        assert len(q) == qo_indptr[-1]
        out = torch.empty_like(q)
        for row in range(len(last)):
            pages = indices[indptr[row] : indptr[row + 1]]
            length = (len(pages) - 1) * self.page_size + last[row]
            k, v = paged_kv_cache[pages].double().transpose(0, 1).reshape(2, -1, num_kv_heads, head_dim)[:, :length]
            k, v = (t.repeat_interleave(num_heads // num_kv_heads, 1) for t in (k, v))
            mine = slice(qo_indptr[row], qo_indptr[row + 1])
            scores = torch.einsum("thd,shd->hts", q[mine].double(), k) / head_dim**0.5
            if self.causal:
                count = mine.stop - mine.start
                seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
                scores = scores.masked_fill(~seen, -torch.inf)
            out[mine] = torch.einsum("hts,shd->thd", scores.softmax(-1), v).to(q.dtype)
        return out


class StandInDecode(StandIn):
    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        qo_indptr = torch.arange(len(indptr), dtype=torch.int32)
        shape = (num_qo_heads, num_kv_heads, head_dim)
        self._keep(qo_indptr, indptr, indices, last_page_len, shape, page_size, False, kv_data_type, q_data_type)


class StandInPrefill(StandIn):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        shape = (num_qo_heads, num_kv_heads, head_dim_qk)
        arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._keep(*arrays, shape, page_size, causal, kv_data_type, q_data_type)


class Event:
    """Where a real event would wait, it is counted: a wrapper must not be planned again before its copy was made."""

    waits = 0

    def record(self):
        pass

    def synchronize(self):
        Event.waits += 1


@pytest.fixture
def flashinfer_stand_in(monkeypatch):
    from common.paged import flashinfer as flashinfer_attention

    names = {"BatchDecodeWithPagedKVCacheWrapper": StandInDecode, "BatchPrefillWithPagedKVCacheWrapper": StandInPrefill}
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(**names))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(flashinfer_attention, "WORKSPACE_BYTES", 64)
    monkeypatch.setattr(flashinfer_attention, "_workspaces", {})
    monkeypatch.setattr(flashinfer_attention, "_turns", {})
    return flashinfer_attention

"""The index arrays of one step over paged KV: which tokens, at which positions, in whose pages.

A step is a list of chunks, decodes first, then pieces of prompts; each chunk is one row of the arrays. Everything is
computed on the host with numpy, O(rows) in Python, and sent to the device as one copy.

R rows, D of them decodes; T packed tokens; S rows whose next token is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from common.serving import Chunk, Request


@dataclass(frozen=True)
class HostBatch:
    """The arrays of a step on the host, int32."""

    num_decodes: int
    slots: np.ndarray  # [R] each row's line of the page table
    starts: np.ndarray  # [R] tokens in the pages before this step
    query_lens: np.ndarray  # [R]
    positions: np.ndarray  # [T]
    token_slots: np.ndarray  # [T]
    prompt_tokens: np.ndarray  # [T - D] ids of the pieces; a decode's id is on the device already
    sampled_rows: np.ndarray  # [S]
    last_tokens: np.ndarray  # [S] index of each sampled row's last packed token

    @property
    def kv_lens(self) -> np.ndarray:
        """[R] tokens that each row's last token attends over."""
        return self.starts + self.query_lens

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @classmethod
    def of(cls, chunks: Sequence[Chunk], slots: Sequence[int]) -> HostBatch:
        """`slots`: the page table's line of each chunk's request. ValueError if a decode stands behind a piece."""
        decodes = [chunk.is_decode for chunk in chunks]
        num_decodes = sum(decodes)
        if any(decodes[num_decodes:]):
            raise ValueError("decodes come first in a step, then pieces of prompts")
        table = np.array([(start, length) for _, start, length in chunks], dtype=np.int32)
        starts, query_lens = table[:, 0], table[:, 1]
        ends = query_lens.cumsum(dtype=np.int32)
        within = np.arange(ends[-1], dtype=np.int32) - np.repeat(ends - query_lens, query_lens)
        slots_array = np.array(slots, dtype=np.int32)
        pieces = [r.tokens[start : start + length] for r, start, length in chunks[num_decodes:]]
        sampled = np.array([chunk.samples for chunk in chunks], dtype=bool).nonzero()[0].astype(np.int32)
        return cls(
            num_decodes=num_decodes,
            slots=slots_array,
            starts=starts,
            query_lens=query_lens,
            positions=np.repeat(starts, query_lens) + within,
            token_slots=np.repeat(slots_array, query_lens),
            prompt_tokens=np.array([token for piece in pieces for token in piece], dtype=np.int32),
            sampled_rows=sampled,
            last_tokens=ends[sampled] - 1,
        )


@dataclass(frozen=True)
class DeviceBatch:
    """The same arrays on the device, int32 views of one buffer; `q_indptr` [R + 1] bounds each row's packed tokens."""

    slots: torch.Tensor
    kv_lens: torch.Tensor
    q_indptr: torch.Tensor
    positions: torch.Tensor
    token_slots: torch.Tensor
    prompt_tokens: torch.Tensor
    sampled_rows: torch.Tensor
    last_tokens: torch.Tensor

    @classmethod
    def of(
        cls, host: HostBatch, upload: Upload, more: Sequence[np.ndarray] = ()
    ) -> tuple[DeviceBatch, list[torch.Tensor]]:
        """Send the arrays, and `more` arrays with them; returns both on the device."""
        q_indptr = np.cumsum([0, *host.query_lens], dtype=np.int32)
        arrays = [q_indptr if f.name == "q_indptr" else getattr(host, f.name) for f in fields(cls)]
        sent = upload.send([*arrays, *more])
        return cls(*sent[: len(arrays)]), sent[len(arrays) :]


class Upload:
    """Sends int32 arrays to a device as one copy that the host does not wait for.

    Pinned staging buffers are used in turn, and one is filled again only after its last copy has been made.
    """

    def __init__(self, device: torch.device, depth: int = 3) -> None:
        self.device = device
        self._staging: list[torch.Tensor | None] = [None] * depth
        self._copied: list[torch.cuda.Event | None] = [None] * depth
        self._turn = 0

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Device tensors of the same lengths, int32."""
        sizes = [len(array) for array in arrays]
        if self.device.type == "cpu":
            return [torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)) for array in arrays]
        i, self._turn = self._turn, (self._turn + 1) % len(self._staging)
        total = sum(sizes)
        staging = self._staging[i]
        if staging is None or len(staging) < total:
            staging = torch.empty(max(2 * total, 4096), dtype=torch.int32, pin_memory=True)
            self._staging[i] = staging
        elif (copied := self._copied[i]) is not None:
            copied.synchronize()
        host = staging.numpy()
        np.concatenate([np.asarray(array, dtype=np.int32) for array in arrays], out=host[:total])
        on_device = staging[:total].to(self.device, non_blocking=True)
        event = self._copied[i] = self._copied[i] or torch.cuda.Event()
        event.record()
        return list(on_device.split(sizes))


def build_kv_metadata(requests: Sequence[Request], query_lens: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """FlashInfer's description of a ragged batch over pages, int32 on the host.

    qo_indptr [R + 1] bounds each request's queries (all its tokens unless `query_lens` says fewer), kv_indptr [R + 1]
    its pages in kv_indices, kv_last_page_len [R] the tokens in its last page.
    """
    caches = [request.pages for request in requests]
    queries = [cache.seqlen for cache in caches] if query_lens is None else list(query_lens)
    indices = np.concatenate([np.asarray(cache.indices, dtype=np.int32) for cache in caches]) if caches else []
    return {
        "qo_indptr": np.cumsum([0, *queries], dtype=np.int32),
        "kv_indptr": np.cumsum([0, *(len(cache.indices) for cache in caches)], dtype=np.int32),
        "kv_indices": np.asarray(indices, dtype=np.int32),
        "kv_last_page_len": np.array([cache.last_page_offset for cache in caches], dtype=np.int32),
    }

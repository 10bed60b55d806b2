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
    all_sample: bool  # no row is a piece of a prompt that goes on
    slots: np.ndarray  # [R] each row's line of the page table
    starts: np.ndarray  # [R] tokens in the pages before this step
    query_lens: np.ndarray  # [R]
    q_indptr: np.ndarray  # [R + 1] bounds each row's packed tokens
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
        # Column by column: numpy takes a list of ints ten times as fast as a list of tuples, and a step waits for this.
        requests, starts_list, lengths_list = zip(*chunks)
        starts, query_lens = np.array(starts_list, np.int32), np.array(lengths_list, np.int32)
        prefills = np.array([request.num_prefill for request in requests], np.int32)
        is_decode, samples = starts >= prefills, starts + query_lens >= prefills  # Chunk.is_decode and .samples
        num_decodes = int(np.count_nonzero(is_decode))
        if not is_decode[:num_decodes].all():
            raise ValueError("decodes come first in a step, then pieces of prompts")
        q_indptr = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(query_lens, out=q_indptr[1:])
        slots_array = np.array(slots, np.int32)
        pieces = [np.array(r.tokens[start : start + length], np.int32) for r, start, length in chunks[num_decodes:]]
        sampled = samples.nonzero()[0].astype(np.int32)
        return cls(
            num_decodes=num_decodes,
            all_sample=len(sampled) == len(chunks),
            slots=slots_array,
            starts=starts,
            query_lens=query_lens,
            q_indptr=q_indptr,
            # A token's position is its index in the step, moved by where its row starts.
            positions=np.arange(q_indptr[-1], dtype=np.int32) + np.repeat(starts - q_indptr[:-1], query_lens),
            token_slots=np.repeat(slots_array, query_lens),
            prompt_tokens=np.concatenate(pieces) if pieces else np.empty(0, np.int32),
            sampled_rows=sampled,
            last_tokens=q_indptr[1:][sampled] - 1,
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
        arrays = [getattr(host, f.name) for f in fields(cls)]
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
        target = torch.empty(sum(sizes), dtype=torch.int32, device=self.device)
        self.fill(target, arrays)
        return list(target.split(sizes))

    def fill(self, target: torch.Tensor, arrays: Sequence[np.ndarray]) -> None:
        """Copy the arrays, end to end, into a CUDA tensor of their total length."""
        i, self._turn = self._turn, (self._turn + 1) % len(self._staging)
        total = len(target)
        staging = self._staging[i]
        if staging is None or len(staging) < total:
            staging = torch.empty(max(2 * total, 4096), dtype=torch.int32, pin_memory=True)
            self._staging[i] = staging
        elif (copied := self._copied[i]) is not None:
            copied.synchronize()
        host = staging.numpy()
        np.concatenate([np.asarray(array, dtype=np.int32) for array in arrays], out=host[:total])
        target.copy_(staging[:total], non_blocking=True)
        event = self._copied[i] = self._copied[i] or torch.cuda.Event()
        event.record()


def kv_metadata(
    page_lists: Sequence[Sequence[int]],
    kv_lens: Sequence[int] | np.ndarray,
    query_lens: Sequence[int] | np.ndarray,
    page_size: int,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """FlashInfer's description of a ragged batch over pages, int32.

    qo_indptr [R + 1] bounds each row's queries, kv_indptr [R + 1] its pages in kv_indices, kv_last_page_len [R] counts
    the tokens in its last page. `plan` reads these three on the host, so they are CPU tensors (pinned for a GPU);
    kv_indices is on `device`.
    """
    lengths = np.asarray(kv_lens, dtype=np.int32)
    counts = -(-lengths // page_size)
    indices = [np.asarray(pages[:count], dtype=np.int32) for pages, count in zip(page_lists, counts.tolist())]
    arrays = {
        "qo_indptr": np.cumsum(np.concatenate(([0], query_lens)), dtype=np.int32),
        "kv_indptr": np.cumsum(np.concatenate(([0], counts)), dtype=np.int32),
        "kv_indices": np.concatenate(indices) if indices else np.empty(0, np.int32),
        "kv_last_page_len": np.where(lengths > 0, (lengths - 1) % page_size + 1, 0).astype(np.int32),
    }
    device = torch.device(device)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if device.type == "cuda":
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    tensors["kv_indices"] = tensors["kv_indices"].to(device, non_blocking=True)
    return tensors


def build_kv_metadata(
    requests: Sequence[Request], query_lens: Sequence[int] | None = None, device: torch.device | str | None = None
) -> dict[str, torch.Tensor]:
    """`kv_metadata` of requests that hold pages: over all their tokens, queries too unless `query_lens` says fewer.

    device: of kv_indices; the pool's unless given.
    """
    caches = [request.pages for request in requests]
    lengths = [cache.seqlen for cache in caches]
    if device is None:
        device = getattr(caches[0].pool, "device", "cpu") if caches else "cpu"
    page_size = caches[0].pool.page_size if caches else 1
    queries = lengths if query_lens is None else query_lens
    return kv_metadata([cache.indices for cache in caches], lengths, queries, page_size, device)

"""The engine: one packed step over paged KV for any mixture of prompt pieces and decodes.

`launch(chunks)` takes pages, sends the step's index arrays, enqueues forward pass and sampling, and returns without
waiting; `Step.tokens()` waits. The tokens that a step samples stay on the device, in a line per request, where the next
step's decodes take them from: so a scheduler launches step k + 1 before it reads step k. Steps of decodes alone run in
CUDA graphs on a GPU (common/paged/graphs.py). The schedulers and the plain loop of the pipeline script drive it
through `common.serving.StepEngine`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.attention import Attend
from common.errors import UserError
from common.kv_cache import DistKVPool
from common.llama import Llama
from common.memory import free_bytes, human_bytes
from common.paged.backends import Backend, make_attend, pick_backend, reserve_memory
from common.paged.batch import DeviceBatch, HostBatch, Upload
from common.paged.graphs import DecodeGraphs
from common.pages import check_page_size, pages_for
from common.sampling import GREEDY, sample
from common.serving import Chunk, InputRequest, Request, release_pages, reserve_pages

# Of the memory that is free beside weights, graphs and the largest step, where --kv-memory is not given: a GPU is ours
# but for what fragments, a laptop has other things to do.
KV_SHARE = {"cuda": 0.96, "cpu": 0.25}
GRAPHS_BYTES = 600e6  # set aside for CUDA graphs, which are captured over the pool and so cannot be measured before it


class EngineStep:
    """A launched step. The sampled ids are on their way to the host; `tokens()` waits for them once."""

    def __init__(self, requests: Sequence[Request], sampled: torch.Tensor, done: torch.cuda.Event | None) -> None:
        self._requests, self._sampled, self._done = requests, sampled, done

    def tokens(self) -> dict[Request, int]:
        """The next token of each request whose chunk samples."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        return dict(zip(self._requests, self._sampled.tolist()))


@dataclass(frozen=True)
class Packed:
    """A step ready for the device: token ids [T], the attend of its rows, and which packed tokens sample [S]."""

    tokens: torch.Tensor
    attend: Attend
    batch: DeviceBatch
    sampled_chunks: Sequence[Chunk]


class Engine:
    """Implements `StepEngine` over a model.

    backend: "auto", "torch", "triton" or "flashinfer". num_pages: the pool's size, or None for a share `kv_memory` of
    what is free after the weights and a trial of the largest step (`max_step_tokens`). max_requests: requests that may
    hold pages at one time. graphs: run steps of decodes alone in CUDA graphs.
    """

    def __init__(
        self,
        model: Llama,
        *,
        backend: str = "auto",
        page_size: int = 16,
        num_pages: int | None = None,
        kv_memory: float | None = None,
        max_requests: int = 512,
        max_step_tokens: int = 2048,
        graphs: bool = True,
    ) -> None:
        check_page_size(page_size)
        self.model, self.page_size = model, page_size
        self.backend: Backend = pick_backend(backend, model)
        self.max_context = model.config.max_position_embeddings
        self.max_requests = max_requests
        reserve_memory(self.backend, model.device)
        self._free_for_pages: float | None = None  # bytes beside weights, graphs and the largest step, if asked for
        self._captures = graphs and self.backend.captures
        self.is_asynchronous = model.device.type == "cuda"  # a CPU computes the step while it is launched
        if num_pages is None:
            num_pages = self._pages_that_fit(kv_memory, max_step_tokens)
        self._check_fits(num_pages)
        c = model.config
        self.pool = DistKVPool(
            c.num_hidden_layers,
            c.num_key_value_heads,
            c.head_dim,
            num_pages,
            page_size,
            model.dtype,
            model.device,
            head_major=self.backend.head_major,
        )
        # One more line than there are requests: rows that pad a graph's batch use it, and it leads to the scratch page.
        max_pages = pages_for(self.max_context, page_size)
        shape = (max_requests + 1, max_pages)
        self.page_table = torch.full(shape, self.pool.scratch_page, dtype=torch.int32, device=model.device)
        self.last_token = torch.zeros(max_requests + 1, dtype=torch.int64, device=model.device)
        self._free_slots = list(range(max_requests - 1, -1, -1))
        self._slots: dict[Request, int] = {}
        self._known_pages: dict[Request, int] = {}  # how many of a request's pages the device's table has
        self._upload = Upload(model.device)
        self._start = time.perf_counter()
        self.graphs = DecodeGraphs(self) if self._captures else None

    # --- what a scheduler asks ---------------------------------------------------------------------------------------
    @property
    def num_free_pages(self) -> int:
        return self.pool.num_free_pages

    def now(self) -> float:
        return time.perf_counter() - self._start

    def wait_until(self, when: float) -> None:
        time.sleep(max(0.0, when - self.now()))

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk]) -> EngineStep:
        """Take pages, enqueue forward and sampling, return at once. OutOfPages leaves everything as it was."""
        requests, _, ids = self._run(chunks)
        return self._to_host(requests, ids)

    @torch.inference_mode()
    def pack(self, chunks: Sequence[Chunk]) -> Packed:
        """What `launch` computes without a graph, ready but not computed: for looking into a step."""
        return self._pack(chunks, *self._admit(chunks))

    @torch.inference_mode()
    def hidden_states(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """What `launch` samples from, computed as it does, graphs included: the final hidden states [S, hidden size] of
        the chunks that sample, until the next step. For looking into a step."""
        return self._run(chunks)[1]

    def set_next_tokens(self, requests: Sequence[Request], ids: torch.Tensor) -> None:
        """Teacher forcing: the next decode of each request takes `ids` [len(requests)] instead of what was sampled."""
        slots = torch.tensor([self._slots[request] for request in requests], device=self.model.device)
        self.last_token[slots] = ids.to(self.last_token)

    def warm_up(self, max_batch_size: int) -> None:
        """Make ready what the first requests would wait for on a GPU: kernels, and the graphs of up to so many
        decodes.
        """
        if self.model.device.type != "cuda":
            return
        self._warm_kernels()
        if self.graphs is not None:
            self.graphs.capture(min(max_batch_size, self.max_requests))
        torch.cuda.synchronize(self.model.device)

    def _warm_kernels(self) -> None:
        """Two prompts, one of them in two pieces: many tokens and few, with prior context and without, a decode beside
        a piece. Kernels are compiled by such differences and not by sizes (`common.kernels.runtime.jit`).
        """
        long, short = (Request(InputRequest("", 2, [0] * n), -n) for n in (100, 17))
        needed = sum(pages_for(request.max_tokens, self.page_size) for request in (long, short))
        if needed > self.pool.num_free_pages or self.max_requests < 2 or long.max_tokens > self.max_context:
            return
        for chunks in ([Chunk(long, 0, 80), Chunk(short, 0, 17)], [Chunk(short, 17, 1), Chunk(long, 80, 20)]):
            self.launch(chunks).tokens()
        for request in (long, short):
            self.release(request)

    def release(self, request: Request) -> None:
        """Give the request's pages and its line back; only when no launched step can touch them."""
        release_pages(request)
        self._known_pages.pop(request, None)
        slot = self._slots.pop(request, None)
        if slot is not None:
            self._free_slots.append(slot)

    def fill(self, target: torch.Tensor, arrays: Sequence[np.ndarray]) -> None:
        """Copy int32 arrays, end to end, into a device tensor of their total length, without waiting."""
        self._upload.fill(target, arrays)

    # --- one step ----------------------------------------------------------------------------------------------------
    def _run(self, chunks: Sequence[Chunk]) -> tuple[list[Request], torch.Tensor, torch.Tensor]:
        """Enqueue a step: the requests whose chunks sample, their final hidden states, their sampled ids."""
        host, page_updates = self._admit(chunks)
        if self.graphs is not None and host.num_decodes == len(chunks) and _all_greedy(chunks):
            hidden, ids = self.graphs.run(host, page_updates, [request.pages.indices for request, _, _ in chunks])
            return [request for request, _, _ in chunks], hidden, ids
        packed = self._pack(chunks, host, page_updates)
        return [request for request, _, _ in packed.sampled_chunks], *self._compute(packed)

    def _admit(self, chunks: Sequence[Chunk]) -> tuple[HostBatch, list[np.ndarray]]:
        """Pages for the step, and a line of the page table for each request that is new."""
        requests = [request for request, _, _ in chunks]
        lines = list(map(self._slots.get, requests))
        fresh = [request for request, line in zip(requests, lines) if line is None] if None in lines else []
        if len(fresh) > len(self._free_slots):
            raise UserError(f"more than {self.max_requests} requests hold pages at one time; raise max_requests")
        if fresh:
            free = reversed(self._free_slots)
            lines = [next(free) if line is None else line for line in lines]
        host = HostBatch.of(chunks, lines)
        growing = reserve_pages(self.pool, chunks)  # what can refuse the step: nothing has changed until here
        for request in fresh:
            self._slots[request] = self._free_slots.pop()
        return host, self._new_pages(growing)

    def _pack(self, chunks: Sequence[Chunk], host: HostBatch, page_updates: list[np.ndarray]) -> Packed:
        batch, (lines, columns, pages) = DeviceBatch.of(host, self._upload, page_updates)
        self.page_table[lines, columns] = pages
        page_lists = [request.pages.indices for request, _, _ in chunks]
        attend = make_attend(self.backend, self.model, self.pool, host, batch, self.page_table, page_lists)
        decode_tokens = self.last_token[batch.slots[: host.num_decodes]]
        tokens = torch.cat((decode_tokens, batch.prompt_tokens.long()))
        sampled_chunks = chunks if host.all_sample else [chunks[row] for row in host.sampled_rows.tolist()]
        return Packed(tokens, attend, batch, sampled_chunks)

    def _compute(self, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """The step as it stands, kernel by kernel."""
        batch, chunks = packed.batch, packed.sampled_chunks
        hidden = self.model.forward(packed.tokens, packed.attend, batch.last_tokens)
        if not chunks:
            return hidden, hidden.new_empty(0, dtype=torch.int64)
        if _all_greedy(chunks):
            ids = self.model.greedy(hidden)
        else:
            params = [chunk.request.sampling for chunk in chunks]
            ids = sample(self.model.logits(hidden), params, [chunk.start + chunk.length for chunk in chunks])
        self.last_token[batch.slots[batch.sampled_rows]] = ids
        return hidden, ids

    def _new_pages(self, growing: Sequence[Request]) -> list[np.ndarray]:
        """Entries that the device's page table lacks, those of requests with new pages, as (line, column, page)
        arrays.
        """
        lines: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        for request in growing:
            indices = request.pages.indices
            known = self._known_pages.get(request, 0)
            lines += [self._slots[request]] * (len(indices) - known)
            columns += range(known, len(indices))
            pages += indices[known:]
            self._known_pages[request] = len(indices)
        return [np.array(part, dtype=np.int32) for part in (lines, columns, pages)]

    def _to_host(self, requests: Sequence[Request], ids: torch.Tensor) -> EngineStep:
        if self.model.device.type == "cpu":
            return EngineStep(requests, ids, None)
        copy = torch.empty(len(ids), dtype=torch.int64, pin_memory=True)
        copy.copy_(ids, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return EngineStep(requests, copy, done)

    # --- memory ------------------------------------------------------------------------------------------------------
    def _pages_that_fit(self, share: float | None, max_step_tokens: int) -> int:
        """Pages in a share of what is free beside the largest step's own memory; never more than could be used."""
        device = self.model.device
        step = self._trial_bytes(max_step_tokens) if device.type == "cuda" else 0
        self._free_for_pages = free_bytes(device) - step
        budget = self._free_for_pages - (GRAPHS_BYTES if self._captures else 0)
        budget *= KV_SHARE[device.type] if share is None else share
        page = DistKVPool.page_bytes(self.model.config, self.page_size, self.model.dtype)
        useful = self.max_requests * pages_for(self.max_context, self.page_size)
        return min(int(budget // page), useful)

    @torch.inference_mode()
    def _trial_bytes(self, num_tokens: int) -> int:
        """Memory that a step of `num_tokens` takes beside weights and KV: its largest moment, measured."""
        device = self.model.device
        width = self.model.config.q_size
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        tokens = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        rows = torch.arange(min(num_tokens, self.max_requests), device=device)
        hidden = self.model.forward(tokens, lambda layer, qkv: qkv[:, :width].clone(), rows)
        self.model.logits(hidden)
        return torch.cuda.max_memory_allocated(device) - before

    def _check_fits(self, num_pages: int) -> None:
        page = DistKVPool.page_bytes(self.model.config, self.page_size, self.model.dtype)
        free = free_bytes(self.model.device)
        if num_pages < 1:
            raise UserError(
                f"--kv-memory: of {human_bytes(free)} that are free this holds no page, {human_bytes(page)} for "
                f"{self.page_size} tokens; give a larger share, or --kv-pages"
            )
        if num_pages * page > free:
            raise UserError(
                f"--kv-pages: {num_pages} pages of {self.page_size} tokens take {human_bytes(num_pages * page)}; "
                f"{human_bytes(free)} are free"
            )

    def capture_graphs(self, max_batch_size: int) -> str:
        """Capture the graphs of all decode batches up to this size now, so that no timed step does; what it took, in
        words. Without graphs nothing, and "".
        """
        if self.graphs is None:
            return ""
        start, before = time.perf_counter(), free_bytes(self.model.device)
        count = self.graphs.capture(min(max_batch_size, self.max_requests))
        torch.cuda.synchronize(self.model.device)
        taken = max(before - free_bytes(self.model.device), 0)
        if self._free_for_pages is not None:
            self._free_for_pages -= taken
        return f"CUDA graphs: {count} captured in {time.perf_counter() - start:.1f} s, {human_bytes(taken)}"

    @property
    def pool_share(self) -> float | None:
        """The pool's bytes in what is free beside weights, graphs and the largest step; None where that was not asked
        for, because the number of pages was given.
        """
        return None if self._free_for_pages is None else self.pool.num_bytes / self._free_for_pages

    def describe_pool(self) -> str:
        """The pool in pages, tokens and bytes, for printing."""
        tokens, capacity = self.pool.capacity * self.page_size, self.pool.capacity
        share = "" if self.pool_share is None else f" ({self.pool_share:.1%} of what is free for it)"
        enough = self.max_requests * pages_for(self.max_context, self.page_size)
        full = f", all that {self.max_requests} requests can use" if capacity == enough else ""
        return (
            f"KV pool: {capacity:,} pages of {self.page_size} tokens = {tokens:,} tokens, "
            f"{human_bytes(self.pool.num_bytes)}{share}{full}; attention: {self.backend.name} ({self.backend.reason})"
        )


def _all_greedy(chunks: Sequence[Chunk]) -> bool:
    """Whether no request of the step draws; nearly always all share GREEDY itself, which is quick to see."""
    return all(request.sampling is GREEDY or request.sampling.is_greedy for request, _, _ in chunks)

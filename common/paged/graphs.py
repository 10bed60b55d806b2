"""CUDA graphs for steps of decodes alone: one graph a batch bucket, replayed with new numbers in static buffers.

A decode step of a small batch is some hundreds of short kernels; launched one by one, the CPU is slower than the GPU. A
graph launches them all at once. Its shapes are fixed, so a batch runs in the next larger bucket: the rows that pad it
write to the scratch page and their tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.paged.backends import make_graph_decode
from common.paged.batch import DeviceBatch, HostBatch

if TYPE_CHECKING:
    from common.engine import Engine


def bucket_of(batch_size: int) -> int:
    """The bucket that a batch runs in: at most 7 rows of padding up to 128, at most 15 above."""
    if batch_size <= 2:
        return batch_size
    if batch_size <= 4:
        return 4
    step = 8 if batch_size <= 128 else 16
    return -(-batch_size // step) * step


class _Graph:
    """One bucket: its static inputs, its captured step, its final hidden states and sampled ids."""

    def __init__(self, engine: Engine, size: int, memory_pool: object) -> None:
        device = engine.model.device
        self.size = size
        # One buffer, filled by one copy a step: each row's line of the page table and length, and the page table's new
        # entries, of which a row has at most one a step.
        # While it is captured, all rows are padding: a graph may be captured while requests are running.
        spare = (engine.max_requests, 1, engine.max_requests, 0, engine.pool.scratch_page)
        self.inputs = torch.tensor(spare, dtype=torch.int32, device=device).repeat_interleave(size)
        self.slots, self.kv_lens, self.lines, self.columns, self.pages = self.inputs.split(size)
        self._engine = engine
        self.decode = make_graph_decode(engine.backend, engine.model, engine.pool, engine.page_table, size)
        self.plan(np.empty(0, np.int32), ())
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # kernels compile and libraries set themselves up outside the capture
            for _ in range(2):
                self._step()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=memory_pool):
            self.hidden, self.ids = self._step()

    def plan(self, kv_lens: np.ndarray, page_lists: Sequence[Sequence[int]]) -> np.ndarray:
        """What a backend plans on the host for these rows and the padding behind them; returns the lengths of all."""
        padding = self.size - len(kv_lens)
        kv_lens = np.concatenate([kv_lens, np.ones(padding, np.int32)])
        self.decode.plan(kv_lens, [*page_lists, *[(self._engine.pool.scratch_page,)] * padding])
        return kv_lens

    def arrays(
        self, host: HostBatch, page_updates: Sequence[np.ndarray], page_lists: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """The parts of `inputs` for a step, padded: surplus rows and entries belong to the scratch page's line."""
        engine = self._engine
        spare = (engine.max_requests, 0, engine.pool.scratch_page)
        updates = [
            np.concatenate([part, np.full(self.size - len(part), value, np.int32)])
            for part, value in zip(page_updates, spare)
        ]
        slots = np.concatenate([host.slots, np.full(self.size - len(host.slots), engine.max_requests, np.int32)])
        return [slots, self.plan(host.kv_lens, page_lists), *updates]

    def _step(self) -> tuple[torch.Tensor, torch.Tensor]:
        engine = self._engine
        engine.page_table[self.lines, self.columns] = self.pages
        arange = torch.arange(self.size + 1, dtype=torch.int32, device=self.slots.device)
        batch = DeviceBatch(
            slots=self.slots,
            kv_lens=self.kv_lens,
            q_indptr=arange,
            positions=self.kv_lens - 1,
            token_slots=self.slots,
            prompt_tokens=arange[:0],
            sampled_rows=arange[:-1],
            last_tokens=arange[:-1],
        )
        tokens = engine.last_token[self.slots]
        hidden = engine.model.forward(tokens, self.decode.attend(batch))
        ids = engine.model.greedy(hidden)
        engine.last_token[self.slots] = ids
        return hidden, ids


class DecodeGraphs:
    """The graphs of an engine by bucket, captured when first needed, or all of them by `capture`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._graphs: dict[int, _Graph] = {}
        self._memory_pool = torch.cuda.graph_pool_handle()  # graphs replay one after another, so they share memory

    def capture(self, max_batch_size: int) -> int:
        """Capture every bucket up to the one of `max_batch_size`, largest first; returns how many there are."""
        for size in sorted({bucket_of(n) for n in range(1, max_batch_size + 1)}, reverse=True):
            self._graph(size)
        return len(self._graphs)

    def run(
        self, host: HostBatch, page_updates: list[np.ndarray], page_lists: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replay the bucket of a step of decodes with greedy sampling; returns the final hidden states [D, hidden size]
        and the sampled ids [D], on the device, until the bucket's next replay."""
        engine, count = self._engine, len(host.slots)
        graph = self._graph(bucket_of(count))
        engine.fill(graph.inputs, graph.arrays(host, page_updates, page_lists))
        graph.graph.replay()
        return graph.hidden[:count], graph.ids[:count]

    def _graph(self, size: int) -> _Graph:
        if size not in self._graphs:
            self._graphs[size] = _Graph(self._engine, size, self._memory_pool)
        return self._graphs[size]

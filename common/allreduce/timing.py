"""How long an all-reduce takes: many calls a sample, all ranks together, and the slowest rank's time counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from common.tensor_parallel.collectives import TensorParallel
from common.timing import Timing, graph_kernel_time, summarise

if TYPE_CHECKING:
    from common.distributed import World

SAMPLE_S = 2e-3  # a sample is as many calls as fill this: short ones alone would drown in the clock's noise
MAX_CALLS = 100
AllReduce = Callable[[torch.Tensor], torch.Tensor]


def time_eager(world: World, all_reduce: AllReduce, x: torch.Tensor, *, repeats: int, warmup: int = 2) -> Timing:
    """Seconds per call of `all_reduce(x)`, launched one by one."""
    for _ in range(max(warmup, 1)):
        all_reduce(x)
    calls = world.broadcast(min(MAX_CALLS, max(1, int(SAMPLE_S / _sample(world, all_reduce, x, 1)))))
    samples = [_sample(world, all_reduce, x, calls) / calls for _ in range(repeats)]
    return _of_slowest_rank(world, samples)


def time_in_graph(world: World, all_reduce: AllReduce, x: torch.Tensor, *, repeats: int) -> Timing:
    """Seconds per call of `all_reduce`, replayed from a CUDA graph of many calls over a few tensors like x."""
    tensors = [torch.zeros_like(x) for _ in range(4 if x.nbytes <= 1 << 26 else 1)]
    calls = [lambda t=t: all_reduce(t) for t in tensors]
    # A rank that replayed the graph once more than the others would wait for them for ever.
    timing = graph_kernel_time(calls, repeats=repeats, agree=world.broadcast)
    return _of_slowest_rank(world, list(timing.samples))


def _sample(world: World, all_reduce: AllReduce, x: torch.Tensor, calls: int) -> float:
    start_together(world)
    if x.device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            all_reduce(x)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    for _ in range(calls):
        all_reduce(x)
    return time.perf_counter() - began


def start_together(world: World) -> None:
    """Line the ranks up to within one tiny collective."""
    dist.all_reduce(torch.zeros(1, device=world.device), group=world.group)
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _of_slowest_rank(world: World, samples: list[float]) -> Timing:
    return summarise([max(ranks) for ranks in zip(*world.exchange(samples))])


def choose_algorithms(
    parallel: TensorParallel, world: World, rows: list[int], hidden_size: int, *, insist: bool = False
) -> list[str]:
    """Measure the all-reduces of [rows, hidden_size] and let `parallel` take the fastest for each number of rows.

    They are timed as a step uses them: the residual is added, by the same kernel or by one of its own. Returns a line
    of text for each. Without symmetric memory there is nothing to choose. insist: leave the library out (`--allreduce
    symm`) wherever symmetric memory takes the size.
    """
    if parallel.symmetric is None:
        return []
    lines = []
    for count in rows:
        x = torch.zeros(count, hidden_size, dtype=parallel.dtype, device=world.device)
        candidates = parallel.algorithms(x.nbytes)
        if insist and len(candidates) > 1:
            del candidates["library"]
        with_residual = {name: partial(fn, residual=torch.zeros_like(x)) for name, fn in candidates.items()}
        times = {name: time_in_graph(world, fn, x, repeats=10).median_s for name, fn in with_residual.items()}
        best = min(times, key=times.__getitem__)  # the same on all ranks: the times are the slowest rank's
        parallel.algorithm_of[x.nbytes] = best
        shown = ", ".join(f"{name} {1e6 * seconds:.1f} us" for name, seconds in times.items())
        lines.append(f"all-reduce of {x.nbytes} bytes + residual in a graph: {shown}; using {best}")
    return lines

"""Run by tests/gpu/test_push_all_reduce.py: two ranks on one GPU, as kernels on two streams, each other's peer.

Both grids must be on the device at one time, and so must what programmatic dependent launch starts early behind them:
sizes are small, or the host waits after each call. Nothing may load a kernel, or allocate, while one of them waits for
the other, since that can wait for the device; so every launch has been made before, against answers written by hand.
Prints one JSON line; a hang is ended by the test's time-out.
"""

import itertools
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from common.tensor_parallel.push_all_reduce import (
    LOW_LATENCY_WORDS,
    PUSH_PROGRAMS,
    PUSH_WORDS,
    PushAllReduce,
    buffer_bytes,
)

DEVICE = torch.device("cuda", 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = {"low_latency": (1, 63, 64, 1000, 2048), "push": (5, 2048, 5000, 30000)}  # words
LARGE = {"low_latency": (LOW_LATENCY_WORDS,), "push": (1 << 18,)}
REPLAYS = 50


class Pair:
    """Two ranks, and the stream of each."""

    def __init__(self):
        self.buffers = [torch.zeros(buffer_bytes(2) // 8, dtype=torch.int64, device=DEVICE) for _ in range(2)]
        self.ranks = [PushAllReduce(rank, self.buffers) for rank in range(2)]
        self.streams = [torch.cuda.Stream(DEVICE) for _ in range(2)]

    def answer_call_one(self):
        """As if both had sent zeros in every program's first call, to either."""
        for buffer in self.buffers:
            numbered = 2 * 2 * LOW_LATENCY_WORDS
            buffer[:numbered] = 1 << 32
            words = buffer.view(torch.int32)[2 * numbered :]
            words[: 2 * 2 * PUSH_WORDS] = 0
            words[2 * 2 * PUSH_WORDS :][: 2 * 2 * PUSH_PROGRAMS] = 1

    def warm_up(self, name, words, dtype, with_residual):
        """Compile and load what a call of this kind needs: each rank alone."""
        for rank, stream in zip(self.ranks, self.streams):
            self.reset()
            self.answer_call_one()
            x = torch.ones(words * 4 // dtype.itemsize, dtype=dtype, device=DEVICE)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                got = getattr(rank, name)(x.clone(), x if with_residual else None)
            torch.cuda.synchronize()
            assert bool((got == (2 if with_residual else 1)).all()), (name, words, dtype)
        self.reset()

    def reset(self):
        torch.cuda.synchronize()
        for tensor in (*self.buffers, *(c for r in self.ranks for c in (r._low_latency_counters, r._push_counters))):
            tensor.zero_()
        torch.cuda.synchronize()


def draw(words, dtype):
    return torch.randn(words * 4 // dtype.itemsize, device=DEVICE).to(dtype)


def check(results, inputs, residual, what):
    """Both ranks' bits, and the sum in float64 rounded once."""
    assert results[0].equal(results[1]), f"{what}: the ranks differ"
    terms = [*inputs, *([] if residual is None else [residual])]
    exact = sum(x.double() for x in terms)
    limit = torch.finfo(results[0].dtype).eps * sum(x.double().abs() for x in terms)
    assert bool(((results[0].double() - exact).abs() <= limit).all()), f"{what}: wrong sums"


def eager(pair, name, words, dtype, with_residual):
    inputs, residual = [draw(words, dtype) for _ in range(2)], draw(words, dtype) if with_residual else None
    copies = [x.clone() for x in inputs]
    torch.cuda.synchronize()
    results = []
    for rank, stream, x in zip(pair.ranks, pair.streams, copies):
        with torch.cuda.stream(stream):
            results.append(getattr(rank, name)(x, residual))
    torch.cuda.synchronize()
    check(results, inputs, residual, f"eager {name} of {words} words, {dtype}")


def graphs(pair, calls):
    """A graph a rank with all calls one after another; replayed, several times without waiting, on new numbers."""
    residuals = [draw(words, dtype) if with_residual else None for _, words, dtype, with_residual in calls]
    inputs = [[draw(words, dtype) for _, words, dtype, _ in calls] for _ in range(2)]
    captured, results = [], []
    for rank, stream, mine in zip(pair.ranks, pair.streams, inputs):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            copies = [x.clone() for x in mine]
            results.append([
                getattr(rank, call[0])(x, residual) for call, x, residual in zip(calls, copies, residuals)
            ])  # fmt: skip
        captured.append(graph)
    replays = 0
    while replays < REPLAYS:
        for x in itertools.chain(*inputs):
            x.normal_()
        torch.cuda.synchronize()
        times = 1 + replays % 4
        for _ in range(times):
            for graph, stream in zip(captured, pair.streams):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        replays += times
        for i, call in enumerate(calls):
            check([r[i] for r in results], [x[i] for x in inputs], residuals[i], f"in a graph: {call}")
        eager(pair, *calls[replays % len(calls)])
    return replays


def main():
    torch.cuda.set_device(DEVICE)
    torch.manual_seed(0)
    pair, rng = Pair(), random.Random(0)
    kinds = [
        (name, words, dtype, with_residual)
        for sizes in (SMALL, LARGE)
        for name, all_words in sizes.items()
        for words, dtype, with_residual in itertools.product(all_words, DTYPES, (False, True))
    ]
    for kind in kinds:
        pair.warm_up(*kind)
        eager_inputs = draw(kind[1], kind[2])
        check([eager_inputs, eager_inputs], [eager_inputs], None, "the check itself")
    for kind in rng.sample(kinds, len(kinds)):  # sizes and algorithms in turn, over one pair's counters
        eager(pair, *kind)
    small = [kind for kind in kinds if kind[1] in SMALL[kind[0]]]
    replays = graphs(pair, rng.sample(small, 12))
    print(json.dumps({"eager": len(kinds), "replays": replays}))


if __name__ == "__main__":
    main()

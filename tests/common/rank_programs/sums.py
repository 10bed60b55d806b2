"""Run by tests/gpu/test_push_all_reduce.py as one rank a GPU: every all-reduce, launched one by one and in a CUDA
graph, and a split model that decodes with ours.

Prints one JSON line: how many sums were compared, whether the tokens are those of one GPU, or the problem.
"""

import argparse
import hashlib
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from common import checkpoint, timing
from common.distributed import open_world
from common.equality import require_equal
from common.generation import StopRule
from common.tensor_parallel import collectives
from common.tensor_parallel import experiment as tp_experiment
from common.tensor_parallel.sharding import shard_of

ELEMENTS = (2, 6, 64, 130, 4096, 4098, 3 * 4096, 64 * 1024, 256 * 4096, 2 << 20)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REPLAYS = 6
LIMIT_S = 120.0


def draw(rank, seed, count, dtype, device):
    """Numbers that every rank can draw for every other."""
    generator = torch.Generator(device).manual_seed(1000 * seed + rank)
    return torch.randn(count, generator=generator, device=device).to(dtype)


def check(world, got, terms, what, *, ours):
    """In float64, to what the roundings allow; ours round once and give all ranks the same bits."""
    exact = sum(x.double() for x in terms)
    roundings = 1 if ours else len(terms) + 1
    limit = roundings * torch.finfo(got.dtype).eps * sum(x.double().abs() for x in terms)
    wrong = int(((got.double() - exact).abs() > limit).sum())
    digest = hashlib.sha256(got.view(torch.uint8).cpu().numpy().tobytes()).hexdigest() if ours else ""
    views = world.exchange([wrong, digest])
    assert not any(count for count, _ in views), f"{what}: wrong sums by rank {[count for count, _ in views]}"
    assert len({digest for _, digest in views}) == 1, f"{what}: the ranks' bits differ"


def compare(world, dtype):
    """Every algorithm at every size it takes, alone; then all in one graph, replayed on new numbers."""
    symmetric, problem, no_push = collectives.make_symmetric(world, dtype, 4 << 20)
    if problem or no_push:
        return 0, problem or no_push
    ranks = collectives.TensorParallel(world.group, world.device, dtype, symmetric)
    calls = [(name, count) for count in ELEMENTS for name in ranks.algorithms(count * dtype.itemsize)]
    residual = draw(world.size, 1, max(ELEMENTS), dtype, world.device)  # the same on all ranks

    def run(name, x, residual):
        return ranks.algorithms(x.nbytes)[name](x, residual)

    for seed, (name, count) in enumerate(calls):
        everyone = [draw(rank, seed, count, dtype, world.device) for rank in range(world.size)]
        for added in ([], [residual[:count]]):
            got = run(name, everyone[world.rank].clone(), *(added or [None]))
            what = f"{name} of {count} {dtype}, {len(added)} residuals"
            check(world, got, everyone + added, what, ours=name in symmetric.pusher.NAMES)

    mine = [torch.zeros(count, dtype=dtype, device=world.device) for _, count in calls]
    results = {}

    def captured(i, name, count):
        results[i] = run(name, mine[i].clone(), residual[:count])

    graph, times = timing.capture([partial(captured, i, *call) for i, call in enumerate(calls)])
    assert times == len(calls)  # once round: what is in `results` is what the graph writes
    for replay in range(REPLAYS):
        for i, (_, count) in enumerate(calls):
            mine[i].copy_(draw(world.rank, 100 * replay + i, count, dtype, world.device))
        for _ in range(1 + replay % 3):
            graph.replay()
        for i, (name, count) in enumerate(calls):
            everyone = [draw(rank, 100 * replay + i, count, dtype, world.device) for rank in range(world.size)]
            what = f"replay {replay} of {name} of {count} {dtype}"
            check(world, results[i], [*everyone, residual[:count]], what, ours=name in symmetric.pusher.NAMES)
    return (2 + REPLAYS) * len(calls), None


def decode(world):
    """Greedy tokens of a model split over all ranks, with each of our all-reduces in all its steps, against the
    whole.
    """
    symmetric, problem, _ = collectives.make_symmetric(world, torch.float32, 1 << 20)
    assert problem is None
    ranks = collectives.TensorParallel(world.group, world.device, torch.float32, symmetric)
    load = {"device": world.device, "dtype": torch.float32, "quiet": True}
    split, _ = checkpoint.load("random:tiny", tp=lambda c: shard_of(c, world.rank, world.size, ranks), **load)
    whole, _ = checkpoint.load("random:tiny", **load)
    prompts = [list(range(3, 3 + n)) for n in (9, 1, 17)]

    def greedy(model):
        engine = tp_experiment.Engine(model, num_pages=64, page_size=16, max_requests=len(prompts))
        return tp_experiment.generate(engine, prompts, StopRule(24, ignore_eos=True), tp_experiment.Stamps())

    expected, verdicts = greedy(whole), []
    for name in symmetric.pusher.NAMES:
        sizes = [4 * rows * split.config.hidden_size for rows in range(1, 65)]
        ranks.algorithm_of = {size: name for size in sizes if symmetric.pusher.fits(name, size)}
        tokens = greedy(split)
        assert len({json.dumps(view) for view in world.exchange(tokens)}) == 1, f"{name}: the ranks' tokens differ"
        verdicts.append(require_equal(whole, prompts, expected, tokens, name))
    return verdicts


with open_world(argparse.Namespace(device="cuda")) as world:
    found = {"sums": 0, "problem": None}
    for dtype in DTYPES:
        world.heartbeat.expect_within(LIMIT_S, f"all-reduces of {dtype}")
        count, problem = compare(world, dtype)
        found = {"sums": found["sums"] + count, "problem": problem}
    world.heartbeat.expect_within(LIMIT_S, "decoding")
    if not found["problem"]:
        found["tokens"] = decode(world)
    world.heartbeat.expect_within(None)
    print(json.dumps(found))

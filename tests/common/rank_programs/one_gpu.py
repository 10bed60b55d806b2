"""Run by tests/gpu/test_distributed_gpu.py as one NCCL rank: the collectives inside CUDA graphs, and a clean end.

Argument: auto, nccl or symm. Prints one JSON line.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from common import checkpoint
from common.allreduce.timing import choose_algorithms
from common.distributed import open_world
from common.generation import StopRule
from common.tensor_parallel import collectives
from common.tensor_parallel import experiment as tp_experiment
from common.tensor_parallel.sharding import shard_of


def greedy(model):
    engine = tp_experiment.Engine(model, num_pages=64, page_size=16, max_requests=3)
    prompts = [list(range(3, 3 + n)) for n in (9, 1, 17)]
    return tp_experiment.generate(engine, prompts, StopRule(24, ignore_eos=True), tp_experiment.Stamps())


with open_world(argparse.Namespace(device="cuda")) as world:
    symmetric, problem, no_push = None, "not asked for", None
    if sys.argv[1] != "nccl":
        symmetric, problem, no_push = collectives.make_symmetric(world, torch.float32, 1 << 20)
    ranks = collectives.TensorParallel(world.group, world.device, torch.float32, symmetric)
    lines = choose_algorithms(ranks, world, [1, 4], 64, insist=sys.argv[1] == "symm")
    load = {"device": world.device, "dtype": torch.float32, "quiet": True}
    grouped, _ = checkpoint.load("random:tiny", tp=lambda c: replace(shard_of(c, 0, 1), group=ranks), **load)
    plain, _ = checkpoint.load("random:tiny", **load)
    x = torch.randn(4, 64, device=world.device)
    sums = {name: ranks.all_reduce(x.clone()).equal(x) for name in ("as chosen",)}
    sums |= {name: fn(x.clone()).equal(x) for name, fn in ranks.algorithms(x.nbytes).items()}
    found = {"sums": sums, "lines": lines, "problem": problem or no_push}
    print(json.dumps(found | {"same": greedy(grouped) == greedy(plain)}))

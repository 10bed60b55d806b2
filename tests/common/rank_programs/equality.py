"""Run by test_tensor_parallel.py as N gloo processes: every rank holds its parts, and must compute what the whole does.

Arguments: folders of checkpoints. Prints one JSON line at rank 0: for each, the largest difference of logits, whether
the greedy tokens are equal, and what every rank read of the checkpoint.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from common import checkpoint
from common.attention import Prefill
from common.config import ModelConfig
from common.distributed import open_world
from common.equality import require_equal
from common.generation import StopRule
from common.tensor_parallel import experiment as tp_experiment
from common.tensor_parallel.collectives import TensorParallel
from common.tensor_parallel.sharding import shard_of
from common.tensor_source import SafetensorsSource

torch.set_num_threads(1)
OUTPUT_LEN = 12


def load(folder, tp=checkpoint.Shard.whole):
    config = ModelConfig.from_pretrained(folder)
    source = SafetensorsSource(Path(folder), config)
    return checkpoint.build(config, source, tp(config), torch.device("cpu"), torch.float32)


def greedy(model, prompts):
    engine = tp_experiment.Engine(model, num_pages=64, page_size=4, max_requests=len(prompts))
    return tp_experiment.generate(engine, prompts, StopRule(OUTPUT_LEN, ignore_eos=True), tp_experiment.Stamps())


def compare(folder, world):
    ranks = TensorParallel(world.group, world.device, torch.float32)
    part = load(folder, lambda config: shard_of(config, world.rank, world.size, ranks))
    whole = load(folder)
    vocab = whole.config.vocab_size
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(vocab, (n,), generator=generator).tolist() for n in (9, 1, 17)]
    ids = torch.tensor([t for prompt in prompts for t in prompt])
    rows = torch.tensor([8, 9, 26, 0])
    logits = [m.logits(m.forward(ids, Prefill(m, [9, 1, 17]), rows)) for m in (part, whole)]
    assert logits[0].shape == (4, vocab)
    tokens = greedy(part, prompts)
    verdict = require_equal(whole, prompts, greedy(whole, prompts), tokens, "tokens") if world.is_first else ""
    bits = world.exchange([logits[0].sum().item(), tokens])
    return {
        "difference": float((logits[0] - logits[1]).abs().max()),
        "largest": float(logits[1].abs().max()),
        "verdict": verdict,
        "ranks_agree": all(view == bits[0] for view in bits),
        "bytes_read": world.exchange(part.bytes_read),
        "whole_bytes": whole.bytes_read,
    }


with open_world(argparse.Namespace(device="cpu")) as world:
    for folder in sys.argv[1:]:
        print(json.dumps(compare(folder, world)), flush=True)

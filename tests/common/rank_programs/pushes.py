"""Run by test_push_all_reduce.py as N processes under Triton's interpreter: the kernels over memory that they share.

pushes.py RANK WORLD FOLDER SEED CALLS: FOLDER/R is rank R's receive buffer, zero at first. Every rank makes the same
calls of sizes, dtypes and algorithms drawn from SEED, with numbers of its own; prints a digest of all results, which
must be the same on all ranks, after comparing each with the sum of what all ranks drew.
"""

import hashlib
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from common.tensor_parallel.push_all_reduce import PushAllReduce, buffer_bytes

torch.set_num_threads(1)


def numbers(rank, call, count, dtype):
    generator = torch.Generator().manual_seed(1000 * call + rank)
    return torch.randn(count, generator=generator).to(dtype)


def main(rank, world, folder, seed, calls):
    size = buffer_bytes(world) // 8
    buffers = [torch.from_file(f"{folder}/{r}", shared=True, size=size, dtype=torch.int64) for r in range(world)]
    ranks = PushAllReduce(rank, buffers)
    rng, uneven, digest = random.Random(seed), random.Random(rank), hashlib.sha256()
    for call in range(calls):
        dtype = rng.choice((torch.float32, torch.float16))
        words = rng.choice((1, 3, 63, 64, 65, 150))
        name = rng.choice(PushAllReduce.NAMES)
        count = words * 4 // dtype.itemsize
        everyone = [numbers(r, call, count, dtype) for r in range(world)]
        residual = numbers(world, call, count, dtype) if rng.random() < 0.5 else None
        time.sleep(uneven.choice((0, 0, 0.002)))  # now one rank is late, now another
        got = getattr(ranks, name)(everyone[rank].clone(), residual)
        total = torch.zeros(count)
        for x in [*everyone, *([] if residual is None else [residual])]:
            total += x  # in the order of ranks: the very same roundings
        assert got.equal(total.to(dtype)), f"call {call}: {name} of {words} words, {dtype}, rank {rank}"
        digest.update(got.numpy().tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))

"""Our all-reduces under Triton's interpreter: alone, against words written by hand, and between real processes; and a
model of their protocol that interleaves ranks at random.

Catches: a word sent to the wrong place or with the wrong number, a result taken before all have arrived, a stale word
taken for a new one, a half overwritten before it was read, a sum whose order depends on the rank, a lost tail.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from common.kernels import runtime
from common.tensor_parallel import push_all_reduce as pushes
from common.tensor_parallel.collectives import SymmetricMemory, TensorParallel
from common.tensor_parallel.push_all_reduce import PushAllReduce, buffer_bytes

PROGRAM = Path(__file__).parents[1] / "rank_programs" / "pushes.py"
INTERPRETED = pytest.mark.skipif(not (runtime.HAS_TRITON and runtime.INTERPRETED), reason="needs Triton's interpreter")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
NAMES = pytest.mark.parametrize("name", PushAllReduce.NAMES)


def make_buffers(world):
    return [torch.zeros(buffer_bytes(world) // 8, dtype=torch.int64) for _ in range(world)]


def parts(buffer, world):
    """(numbered words, plain words, flags) of a receive buffer, each [senders, halves, ...]: the documented layout."""
    numbered = 2 * world * pushes.LOW_LATENCY_WORDS
    plain = 2 * world * pushes.PUSH_WORDS
    words = buffer.view(torch.int32)[2 * numbered :]
    return (
        buffer[:numbered].view(world, 2, -1),
        words[:plain].view(world, 2, -1),
        words[plain:].view(world, 2, -1),
    )


def words_of(x):
    return x.view(torch.int32)


def receive(buffer, world, sender, count, x):
    """What `sender` would have written into this buffer for a call whose every program makes its call `count`."""
    numbered, plain, flags = parts(buffer, world)
    words = words_of(x)
    numbered[sender, count % 2, : len(words)] = (count << 32) | (words.long() & 0xFFFFFFFF)
    plain[sender, count % 2, : len(words)] = words
    flags[sender, count % 2, : -(-len(words) // pushes.PUSH_BLOCK)] = count


@INTERPRETED
@NAMES
@DTYPES
def test_one_rank_sums_nothing_and_adds_the_residual_once(name, dtype):
    all_reduce = getattr(PushAllReduce(0, make_buffers(1)), name)
    for count in (2, 64, 130, 2 * pushes.PUSH_BLOCK + 6 if name == "push" else 1000):
        x, residual = torch.randn(2, count).to(dtype)
        assert all_reduce(x.clone()).equal(x)
        assert all_reduce(x.clone(), residual).equal((x.float() + residual.float()).to(dtype))
    x = torch.randn(6, 8).to(dtype)
    assert all_reduce(x[:, 2:6]).equal(x[:, 2:6])  # rows that do not touch


@INTERPRETED
@NAMES
@DTYPES
def test_against_words_written_by_hand(name, dtype):
    """Rank 1 of three: the others' words are there before. Three calls of other sizes, the last one in the first's
    half; what is sent is decoded, and nothing else may have been written."""
    world, rank = 3, 1
    buffers = make_buffers(world)
    all_reduce = getattr(PushAllReduce(rank, buffers), name)
    for count, words in enumerate((70, 3, 64), start=1):  # program 0 takes part in all, program 1 in the first
        everyone = torch.randn(world, words * 4 // dtype.itemsize).to(dtype)
        residual = torch.randn(everyone.shape[1]).to(dtype)
        for sender in (0, 2):
            receive(buffers[rank], world, sender, count, everyone[sender])
        expected = torch.zeros(everyone.shape[1])
        for x in (*everyone, residual):
            expected += x
        assert all_reduce(everyone[rank].clone(), residual).equal(expected.to(dtype))
        for peer in (0, 2):
            numbered, plain, flags = parts(buffers[peer], world)
            if name == "low_latency":
                got = numbered[rank, count % 2, :words]
                assert (got >> 32 == count).all()
                sent = (got & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
            else:
                sent = plain[rank, count % 2, :words]
                assert flags[rank, count % 2].tolist() == [count] + [0] * (pushes.PUSH_PROGRAMS - 1)
            assert sent.equal(words_of(everyone[rank]))
            written = numbered if name == "low_latency" else plain
            assert int((written[rank] != 0).sum(1).max()) <= 70
            written[rank], flags[rank] = 0, 0
            assert not buffers[peer].any()


@INTERPRETED
@NAMES
def test_it_waits_for_the_last_word(name):
    """All is there but one word (or flag), where an old one stands; it comes while the kernel is waiting."""
    world, words = 2, 100
    buffers = make_buffers(world)
    all_reduce = getattr(PushAllReduce(0, buffers), name)
    mine, other, later = torch.randn(3, words)
    for count in (1, 2):
        receive(buffers[0], world, 1, count, other)
        all_reduce(mine.clone())
    receive(buffers[0], world, 1, 3, later)
    numbered, _, flags = parts(buffers[0], world)
    last = (numbered if name == "low_latency" else flags)[1, 1]
    at = words - 1 if name == "low_latency" else 0
    complete = last[at].clone()
    last[at] = (1 << 32) + 7 if name == "low_latency" else 1
    arrived = []

    def arrive():
        time.sleep(0.3)
        arrived.append(True)
        last[at] = complete

    thread = threading.Thread(target=arrive)
    thread.start()
    got = all_reduce(mine.clone())
    assert arrived
    thread.join()
    assert got.equal(mine + later)


@INTERPRETED
def test_numbers_wrap_around():
    buffers = make_buffers(2)
    ranks = PushAllReduce(0, buffers)
    for name, counters in (("low_latency", ranks._low_latency_counters), ("push", ranks._push_counters)):
        counters.fill_(2**31 - 2)
        for count in (2**31 - 1, -(2**31), -(2**31) + 1):
            x, other = torch.randn(2, 10)
            receive(buffers[0], 2, 1, count, other)
            assert getattr(ranks, name)(x.clone()).equal(x + other)


@INTERPRETED
@pytest.mark.parametrize("world, calls", [(2, 30), pytest.param(3, 150, marks=pytest.mark.slow)])
def test_processes_that_share_memory(world, calls, tmp_path):
    """The kernels themselves, really at the same time; the same bits on all ranks."""
    for rank in range(world):
        with (tmp_path / str(rank)).open("wb") as file:
            file.truncate(buffer_bytes(world))
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(world), str(tmp_path), "5", str(calls)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        done = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, [stderr[-800:] for _, stderr in done]
    assert len({stdout for stdout, _ in done}) == 1


def test_what_fits():
    ranks = PushAllReduce(0, make_buffers(1))
    for name in PushAllReduce.NAMES:
        largest = ranks.max_bytes[name]
        assert ranks.fits(name, 4) and ranks.fits(name, largest)
        assert not any(ranks.fits(name, size) for size in (0, 2, 6, largest + 4))
    assert ranks.max_bytes["low_latency"] <= 4 * pushes.LOW_LATENCY_WORDS
    assert ranks.max_bytes["push"] <= 4 * pushes.PUSH_WORDS


@INTERPRETED
def test_the_chosen_one_sums_and_gets_the_residual():
    """Which algorithms take a size, and that `all_reduce` calls the chosen one. Two of the five are torch's and need
    GPUs: they are listed, not called."""
    symmetric = object.__new__(SymmetricMemory)
    symmetric.buffer, symmetric.size, symmetric.pusher = torch.zeros(512), 2, PushAllReduce(0, make_buffers(1))
    names = {size: set(symmetric.algorithms(size)) for size in (4, 6, 2048, 2080, 1 << 14)}
    assert names[4] == names[2080] == {"low_latency", "push"} and names[6] == set() and names[1 << 14] == {"push"}
    assert names[2048] == {"one_shot", "two_shot", "low_latency", "push"}
    ranks = object.__new__(TensorParallel)
    ranks.symmetric = symmetric
    x, residual = torch.randn(2, 4, 16)
    for name in PushAllReduce.NAMES:
        ranks.algorithm_of = {x.nbytes: name}
        counters = symmetric.pusher._low_latency_counters if name == "low_latency" else symmetric.pusher._push_counters
        assert ranks.all_reduce(x.clone(), residual).equal(x + residual) and counters[0] == 1
    symmetric.pusher = None
    assert set(symmetric.algorithms(2048)) == {"one_shot", "two_shot"}


# --- the protocol ----------------------------------------------------------------------------------------------------
class Overrun(Exception):
    """A program took a wrong word, or waits for ever."""


class Model:
    """Ranks whose programs send, look and finish word by word; which one moves next is drawn at random.

    block: the words of a program in a call of a size. What a rank sends in a call is (call, rank), so that a word of
    another call is seen at once.
    """

    def __init__(self, rng, world, calls, *, halves=2, block=lambda size: 4):
        self.rng, self.world, self.calls, self.halves, self.block = rng, world, calls, halves, block
        self.received = [{} for _ in range(world)]  # (sender, half, word) -> (number, data)
        self.counters = [{} for _ in range(world)]
        self.steps = 0

    def program(self, rank, call, size, index):
        words = range(index * self.block(size), min(size, (index + 1) * self.block(size)))
        count = self.counters[rank].get(index, 0) + 1
        peers = [r for r in range(self.world) if r != rank]
        for peer in peers:
            for word in words:
                self.received[peer][rank, count % self.halves, word] = (count, (call, rank))
                yield
        found = {}
        while len(found) < len(peers) * len(words):
            found = {}
            for peer in peers:
                for word in words:
                    number, data = self.received[rank].get((peer, count % self.halves, word), (0, None))
                    if number == count:
                        found[peer, word] = data
                    yield
        if any(data != (call, peer) for (peer, _), data in found.items()):
            raise Overrun("a word of another call")
        self.counters[rank][index] = count

    def kernels(self, rank):
        for call, size in enumerate(self.calls):
            running = [self.program(rank, call, size, i) for i in range(-(-size // self.block(size)))]
            while running:
                program = self.rng.choice(running)
                if next(program, self) is self:
                    running.remove(program)
                yield

    def run(self):
        running = [self.kernels(rank) for rank in range(self.world)]
        while running:
            rank = self.rng.choice(running)
            for _ in range(self.rng.choice((1, 1, 3, 30))):  # ranks are not equally fast
                if next(rank, self) is self:
                    running.remove(rank)
                    break
            self.steps += 1
            if self.steps > 10_000:
                raise Overrun("a rank waits for ever")


def calls_of(rng):
    return [rng.choice((1, 3, 4, 5, 9)) for _ in range(12)]


@pytest.mark.parametrize("world", [2, 3])
def test_two_halves_suffice_whatever_the_sizes(world):
    for seed in range(60):
        rng = random.Random(seed)
        Model(rng, world, calls_of(rng)).run()


@pytest.mark.parametrize("sabotage", [{"halves": 1}, {"block": lambda size: -(-size // 2)}])
def test_the_model_sees_what_would_go_wrong(sabotage):
    """One half alone; slices that depend on the size of the call."""
    failed = 0
    for seed in range(10):
        rng = random.Random(seed)
        try:
            Model(rng, 2, calls_of(rng), **sabotage).run()
        except Overrun:
            failed += 1
    assert failed > 2

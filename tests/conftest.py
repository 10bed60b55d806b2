"""Shared fixtures: small random models, and the embedded model where a test is about real weights."""

from __future__ import annotations

import dataclasses
import os
import signal
import zlib

# One thread a process: the tests run in two processes on two cores, and threads that wait for each other spin. Scripts
# that tests start inherit it. It counts only before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job that a shell starts in the background ignores Ctrl-C, and so would every script that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined, so before anything imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")

from common.checkpoint import Shard, build, load
from common.config import SHAPES
from common.tensor_source import expected_shapes
from common.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the smallest shape, random weights."""
    return load("random:tiny", device="cpu", dtype="float32", quiet=True)


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer) of the embedded model in float32 on the CPU; fetched and converted at the first use."""
    return load("embedded", device="cpu", dtype="float32", quiet=True)


class _LivelyWeights:
    """Random weights in proportions that make attention decide: every token of a context changes what follows.

    The random weights of a fresh model mostly repeat their last token, and a test over such tokens sees no bug.
    """

    bytes_read = 0

    def __init__(self, config):
        self._shapes = expected_shapes(config)

    def shape(self, name):
        return self._shapes[name]

    def read(self, name, rows=slice(None), columns=slice(None)):
        shape = self._shapes[name]
        values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if len(shape) == 1:
            return (1 + 0.1 * values)[rows]
        return (values * (2 / shape[1] ** 0.5 if "proj" in name else 1))[rows, columns]


@pytest.fixture(scope="session")
def lively_weights():
    """config -> a source of random weights in proportions that make attention decide."""
    return _LivelyWeights


@pytest.fixture(scope="session")
def lively():
    """(model, tokenizer) of the smallest shape whose greedy tokens depend on the whole context; float32, CPU."""
    config = dataclasses.replace(SHAPES["tiny"], tie_word_embeddings=False)
    model = build(
        config, _LivelyWeights(config), Shard.whole(config), torch.device("cpu"), torch.float32, origin="lively"
    )
    return model, ByteTokenizer(config)

"""Shared fixtures: small random models, and the embedded model where a test is about real weights."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import zlib
from types import SimpleNamespace

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


class _Replayed:
    """Stands for a CUDA graph: replaying computes the step again. Its results are new tensors: on a GPU they are copied
    away before the next replay, in the stream's order.
    """

    def __init__(self):
        self.owner = sys._getframe(1).f_locals["self"]  # the bucket that is being captured

    def replay(self):
        self.owner.hidden, self.owner.ids = self.owner._step()


class _Nothing:
    """A stream or the context of one: whatever is asked of it, nothing happens."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def pretend_gpu(monkeypatch, lively):
    """The lively model as a GPU would run it, on the CPU: every choice falls on our kernels (Triton's interpreter runs
    them) and decode steps run in stand-ins for CUDA graphs.
    """
    import common.engine
    import common.kernels.linear
    import common.paged.batch
    import common.paged.graphs
    import common.scripts.ablation
    from common.kernels import argmax, linear, paged_decode, paged_prefill, rms_norm, rope_append, runtime, silu_mul
    from common.operations import with_kernels

    if not (runtime.HAS_TRITON and runtime.INTERPRETED):
        pytest.skip("needs Triton's interpreter")
    ablation, graphs = common.scripts.ablation, common.paged.graphs
    for module in (argmax, linear, paged_decode, paged_prefill, rms_norm, rope_append, silu_mul, ablation):
        monkeypatch.setattr(module, "runs_triton", lambda x: True)
    for module in (linear, ablation):
        monkeypatch.setattr(module, "small_gemm_pays", lambda x: True)
    monkeypatch.setattr(linear, "_can_prepack", lambda weight: False)
    for module in (common.engine, ablation):
        pick = module.pick_backend
        monkeypatch.setattr(
            module,
            "pick_backend",
            lambda name, model, pick=pick: dataclasses.replace(
                pick("triton" if name == "auto" else name, model), captures=True
            ),
        )
    cuda = SimpleNamespace(
        Stream=_Nothing, current_stream=_Nothing, stream=_Nothing, graph=_Nothing, CUDAGraph=_Replayed,
        graph_pool_handle=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(
        graphs, "torch", type("torch", (), {"cuda": cuda, "__getattr__": lambda self, name: getattr(torch, name)})()
    )

    def fill(self, target, arrays):
        target.copy_(torch.cat([torch.as_tensor(array, dtype=torch.int32) for array in arrays]))

    monkeypatch.setattr(common.paged.batch.Upload, "fill", fill)
    model, tokenizer = lively
    return with_kernels(model, runtime.Kernels.ALL), tokenizer

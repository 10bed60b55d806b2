"""Shared fixtures: small random models, and the embedded model where a test is about real weights."""

from __future__ import annotations

import os

# One thread a process: the tests run in two processes on two cores, and threads that wait for each other spin. Scripts
# that tests start inherit it. It counts only before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined, so before anything imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")

from common.checkpoint import load


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the smallest shape, random weights."""
    return load("random:tiny", device="cpu", dtype="float32", quiet=True)


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer) of the embedded model in float32 on the CPU; fetched and converted at the first use."""
    return load("embedded", device="cpu", dtype="float32", quiet=True)

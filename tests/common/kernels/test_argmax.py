"""Greedy ids against torch, in Triton's interpreter here and compiled in tests/gpu."""

import pytest
import torch

from common.kernels.argmax import argmax_triton


@pytest.mark.parametrize("rows, vocab_size", [(1, 1), (1, 2047), (1, 2048), (3, 2049), (2, 9001), (9, 5000)])
def test_equals_torch(rows, vocab_size):
    torch.manual_seed(rows * vocab_size)
    logits = torch.randn(rows, vocab_size)
    assert torch.equal(argmax_triton(logits), logits.argmax(-1))


def test_of_equal_logits_the_first_wins_wherever_they_are():
    logits = torch.zeros(4, 9000)
    logits[0, [8999, 2048, 2047]] = 1.0  # in different parts
    logits[1, [17, 16]] = 5.0  # in one part
    logits[2] = -3.0  # everywhere
    logits[3] = -torch.inf
    logits[3, 4444] = -1e30
    assert argmax_triton(logits).tolist() == [2047, 16, 0, 4444]


def test_counters_are_left_for_the_next_call():
    logits = torch.randn(2, 9000)
    first = argmax_triton(logits)
    assert torch.equal(first, argmax_triton(logits)) and torch.equal(first, logits.argmax(-1))

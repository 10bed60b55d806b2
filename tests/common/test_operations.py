"""The decoder with plainer operations: the same numbers, over the same tensors, by the kernels that it says.

Catches: a level that one operation ignores (an ablation that takes nothing away, a "plain" reference that runs the
kernel it is to judge), parts of a fused weight in the wrong columns, weights held twice.
"""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F

from common.attention import Prefill
from common.kernels import argmax as argmax_file
from common.kernels import linear as linear_file
from common.kernels import rms_norm as norm_file
from common.kernels import silu_mul as silu_file
from common.kernels.linear import Linear
from common.kernels.matvec import matvec_reference
from common.kernels.runtime import Kernels
from common.operations import UnfusedLinear, with_kernels

WAYS = [(Kernels.PLAIN, False), (Kernels.PLAIN, True), (Kernels.FUSED, True), (Kernels.FUSED, False)]


def logits(model, prompt):
    return model.logits(model.forward(torch.tensor(prompt), Prefill(model, [len(prompt)])))


def test_parts_of_a_weight_give_the_columns_that_the_whole_gives():
    draw = random.Random(0)
    for trial in range(30):
        sizes = [draw.randint(1, 40) for _ in range(draw.randint(1, 4))]
        rows, width = draw.choice([1, 2, 7, 33]), draw.randint(1, 50)
        generator = torch.Generator().manual_seed(trial)
        weight, x = torch.randn(sum(sizes), width, generator=generator), torch.randn(rows, width, generator=generator)
        got = UnfusedLinear(weight, sizes)(x)
        assert got.is_contiguous() and (got.double() - x.double() @ weight.double().T).abs().max() < 1e-5 * width


@pytest.mark.parametrize("kernels, fused", WAYS)
def test_every_way_gives_the_same_logits(kernels, fused, lively):
    model, _ = lively
    prompt = [random.Random(1).randrange(model.config.vocab_size) for _ in range(50)]
    other = with_kernels(model, kernels, fused_weights=fused)
    expected, got = logits(model, prompt), logits(other, prompt)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    hidden = model.forward(torch.tensor(prompt), Prefill(model, [len(prompt)]))
    assert torch.equal(other.greedy(hidden), model.logits(hidden).argmax(-1))


def test_what_is_apart_is_multiplied_apart(lively, monkeypatch):
    model, _ = lively
    other, products, product = with_kernels(model, Kernels.PLAIN, fused_weights=False), [], F.linear

    def counted(x, weight):
        products.append(len(weight))
        return product(x, weight)

    monkeypatch.setattr(F, "linear", counted)
    logits(other, [5, 6, 7])
    c = model.config
    layer = [c.q_size, c.kv_size, c.kv_size, c.hidden_size, c.intermediate_size, c.intermediate_size, c.hidden_size]
    assert products == [*(layer * c.num_hidden_layers), c.vocab_size]


def test_plain_tensors_are_shared(lively):
    model = with_kernels(lively[0], Kernels.PLAIN)  # on a CPU this makes the plain weights
    for other in (with_kernels(model, Kernels.FUSED), with_kernels(model, Kernels.PLAIN, fused_weights=False)):
        for ours, theirs in zip(model.layers, other.layers):
            for field in dataclasses.fields(ours):
                mine, yours = (getattr(layer, field.name).weight for layer in (ours, theirs))
                assert mine.data_ptr() == yours.data_ptr(), field.name


def test_a_rank_has_no_plainer_form(lively):
    model, _ = lively
    first = model.layers[0]
    split = dataclasses.replace(first, o_proj=Linear(first.o_proj.weight, group=object()))
    with pytest.raises(ValueError, match="tensor-parallel"):
        with_kernels(dataclasses.replace(model, layers=(split, *model.layers[1:])), Kernels.PLAIN)


@pytest.fixture
def called(monkeypatch):
    """Names of our kernels as they are called, on a device that takes each of them; the plain versions compute."""
    names = set()

    def spy(module, name, compute):
        def kernel(*args, **options):
            names.add(name)
            return compute(*args, **options)

        monkeypatch.setattr(module, name, kernel)

    def product(x, weight, *, norm_weight=None, eps=0.0, residual=None, silu=False, out_dtype=None):
        return matvec_reference(x, weight, norm_weight=norm_weight, eps=eps, residual=residual, silu=silu)

    for module in (linear_file, norm_file, silu_file, argmax_file):
        monkeypatch.setattr(module, "runs_triton", lambda x: True)
    monkeypatch.setattr(linear_file, "small_gemm_pays", lambda x: True)
    monkeypatch.setattr(linear_file, "_can_prepack", lambda weight: False)
    spy(linear_file, "matvec", product)
    spy(linear_file, "small_gemm", product)
    spy(norm_file, "rms_norm_triton", norm_file.rms_norm_reference)
    spy(silu_file, "silu_mul_triton", silu_file.silu_mul_reference)
    spy(argmax_file, "argmax_triton", argmax_file.argmax_reference)
    return names


ELEMENTWISE = {"rms_norm_triton", "silu_mul_triton", "argmax_triton"}


@pytest.mark.parametrize(
    "kernels, tokens, expected",
    [
        (Kernels.PLAIN, 1, set()),
        (Kernels.PLAIN, 8, set()),
        (Kernels.FUSED, 1, ELEMENTWISE),
        (Kernels.FUSED, 8, ELEMENTWISE),
        (Kernels.ALL, 1, {"matvec", "rms_norm_triton", "argmax_triton"}),
        (Kernels.ALL, 8, {"small_gemm", "rms_norm_triton", "argmax_triton"}),
        (Kernels.ALL, 200, {"small_gemm", *ELEMENTWISE}),  # the head of the last 8 alone is small
    ],
)
def test_the_level_says_which_kernels_run(kernels, tokens, expected, lively, called):
    model = with_kernels(lively[0], kernels)
    prompt = [token % model.config.vocab_size for token in range(tokens)]
    hidden = model.forward(torch.tensor(prompt), Prefill(model, [tokens]))
    model.greedy(hidden[-8:])
    model.logits(hidden[-8:])
    assert called == expected

"""The decoder's products, prepacked and plain, against float64.

Catches: a prepacked layout that is wrong at some row count, a residual forgotten or overwritten in place, the plain
path rotting where the prepacked one is always taken, an all-reduce over the wrong thing.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from common.kernels import linear as linear_file
from common.kernels.linear import Linear, linear_add, norm_gate_up_silu, norm_linear
from common.kernels.rms_norm import Norm, rms_norm
from common.kernels.runtime import Kernels

ALL, FUSED = Kernels.ALL, Kernels.FUSED
SIZES = [(1, 1), (1, 64), (3, 5), (64, 64), (130, 96), (576, 192), (333, 77)]  # out, in


def tensors(out_size, in_size, rows, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(out_size, in_size), (rows, in_size), (rows, out_size)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_near(got, expected, terms):
    """Within float32 rounding of a sum of `terms` products of numbers of order 1."""
    assert (got.double() - expected).abs().max() < 3e-6 * (terms + 10)


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("out_size, in_size", SIZES)
@pytest.mark.parametrize("rows", [1, 2, 7, 32, 33, 100])
def test_products_are_float64s(prepack, out_size, in_size, rows):
    weight, x, residual = tensors(out_size, in_size, rows)
    linear = Linear(weight, kernels=ALL if prepack else FUSED)
    expected = x.double() @ weight.double().T
    assert_near(linear(x), expected, in_size)
    before = x.clone()
    assert_near(linear.plus(x, residual.clone()), expected + residual.double(), in_size)
    assert_near(linear_add(x, linear, residual.clone()), expected + residual.double(), in_size)
    assert torch.equal(x, before)  # the residual may be overwritten, the input may not


def test_this_cpu_prepacks_or_says_why_not():
    """The operators are private to torch: a version that drops them must be noticed here, not in a slow demo."""
    packed = Linear(torch.randn(8, 8))
    assert packed.is_prepacked == torch.backends.mkldnn.is_available()
    assert not Linear(torch.randn(8, 8), kernels=FUSED).is_prepacked
    assert not Linear(torch.randn(8, 8).bfloat16()).is_prepacked


@pytest.mark.parametrize("missing", ["_reorder_linear_weight", "_linear_pointwise"])
def test_without_the_private_operators_the_plain_path_is_taken(missing, monkeypatch):
    class Without:
        def __getattr__(self, name):
            if name == missing:
                raise AttributeError(name)
            return getattr(torch.ops.mkldnn, name)

    ops = type("ops", (), {"mkldnn": Without()})
    real = linear_file.torch
    fake = type("torch", (), {"ops": ops, "__getattr__": lambda self, name: getattr(real, name)})()
    monkeypatch.setattr(linear_file, "torch", fake)
    weight, x, residual = tensors(16, 8, 3)
    linear = Linear(weight)
    assert not linear.is_prepacked
    torch.testing.assert_close(linear(x), F.linear(x, weight))
    torch.testing.assert_close(linear.plus(x, residual.clone()), residual + F.linear(x, weight))


@pytest.mark.parametrize("prepack", [True, False])
def test_the_weight_comes_back_bit_for_bit(prepack):
    rng = random.Random(0)
    for trial in range(20):
        weight = tensors(rng.randint(1, 200), rng.randint(1, 200), 1, trial)[0]
        assert torch.equal(Linear(weight, kernels=ALL if prepack else FUSED).weight, weight)


def test_rows_and_columns_of_a_larger_matrix_are_packed_right():
    """A slice is not contiguous: packed as if it were, it would hold other numbers."""
    whole, x, _ = tensors(40, 60, 3)
    part = whole[3:23, 7:47]
    linear = Linear(part)
    torch.testing.assert_close(linear(x[:, 7:47]), x[:, 7:47] @ part.T)
    assert torch.equal(linear.weight, part)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_16_bit_products(dtype, tolerance):
    weight, x, residual = tensors(48, 64, 5, dtype=dtype)
    linear = Linear(weight)
    expected = x.double() @ weight.double().T
    assert linear(x).dtype == dtype
    assert (linear(x).double() - expected).abs().max() < tolerance * 64
    assert (linear.plus(x, residual.clone()).double() - expected - residual.double()).abs().max() < tolerance * 64


def test_a_row_split_product_is_summed_over_its_group():
    """Two ranks' halves: each adds the residual once, after the sum."""
    weight, x, residual = tensors(16, 20, 4)
    parts = (slice(0, 12), slice(12, 20))
    partials = [Linear(weight[:, part])(x[:, part]) for part in parts]

    class Ranks:
        def all_reduce(self, tensor, residual):
            self.reduced = tensor.clone()
            return partials[0] + partials[1] + residual

    for part, partial in zip(parts, partials):
        ranks = Ranks()
        got = linear_add(x[:, part], Linear(weight[:, part], group=ranks), residual.clone())
        assert_near(got, x.double() @ weight.double().T + residual.double(), 20)
        assert torch.equal(ranks.reduced, partial)  # the residual is not in what is summed


def test_fused_operations_are_the_papers_lines():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 40, generator=generator) * 3
    norm = Norm(torch.randn(40, generator=generator), 1e-3)
    qkv, gate_up = (torch.randn(n, 40, generator=generator) / 6 for n in (24, 2 * 32))
    wide = x.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    assert_near(rms_norm(x, norm), normed, 1)
    assert_near(norm_linear(x, norm, Linear(qkv)), normed @ qkv.double().T, 40)
    gate, up = normed @ gate_up[:32].double().T, normed @ gate_up[32:].double().T
    assert_near(norm_gate_up_silu(x, norm, Linear(gate_up)), gate / (1 + (-gate).exp()) * up, 400)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_accumulates_in_float32(dtype):
    """Squares of 300 overflow float16; a mean of 4096 squares loses its end in bfloat16."""
    generator = torch.Generator().manual_seed(2)
    x = (300 * (1 + 0.1 * torch.randn(3, 4096, generator=generator))).to(dtype)
    got = rms_norm(x, Norm(torch.ones(4096, dtype=dtype), 1e-5))
    wide = x.double()
    expected = wide / wide.pow(2).mean(-1, keepdim=True).sqrt()
    assert ((got.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs()).all()

"""The CUDA C++ products against float64 on a Hopper GPU: every tile that is compiled, every cluster, odd sizes.

Catches: a part of x that a sharer did not load, parts of K added twice or not at all, rows or outputs past the end
written, a second wave of tiles that reads the first one's buffers, gate and up exchanged.
"""

from __future__ import annotations

import random

import pytest
import torch

from common.kernels.hopper_gemm import build, choose_plan, clusters_at_once, hopper_gemm, plans_of, runs_hopper_gemm

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
# rows, outputs, features: fewer tiles than multiprocessors and more, K not of whole blocks, nothing a multiple of a
# tile
SHAPES = [(1, 64, 512), (33, 1000, 4096), (64, 6144, 4096), (65, 264, 520), (128, 4096, 4096), (130, 40008, 136),
          (192, 4096, 1024), (200, 1544, 72), (256, 6144, 4096), (256, 30000, 128)]  # fmt: skip


@pytest.fixture(scope="module")
def clusters():
    assert build() is not None, "it could not be built: see the note on stderr"
    return clusters_at_once(torch.device("cuda", 0))


def check(rows, outputs, features, silu, plan, *, add):
    generator = torch.Generator("cuda").manual_seed(rows)
    options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(rows, features, **options)
    weight = torch.randn(outputs * (2 if silu else 1), features, **options) * features**-0.5
    residual = torch.randn(rows, outputs, **options) if add else None
    assert runs_hopper_gemm(x, weight), "it could not be built: see the note on stderr"
    got = hopper_gemm(x, weight, residual=residual, silu=silu, plan=plan)
    want = x.double() @ weight.double().T
    if silu:
        gate, up = want.chunk(2, dim=1)
        want = torch.nn.functional.silu(gate) * up
    if add:
        want = want + residual.double()
    error = (got.double() - want).abs().max().item()
    assert got.shape == want.shape and error < 0.03 * want.abs().max().item() + 0.02, (plan, error)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("rows, outputs, features", SHAPES)
def test_every_plan(rows, outputs, features, clusters):
    for plan in plans_of(rows, outputs, features, False, clusters):
        check(rows, outputs, features, False, plan, add=plan.sharers % 2 == 0)
    for plan in plans_of(rows, outputs, features, True, clusters):
        check(rows, outputs, features, True, plan, add=False)


def test_random_shapes_by_its_own_choice(clusters):
    rng = random.Random(0)
    for _ in range(40):
        rows, outputs, features = rng.randint(1, 256), 8 * rng.randint(1, 2000), 8 * rng.randint(8, 600)
        silu = rng.random() < 0.3
        plan = choose_plan(rows, outputs, features, silu, clusters)
        check(rows, outputs, features, silu, plan, add=not silu and rng.random() < 0.5)


def test_nothing_past_the_end_is_written():
    """The output is a part of a larger tensor whose rest must keep its value."""
    x = torch.randn(70, 512, device="cuda").bfloat16()
    weight = torch.randn(200, 512, device="cuda").bfloat16()
    memory = torch.full((80, 200), 7.0, device="cuda", dtype=torch.bfloat16)
    real = torch.empty
    try:
        torch.empty = lambda *shape, **options: memory[:70]
        got = hopper_gemm(x, weight)
    finally:
        torch.empty = real
    assert got.data_ptr() == memory.data_ptr() and (memory[70:] == 7).all()


def test_ten_calls_in_a_graph_that_depend_on_each_other():
    """Programmatic dependent launch: each call must wait for the one before it, whose output it reads."""
    w = [torch.randn(1024, 1024, device="cuda").bfloat16() * 1024**-0.5 for _ in range(10)]
    x = torch.randn(100, 1024, device="cuda").bfloat16()

    def run():
        y = x
        for i, weight in enumerate(w):
            y = hopper_gemm(y, weight, residual=y if i % 2 else None)
        return y

    want = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for _ in range(20):
        graph.replay()
        assert torch.equal(got, want)

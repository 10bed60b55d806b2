"""Bytes and operations of a step against counts by hand, and the bound that is the sum of its parts."""

import pytest

from common.config import SHAPES
from common.roofline import Ceilings
from common.serving import Work
from common.step_cost import part_costs, parts_seconds, step_cost

CONFIG = SHAPES["llama3-8b"]
CEILINGS = Ceilings("a GPU", "cuda", 4000.0, 5000.0, 0, {"bfloat16": {"burst": 700.0, "sustained": 600.0}})


def test_the_parts_of_a_prefill_by_hand():
    """1,000 tokens of Llama-3-8B in bfloat16; behind its attention the last layer sees the sampled row only."""
    costs = part_costs(CONFIG, 2, Work(1000, 0, 1, 0, 1000 * 1001 // 2))
    layers, d, f, kv = 32, 4096, 14336, 1024
    assert costs["qkv"].flops == 2 * layers * 1000 * d * (d + 2 * kv)
    assert costs["gate_up"].flops == 2 * (31 * 1000 + 1) * d * 2 * f
    assert costs["gate_up"].bytes == layers * d * 2 * f * 2
    assert costs["attention"].flops == 4 * 500_500 * 4096 * layers
    assert costs["head"].flops == 2 * d * 128_256


@pytest.mark.parametrize(
    "work", [Work(1000, 0, 1, 0, 500_500), Work(0, 64, 64, 64 * 900, 0), Work(500, 9, 10, 4000, 125_250)]
)
def test_the_sum_of_the_parts_is_a_nearer_bound_than_the_whole(work):
    parts = parts_seconds(CONFIG, 2, work, CEILINGS, "bfloat16")
    costs = part_costs(CONFIG, 2, work)
    for name in ("qkv", "attention", "head"):  # each at the nearer of its own two ceilings, read speed
        assert parts[name] == max(costs[name].bytes / 5000e9, costs[name].flops / 700e12)
    for name in ("norms", "rope+append", "sampling"):  # elementwise: copy speed
        assert parts[name] == costs[name].bytes / 4000e9
    assert sum(parts.values()) > step_cost(CONFIG, 2, work).seconds(CEILINGS, "bfloat16")


def test_a_mixed_step_s_parts_cost_more_than_their_overlap():
    """Decodes are bound by bytes in attention while the prompt's products are bound by operations: one hides behind the
    other in the bound of the whole, and not in the sum."""
    work = Work(2000, 256, 257, 256 * 4000, 2_001_000)
    whole = step_cost(CONFIG, 2, work).seconds(CEILINGS, "bfloat16")
    assert sum(parts_seconds(CONFIG, 2, work, CEILINGS, "bfloat16").values()) > 1.2 * whole

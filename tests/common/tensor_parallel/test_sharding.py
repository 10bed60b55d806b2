"""Which part of each weight a rank holds, without processes.

Catches: a head lost or held twice, a query head without its KV head, uneven parts, products whose parts do not add up.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.checkpoint import Shard, build
from common.config import SHAPES, ModelConfig
from common.errors import UserError
from common.tensor_parallel.sharding import even_parts, head_parts, shard_of
from common.tensor_source import RandomSource


@given(st.integers(1, 300), st.integers(1, 40))
def test_even_parts_cover_everything_once_and_evenly(total, parts):
    ranges = even_parts(total, parts)
    assert [i for part in ranges for i in part] == list(range(total))
    assert len(ranges) == parts
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(st.integers(1, 12), st.integers(1, 8), st.data())
def test_every_query_head_is_on_one_rank_with_its_kv_head(num_kv_heads, group, data):
    num_heads = num_kv_heads * group
    parts = data.draw(st.integers(1, num_heads))
    held = head_parts(num_heads, num_kv_heads, parts)
    assert len(held) == parts
    assert [q for q_heads, _ in held for q in q_heads] == list(range(num_heads))
    for q_heads, kv_heads in held:
        assert len(q_heads) > 0
        assert {q // group for q in q_heads} == set(kv_heads)
        if parts <= num_kv_heads:
            assert len(q_heads) == group * len(kv_heads)  # whole groups
        else:
            assert len(kv_heads) == 1
    kv_counts = [len(kv_heads) for _, kv_heads in held]
    assert max(kv_counts) - min(kv_counts) <= 1
    if parts > num_kv_heads:
        ranks_of = [sum(kv in kv_heads for _, kv_heads in held) for kv in range(num_kv_heads)]
        assert max(ranks_of) - min(ranks_of) <= 1


def test_the_embedded_models_nine_heads():
    assert head_parts(9, 3, 2) == [(range(0, 6), range(0, 2)), (range(6, 9), range(2, 3))]
    # Five ranks for three KV heads: 2 + 2 + 1, and a group's three query heads as 2 + 1.
    assert [len(q) for q, _ in head_parts(9, 3, 5)] == [2, 1, 2, 1, 3]
    assert [list(kv) for _, kv in head_parts(9, 3, 5)] == [[0], [0], [1], [1], [2]]


@pytest.mark.parametrize("shape, limit", [("smollm2-135m", 9), ("llama3-8b", 32)])
def test_more_ranks_than_query_heads_are_refused(shape, limit):
    shard_of(SHAPES[shape], limit - 1, limit)
    with pytest.raises(UserError, match=f"{limit + 1} processes cannot share {limit} query heads"):
        shard_of(SHAPES[shape], 0, limit + 1)


def random_config(rng: random.Random) -> ModelConfig:
    kv_heads, group = rng.randint(1, 5), rng.randint(1, 4)
    return dataclasses.replace(
        SHAPES["tiny"],
        vocab_size=rng.randint(300, 400),
        hidden_size=8 * rng.randint(2, 8),
        intermediate_size=rng.randint(40, 90),
        num_hidden_layers=1,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=2 * rng.randint(2, 8),
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_parts_of_each_product_make_the_whole_product(seed):
    """Column splits put side by side, and row splits added up, are the full products, whatever the sizes."""
    rng = random.Random(seed)
    config = random_config(rng)
    size = rng.randint(1, config.num_attention_heads)
    device, dtype = torch.device("cpu"), torch.float64

    def layer(shard):
        source = RandomSource(config, device, seed, "normal", dtype)
        model = build(config, source, shard, device, dtype)
        return model.layers[0], model.lm_head.weight

    whole, whole_head = layer(Shard.whole(config))
    shards = [shard_of(config, rank, size) for rank in range(size)]
    parts = [layer(shard) for shard in shards]

    d, q_size, kv_size = config.head_dim, config.q_size, config.kv_size
    q, k, v = whole.qkv.weight.split([q_size, kv_size, kv_size])
    for shard, (part, _) in zip(shards, parts):
        kv = slice(shard.kv_heads.start * d, shard.kv_heads.stop * d)
        expected = torch.cat([q[shard.q_heads.start * d : shard.q_heads.stop * d], k[kv], v[kv]])
        assert torch.equal(part.qkv.weight, expected)

    x = torch.randn(3, config.hidden_size, dtype=dtype)
    gates, ups = zip(*[part.gate_up(x).chunk(2, dim=-1) for part, _ in parts])
    torch.testing.assert_close(torch.cat([*gates, *ups], dim=-1), whole.gate_up(x))
    torch.testing.assert_close(torch.cat([x @ head.T for _, head in parts], dim=-1), x @ whole_head.T)

    a = torch.randn(3, q_size, dtype=dtype)
    heads = [slice(s.q_heads.start * d, s.q_heads.stop * d) for s in shards]
    torch.testing.assert_close(sum(p.o_proj(a[:, h]) for (p, _), h in zip(parts, heads)), whole.o_proj(a))
    g = torch.randn(3, config.intermediate_size, dtype=dtype)
    columns = [slice(s.ffn.start, s.ffn.stop) for s in shards]
    torch.testing.assert_close(sum(p.down_proj(g[:, c]) for (p, _), c in zip(parts, columns)), whole.down_proj(g))

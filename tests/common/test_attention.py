"""The attends: packed, cached, batched and padded give each sequence what it gets alone, from its own tokens only.

The oracle is a plain float64 attention over one sequence, written here, beside the full recompute. Catches: a mask
aligned to the wrong corner, rows that see each other, K and V of an earlier request read, a row that keeps computing
into another's slots after it left, angles of the wrong position.
"""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import attention
from common.attention import Decode, PaddedDecode, Prefill
from common.checkpoint import Shard, build
from common.config import SHAPES
from common.kv_cache import ContiguousKVCache
from common.tensor_source import RandomSource

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(SHAPES["tiny"], vocab_size=97, hidden_size=48, head_dim=8, num_attention_heads=6)
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def model():
    source = RandomSource(CONFIG, CPU, 0, "normal", torch.float32)
    read = source.read
    source.read = lambda *a: read(*a) * (3 if len(source.shape(a[0])) == 2 else 1)  # logits that differ by whole units
    return build(CONFIG, source, Shard.whole(CONFIG), CPU, torch.float32)


def new_cache(batch_size=1, max_len=64, fill=0.0):
    cache = ContiguousKVCache(CONFIG, batch_size, max_len, dtype=torch.float32, device="cpu")
    for layer in cache.layers:
        layer.fill_(fill)
    return cache


def prompts_of(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(CONFIG.vocab_size) for _ in range(n)] for n in lengths]


def alone(model, tokens):
    """Logits [V] after `tokens` by full recompute: no cache, no batch."""
    return model.logits(model.forward(torch.tensor(tokens), Prefill(model, [len(tokens)])))[-1]


def oracle_attention(q, k, v):
    """One sequence in float64: q [S, Hq, d], k, v [S, Hkv, d]; query i sees keys 0..i; Hq / Hkv queries a KV head."""
    q, k, v = (t.double().numpy() for t in (q, k, v))
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        kv_head = head // (q.shape[1] // k.shape[1])
        for i in range(len(q)):
            scores = k[: i + 1, kv_head] @ q[i, head] / math.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[i, head] = weights / weights.sum() @ v[: i + 1, kv_head]
    return out


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(6, 2, 8), (4, 4, 16), (5, 1, 6), (8, 4, 64)])
def test_attention_is_float64s(heads, kv_heads, head_dim):
    """Prefill over packed sequences and one decode step after each, against the plain formula."""
    generator = torch.Generator().manual_seed(heads)
    lengths = [1, 5, 5, 2, 17]
    sequences = [
        [torch.randn(n + 1, h, head_dim, generator=generator) for h in (heads, kv_heads, kv_heads)] for n in lengths
    ]
    config = dataclasses.replace(CONFIG, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    prefill = Prefill.__new__(Prefill)
    prefill.lengths = lengths
    q, k, v = (torch.cat([s[part][:-1] for s in sequences]) for part in range(3))
    got = prefill.attention(0, q, k, v).split(lengths)
    for out, sequence in zip(got, sequences):
        expected = oracle_attention(*sequence)
        assert np.abs(out.numpy() - expected[:-1]).max() < 1e-5
        last_q, keys, values = sequence[0][-1:], *(t.transpose(0, 1).unsqueeze(0) for t in sequence[1:])
        decoded = attention.decode_attention(last_q, keys, values)
        assert decoded.shape == (1, config.num_attention_heads, head_dim)
        assert np.abs(decoded.numpy()[0] - expected[-1]).max() < 1e-5


def test_tiles_of_queries_are_the_whole(monkeypatch):
    """On a CPU long prompts go tile by tile: every length around the tiles' ends, against the plain formula."""
    monkeypatch.setattr(attention, "CPU_TILE", 4)
    generator = torch.Generator().manual_seed(0)
    for length in range(1, 18):
        q, k, v = (torch.randn(2, length, heads, 8, generator=generator) for heads in (6, 2, 2))
        got = attention.causal_attention(q, k, v).view(2, length, 6, 8)
        for row in range(2):
            assert np.abs(got[row].numpy() - oracle_attention(q[row], k[row], v[row])).max() < 1e-5, length


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(0, 1000), st.data())
def test_random_batches_are_their_rows_alone(model, lengths, seed, data):
    """Unequal prompts, then decode steps in which rows leave at random: every row's logits are its own."""
    sequences = prompts_of(lengths, seed)
    cache = new_cache(len(lengths), 32, fill=math.nan)  # anything read that was not written shows as NaN
    last = torch.tensor(lengths).cumsum(0) - 1
    packed = torch.tensor([t for s in sequences for t in s])
    logits = model.logits(model.forward(packed, Prefill(model, lengths, cache), last))
    active = list(range(len(lengths)))
    for step in range(5):
        for row, got in zip(active, logits):
            assert (got - alone(model, sequences[row])).abs().max() < TOLERANCE
        tokens = logits.argmax(-1).tolist()
        for row, token in zip(active, tokens):
            sequences[row].append(token)
        keep = data.draw(st.lists(st.booleans(), min_size=len(active), max_size=len(active)))
        if step == 4 or not any(keep):
            break
        new = torch.tensor([t for t, k in zip(tokens, keep) if k])
        active = [row for row, k in zip(active, keep) if k]
        logits = model.logits(model.forward(new, Decode(model, cache, active)))


@pytest.mark.parametrize("lengths", [[4], [3, 9, 1], [7, 7, 2, 7, 7], [20, 1, 1, 20]])
@pytest.mark.parametrize("rows", ["all", "some", "reordered"])
def test_padded_decode_is_packed_decode(model, lengths, rows):
    chosen = list(range(len(lengths)))
    if rows == "some":
        chosen = chosen[::2]
    elif rows == "reordered":
        chosen = chosen[::-1]
    results = []
    for kind in (Decode, PaddedDecode):
        cache = new_cache(len(lengths), 32)
        packed = torch.tensor([t for s in prompts_of(lengths) for t in s])
        model.forward(packed, Prefill(model, lengths, cache))
        steps = [model.forward(torch.tensor([5 + i for i in chosen]), kind(model, cache, chosen)) for _ in range(3)]
        results.append(torch.stack(steps))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def logits_after_reuse(model, prompt):
    """Logits of a decode step on a row whose storage an earlier, longer request has filled."""
    cache = new_cache(2, 32, fill=math.nan)
    cache.lengths = [0, 0]
    packed = torch.tensor(prompt + prompt[:2])
    model.forward(packed, Prefill(model, [len(prompt), 2], cache))
    hidden = model.forward(torch.tensor([3, 4]), Decode(model, cache))
    return model.logits(hidden)[0]


def test_nothing_of_an_earlier_request_is_read(model):
    """Every slot that this request has not written holds NaN: one of them read, and the logits are NaN."""
    prompt = prompts_of([6])[0]
    assert (logits_after_reuse(model, prompt) - alone(model, [*prompt, 3])).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "bug", ["one slot too many", "rows of another", "position of the next", "not causal", "top-left"]
)
def test_the_comparison_sees_known_bugs(model, bug, monkeypatch):
    """Each bug put back as a patch: what `test_nothing_of_an_earlier_request_is_read` asserts must then fail."""
    prompt = prompts_of([6])[0]
    expected = alone(model, [*prompt, 3])
    if bug == "one slot too many":
        runs = Decode.runs.func
        monkeypatch.setattr(Decode, "runs", property(lambda self: [(r, n, length + 1) for r, n, length in runs(self)]))
    elif bug == "rows of another":
        runs = Decode.runs.func
        monkeypatch.setattr(Decode, "runs", property(lambda self: [(1 - r, n, 3) for r, n, length in runs(self)]))
    elif bug == "position of the next":
        at = attention.RotaryTable.at
        monkeypatch.setattr(attention.RotaryTable, "at", lambda self, p: at(self, p + (p > 5).to(p.dtype)))
    else:
        real = torch.nn.functional.scaled_dot_product_attention

        def wrong(q, k, v, *, is_causal=False, attn_mask=None, enable_gqa=False):
            # "top-left": a decode's one query counted as the first position, so that it sees the first key only
            causal = bug == "top-left" if q.shape[-2] != k.shape[-2] else is_causal and bug != "not causal"
            return real(q, k, v, is_causal=causal, attn_mask=attn_mask, enable_gqa=enable_gqa)

        monkeypatch.setattr(attention.F, "scaled_dot_product_attention", wrong)
    error = (logits_after_reuse(model, prompt) - expected).abs().max()
    assert not error < 10 * TOLERANCE  # NaN counts as seen


def test_a_sequence_does_not_see_its_neighbours(model):
    """Neighbours changed token by token: nothing of row 1 moves by a single bit."""
    lengths = [5, 8, 3]
    base = prompts_of(lengths, 1)
    want = model.forward(torch.tensor(sum(base, [])), Prefill(model, lengths))[5:13]
    for seed in range(5):
        other = prompts_of(lengths, 10 + seed)
        got = model.forward(torch.tensor(other[0] + base[1] + other[2]), Prefill(model, lengths))[5:13]
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_cache_refuses_what_does_not_fit_and_names_the_row(model):
    cache = new_cache(3, 8)
    with pytest.raises(ValueError, match=r"row 1: 0 \+ 9 tokens, but max_len is 8"):
        Prefill(model, [8, 9, 1], cache)
    assert cache.lengths == [0, 0, 0]  # all or nothing
    Prefill(model, [8, 7, 1], cache)
    with pytest.raises(ValueError, match="row 0"):
        Decode(model, cache)
    Decode(model, cache, [1, 2])
    assert cache.lengths == [8, 8, 2]
    assert cache.num_bytes == 2 * 2 * 3 * 2 * 8 * 8 * 4


def test_prefill_is_for_an_empty_cache(model):
    """It starts at position 0: over rows that hold tokens it would overwrite them under wrong positions."""
    cache = new_cache(1, 32)
    model.forward(torch.tensor([1, 2]), Prefill(model, [2], cache))
    with pytest.raises(ValueError, match="empty"):
        Prefill(model, [2], cache)

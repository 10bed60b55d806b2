"""Sampling against a float64 model of it, and against the distribution it claims.

Catches: a filter off by one, an excluded token drawn, noise that depends on the batch, a temperature applied twice,
noise that is infinite (every hash value must give a finite number).
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from common import sampling
from common.errors import UserError
from common.sampling import GREEDY, SamplingParams, sample


def logits_of(rows: int, vocab: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def allowed(logits: list[float], p: SamplingParams) -> set[int]:
    """Brute force in float64: which token ids may be drawn."""
    scaled = [x / p.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if p.top_k:
        order = order[: p.top_k]
    weights = [math.exp(scaled[i] - scaled[order[0]]) for i in order]
    probabilities = [w / math.fsum(weights) for w in weights]
    kept, mass = set(), 0.0
    for i, probability in zip(order, probabilities):
        if not kept or ((mass < p.top_p or p.top_p == 1) and probability >= p.min_p * probabilities[0]):
            kept.add(i)
        mass += probability
    return kept


def test_greedy_is_the_argmax_whatever_the_rest():
    logits = logits_of(6, 50, 0)
    assert sample(logits, [GREEDY] * 6, [0] * 6).tolist() == logits.argmax(-1).tolist()
    mixed = [GREEDY, SamplingParams(temperature=5.0, seed=1)] * 3
    got = sample(logits, mixed, [9] * 6)
    assert got[::2].tolist() == logits[::2].argmax(-1).tolist()
    assert got.dtype == torch.int64


def test_filters_are_the_float64_models():
    rng = random.Random(1)
    for trial in range(150):
        p = SamplingParams(
            temperature=rng.choice([0.3, 1.0, 2.5]),
            top_k=rng.choice([0, 1, 2, 5, 20, 40, 1000]),
            top_p=rng.choice([1.0, 0.99, 0.9, 0.5, 0.1, 1e-6]),
            min_p=rng.choice([0.0, 0.001, 0.05, 0.5, 1.0]),
        )
        logits = logits_of(1, 40, trial)
        columns = [torch.tensor([[v]]) for v in (p.top_k or 40, p.top_p, p.min_p)]
        filtered = sampling._filtered(logits / p.temperature, *columns)[0]
        kept = {i for i, x in enumerate(filtered.tolist()) if x > -math.inf}
        assert kept == allowed(logits[0].double().tolist(), p), p
        assert torch.equal(filtered[sorted(kept)], (logits / p.temperature)[0, sorted(kept)])


def test_top_p_of_one_cuts_nothing_beside_rows_that_are_cut():
    """A float32 sum over a large vocabulary reaches 1 before its tail."""
    filtered = sampling._filtered(
        logits_of(8, 50_000, 1),
        torch.full((8, 1), 50_000),
        torch.tensor([[1.0, 0.5] * 4]).T,
        torch.zeros(8, 1),
    )
    kept = (filtered > -math.inf).sum(-1)
    assert (kept[::2] == 50_000).all() and (kept[1::2] < 25_000).all()


def test_every_row_is_filtered_by_its_own_settings():
    rng = random.Random(2)
    logits = logits_of(64, 30, 7)
    params = [
        SamplingParams(
            rng.choice([0.5, 2.0]), rng.choice([0, 1, 3]), rng.choice([1.0, 0.6]), rng.choice([0, 0.2]), seed
        )
        for seed in range(64)
    ]
    for position in range(20):
        drawn = sample(logits, params, [position] * 64).tolist()
        for row, token in enumerate(drawn):
            assert token in allowed(logits[row].double().tolist(), params[row])


def test_a_request_draws_the_same_whatever_its_batch():
    logits = logits_of(32, 200, 3)
    params = [SamplingParams(temperature=1.3, top_p=0.95 if i % 3 else 1.0, seed=i % 5) for i in range(32)]
    positions = [random.Random(i).randrange(5000) for i in range(32)]
    together = sample(logits, params, positions).tolist()
    alone = [int(sample(logits[i : i + 1], [params[i]], [positions[i]])) for i in range(32)]
    assert together == alone
    order = random.Random(0).sample(range(32), 32)
    shuffled = sample(logits[order], [params[i] for i in order], [positions[i] for i in order]).tolist()
    assert shuffled == [together[i] for i in order]


def test_seed_and_position_change_the_draw():
    logits = torch.zeros(400, 1000)
    by_seed = sample(logits, [SamplingParams(1.0, seed=i) for i in range(400)], [5] * 400).tolist()
    by_position = sample(logits, [SamplingParams(1.0, seed=5)] * 400, list(range(400))).tolist()
    for drawn in (by_seed, by_position):
        assert len(set(drawn)) > 280  # 400 draws of 1000 hit 330 different ones, give or take 9
    same = sum(a == b for a, b in zip(by_seed, by_position))  # seed i at 5 against seed 5 at i
    assert same < 10


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_draws_follow_the_softmax(temperature, along):
    """Chi-square over 12 tokens and 40,000 draws: p < 1e-6 is refused (limit 49.3 at 11 degrees of freedom)."""
    logits = logits_of(1, 12, 11, spread=1.0)
    count = 40_000
    seeds = range(count) if along == "seeds" else [3] * count
    positions = [3] * count if along == "seeds" else range(count)
    params = [SamplingParams(temperature, seed=s) for s in seeds]
    drawn = sample(logits.expand(count, 12), params, list(positions))
    expected = (logits[0].double() / temperature).softmax(-1) * count
    observed = torch.bincount(drawn, minlength=12).double()
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 49.3, (observed.tolist(), expected.tolist())


def test_the_noise_is_gumbels_and_finite_over_the_whole_range_of_the_hash(monkeypatch):
    """The extreme hash values included: noise of +inf would draw a token whatever its logit, once in 2^24 numbers."""
    extremes = torch.tensor([[0, -1, 1 << 62, (1 << 63) - 1, -(1 << 63), (1 << 40) - 1, -(1 << 40), (1 << 24) - 1]])
    calls = []

    def mix(x):  # the third call hashes seed, position and token id together
        calls.append(x)
        return extremes if len(calls) == 3 else x

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_mix", mix)
        noise = sampling._gumbel(torch.tensor([[0]]), torch.tensor([[0]]), extremes.shape[1])
    assert len(calls) == 3 and torch.isfinite(noise).all(), noise
    many = sampling._gumbel(torch.arange(400).unsqueeze(1), torch.tensor([[7]] * 400), 5000).double()
    assert abs(float(many.mean()) - 0.5772157) < 0.005  # Euler's constant; standard error 0.0009
    assert abs(float(many.std()) - math.pi / math.sqrt(6)) < 0.005
    for x in (-1.5, 0.0, 2.0, 6.0, 10.0):
        share = math.exp(-math.exp(-x))
        assert abs(float((many < x).double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / many.numel()) + 1e-7


def test_a_vanishing_temperature_is_greedy():
    logits = logits_of(8, 100, 4, spread=20.0)
    for temperature in (1e-3, 1e-12, 1e-30, 1e-45, 5e-324):
        got = sample(logits, [SamplingParams(temperature, seed=i) for i in range(8)], list(range(8)))
        assert got.tolist() == logits.argmax(-1).tolist(), temperature


def test_the_only_token_that_is_left_is_drawn():
    logits = logits_of(2000, 50, 5)
    got = sample(logits, [SamplingParams(3.0, top_k=1, seed=i) for i in range(2000)], [1] * 2000)
    assert torch.equal(got, logits.argmax(-1))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.5},
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        SamplingParams(**settings)


def test_any_seed_is_a_seed():
    logits = torch.zeros(5, 100)
    seeds = [-1, 2**31, 2**63 - 1, 2**64 - 1, 10**30]
    drawn = sample(logits, [SamplingParams(1.0, seed=s) for s in seeds], [0] * 5)
    assert ((drawn >= 0) & (drawn < 100)).all()

"""The master test itself: it finds one wrong token anywhere, and lets pass nothing but a real tie.

Catches: a check that is satisfied by rows that are too short, a tie judged by the wrong logits, ties without a limit.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from common import equality
from common.equality import differences, greedy_reference, next_logits, require_equal
from common.errors import CheckFailed

PROMPTS = [[5, 9, 200], [7], [30, 31, 32, 33, 34]]


@pytest.fixture(scope="module")
def expected(tiny):
    return [greedy_reference(tiny[0], prompt, 6) for prompt in PROMPTS]


def test_the_reference_is_one_argmax_after_another(tiny, expected):
    model, _ = tiny
    for prompt, tokens in zip(PROMPTS, expected):
        for step, token in enumerate(tokens):
            logits = next_logits(model, prompt + tokens[:step])
            assert logits.dtype == torch.float32 and int(logits.argmax()) == token


def test_equal_rows_are_equal(tiny, expected):
    sentence = require_equal(tiny[0], PROMPTS, expected, [list(row) for row in expected], "a against b")
    assert sentence == "a against b: the same tokens"


def test_one_wrong_token_is_found_wherever_it_stands(tiny, expected):
    rng = random.Random(0)
    for row in range(3):
        for step in range(6):
            got = [list(r) for r in expected]
            got[row][step] = (got[row][step] + rng.randint(1, 500)) % 512
            got[row][step + 1 :] = [rng.randrange(512) for _ in got[row][step + 1 :]]
            with pytest.raises(CheckFailed, match=f"here: row {row} differs at output token {step} ") as caught:
                require_equal(tiny[0], PROMPTS, expected, got, "here")
            assert f"expected {expected[row][step]}, got {got[row][step]}" in str(caught.value)


@pytest.mark.parametrize("length", [0, 5, 7])
def test_a_row_of_another_length_is_not_equal(tiny, expected, length):
    got = [list(row) for row in expected]
    got[1] = (got[1] + [3])[:length]
    with pytest.raises(CheckFailed, match=f"row 1 has {length} tokens, 6 were expected"):
        require_equal(tiny[0], PROMPTS, expected, got, "here")


def with_logits(monkeypatch, *values):
    """The reference's logits are these, whatever the tokens."""
    logits = torch.tensor(values)
    monkeypatch.setattr(equality, "next_logits", lambda model, tokens: logits)


def test_a_tie_is_accepted_and_counted(tiny, expected, monkeypatch):
    got = [list(row) for row in expected]
    got[2][3:] = [1, 2, 3]
    with_logits(monkeypatch, 4.0, 4.00005, -1.0)
    (found,) = differences(tiny[0], PROMPTS, expected, got)
    assert (found.row, found.step, found.is_tie) == (2, 3, True) and found.margin == pytest.approx(5e-5, rel=0.1)
    assert require_equal(tiny[0], PROMPTS, expected, got, "x") == "x: the same tokens (1 parted at a near-tie)"
    with_logits(monkeypatch, 4.0, 4.0002, -1.0)
    with pytest.raises(CheckFailed, match="row 2 differs at output token 3"):
        require_equal(tiny[0], PROMPTS, expected, got, "x")


@pytest.mark.parametrize("dtype, tie", [(torch.bfloat16, True), (torch.float16, False), (torch.float32, False)])
def test_a_tie_is_as_wide_as_the_dtype_rounds(expected, monkeypatch, dtype, tie):
    got = [list(row) for row in expected]
    got[1][5] += 1
    with_logits(monkeypatch, -3.0, 10.0, 9.5)
    (found,) = differences(SimpleNamespace(dtype=dtype), PROMPTS, expected, got)
    assert found.is_tie is tie
    with_logits(monkeypatch, -3.0, 10.0, 9.2)
    assert not differences(SimpleNamespace(dtype=dtype), PROMPTS, expected, got)[0].is_tie


def test_ties_are_judged_at_the_first_differing_step_after_the_expected_tokens(tiny, expected, monkeypatch):
    got = [list(row) for row in expected]
    got[0][2:] = [400, 401, 402, 403]
    asked = []

    def next_logits_(model, tokens):
        asked.append(list(tokens))
        return torch.tensor([1.0, 1.0])

    monkeypatch.setattr(equality, "next_logits", next_logits_)
    differences(tiny[0], PROMPTS, expected, got)
    assert asked == [PROMPTS[0] + expected[0][:2]]


def test_more_ties_than_chance_explains_are_a_failure(tiny, expected, monkeypatch):
    got = [[(t + 1) % 512 for t in row] for row in expected]
    with_logits(monkeypatch, 4.0, 4.0)
    with pytest.raises(CheckFailed, match="3 of 3 rows part at near-ties"):
        require_equal(tiny[0], PROMPTS, expected, got, "x")
    many = 300
    rows = [list(expected[1]) for _ in range(many)]
    wrong = [[(t + 1) % 512 for t in row] if i < 4 else row for i, row in enumerate(rows)]
    with pytest.raises(CheckFailed, match="4 of 300"):
        require_equal(tiny[0], [PROMPTS[1]] * many, rows, wrong, "x")
    wrong[3] = rows[3]
    assert "3 parted" in require_equal(tiny[0], [PROMPTS[1]] * many, rows, wrong, "x")

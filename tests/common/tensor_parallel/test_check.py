"""The comparison of several ranks with one device: which logits, how far is too far, whose file is used.

Catches: a limit that rounding passes or that a wrong part keeps within, a context that is not forced, rows or positions
in another order, a reference of another run or model, a file that a kill leaves in half.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F

from common.checkpoint import Shard, build
from common.config import SHAPES
from common.engine import Engine
from common.equality import next_logits
from common.errors import CheckFailed
from common.kernels.linear import Linear
from common.kernels.runtime import Kernels
from common.operations import with_kernels
from common.tensor_parallel import check
from common.tensor_parallel.check import Distance, Saved, forced_logits, judge, read_logits, save_logits, tolerance
from common.tensor_source import RandomSource

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9], [3, 2, 3, 8, 4], [6, 2, 6, 4, 3], [3, 8, 3, 2, 7]]
FORCED = [[11, 12, 13], [21, 22, 23], [31, 32, 33], [41, 42, 43], [51, 52, 53], [61, 62, 63]]


def engine_of(model, batch_size=6, num_pages=60):
    return Engine(model, page_size=4, num_pages=num_pages, max_requests=batch_size)


# --- which logits ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "batch_size, rows",
    [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 4]), (32, [0, 10, 20, 31])],
)
def test_rows(batch_size, rows):
    assert check.checked_rows(batch_size) == rows


@pytest.mark.parametrize("fixture", ["lively", "pretend_gpu"])
def test_forced_logits_are_those_of_a_full_recompute(fixture, request):
    """Each row's own context, whatever the model samples (random tokens are never what it would have), and in graphs,
    whose results the next step overwrites.
    """
    model, _ = request.getfixturevalue(fixture)
    engine = engine_of(model)
    assert (engine.graphs is not None) == (fixture == "pretend_gpu")
    found = forced_logits(engine, PROMPTS, FORCED)
    assert found.shape == (4, 4, model.config.vocab_size)
    plain = with_kernels(model, Kernels.PLAIN)  # and not our kernels, which the interpreter takes long for
    for line, row in enumerate([0, 1, 3, 5]):
        for step in range(4):
            expected = next_logits(plain, [*PROMPTS[row], *FORCED[row][:step]])
            torch.testing.assert_close(found[line, step], expected.cpu(), rtol=1e-4, atol=1e-4)
    assert engine.num_free_pages == engine.pool.capacity


def test_the_reference_follows_its_own_tokens_and_takes_no_page_beyond_them(lively):
    model, _ = lively
    for length, steps in ((1, 0), (2, 1), (30, 3)):
        generated = [list(range(100 + row, 100 + row + length)) for row in range(2)]
        saved = Saved()
        saved.look(engine_of(model, 2, num_pages=2 * -(-(5 + length) // 4)), PROMPTS[:2], generated)
        assert saved.forced == {2: [row[:steps] for row in generated]}
        assert saved.logits[2].shape == (2, steps + 1, model.config.vocab_size)


# --- how far is too far ----------------------------------------------------------------------------------------------
class OverTwoRanks(Linear):
    """What two ranks compute of a row split, in one process: each half of the inputs rounded, then their sum."""

    def __init__(self, weight, second=1.0):
        super().__init__(weight, group=self)
        self.parts, self.second = weight.tensor_split(2, dim=1), second

    def __call__(self, x):
        halves = x.split([part.shape[1] for part in self.parts], dim=1)
        return F.linear(halves[0], self.parts[0]) + F.linear(halves[1], self.parts[1]) * self.second

    def all_reduce(self, x, residual):
        return x + residual


def split(model, second=1.0):
    layers = tuple(
        dataclasses.replace(w, o_proj=OverTwoRanks(w.o_proj.weight, second), down_proj=OverTwoRanks(w.down_proj.weight))
        for w in model.layers
    )
    return dataclasses.replace(model, layers=layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_layers", [2, 8, 32])
def test_the_limit_is_above_rounding_and_below_a_wrong_part(num_layers, dtype):
    """At each depth: one limit for all would be too tight for 32 layers or too wide for 2."""
    config = dataclasses.replace(SHAPES["tiny"], num_hidden_layers=num_layers, hidden_size=128, intermediate_size=448)
    source = RandomSource(config, torch.device("cpu"), 5, "normal", dtype)
    model = build(config, source, Shard.whole(config), torch.device("cpu"), dtype)
    expected = forced_logits(engine_of(model), PROMPTS, FORCED)
    limit = tolerance(dtype, num_layers)
    rounding = Distance.between(forced_logits(engine_of(split(model)), PROMPTS, FORCED), expected)
    assert rounding.within(limit / 1.5)
    if dtype != torch.float32:
        assert not rounding.within(limit / 20)  # the two do round differently, or the test would say nothing
    wrong = Distance.between(forced_logits(engine_of(split(model, 1.1)), PROMPTS, FORCED), expected)
    assert not wrong.within(limit)


def test_distance_in_figures():
    expected = torch.tensor([[[3.0, 4.0, 0.0]], [[0.0, 0.0, 10.0]]])
    got = expected + torch.tensor([[[0.0, 0.0, 0.5]], [[0.0, -2.0, 0.0]]])
    found = Distance.between(got, expected)
    assert (found.rows, found.positions) == (2, 1)
    assert found.relative_error == pytest.approx(0.2)  # 2 of 10; the first row's: 0.5 of 5
    assert found.largest_difference == pytest.approx(0.2)  # 2 of 10 - 0; the first row's: 0.5 of 4 - 0
    assert found.within(0.21) and not found.within(0.19)


def test_one_wrong_logit_among_many_is_seen():
    expected = torch.randn(4, 4, 100_000, generator=torch.Generator().manual_seed(1))
    got = expected.clone()
    got[3, 2, 77_777] += 2.0
    found = Distance.between(got, expected)
    assert found.relative_error < 0.01 and not found.within(0.125)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_far(bad):
    expected = torch.randn(1, 2, 10, generator=torch.Generator().manual_seed(1))
    got = expected.clone()
    got[0, 1, 3] = bad
    assert Distance.between(got, expected).relative_error == math.inf
    assert not Distance.between(got, expected).within(1e9)


# --- the verdict -----------------------------------------------------------------------------------------------------
TOKENS = {1: [[1, 2, 3]], 3: [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}


def judged(model, dtype, tokens, expected, distances):
    model = dataclasses.replace(model, embed_tokens=model.embed_tokens.to(dtype))
    return judge(model, tokens, lambda size: PROMPTS[:size], expected, distances)


def near(error=0.01):
    return Distance(3, 4, error, error / 2)


def test_in_16_bits_tokens_that_part_are_counted(lively):
    other = {1: TOKENS[1], 3: [[1, 2, 3], [4, 0, 6], [7, 8, 0]]}
    verdict = judged(lively[0], torch.bfloat16, other, TOKENS, {1: near(), 3: near()})
    said = str(verdict)
    assert "batch 1 against one device: the same tokens; the logits of 3 x 4 positions" in said
    assert "batch 3 against one device: 2 of 3 rows' tokens part, the first at output token 1; the logits" in said
    assert (
        "off by at most 0.01 of their norm, none by more than 0.005 of their spread (limit 0.039 in bfloat16)" in said
    )
    verdict.raise_problems()


def test_logits_that_are_off_fail_with_the_same_tokens_too(lively):
    verdict = judged(lively[0], torch.bfloat16, TOKENS, TOKENS, {1: near(), 3: near(0.2)})
    with pytest.raises(CheckFailed, match=r"^batch 3 against one device: the logits .* at most 0.2 .* explains 0.039$"):
        verdict.raise_problems()
    assert "batch 1 against one device: the same tokens; the logits" in str(verdict)
    with pytest.raises(CheckFailed, match="rounding to float32 explains 0.0001"):
        judged(lively[0], torch.float32, TOKENS, TOKENS, {1: near(), 3: near(0.0)}).raise_problems()


def test_in_float32_tokens_must_be_the_same(lively):
    other = {1: [[1, 0, 3]], 3: TOKENS[3]}
    verdict = judged(lively[0], torch.float32, other, TOKENS, {1: near(0.0), 3: near(0.0)})
    with pytest.raises(CheckFailed, match="batch 1 against one device: row 0 differs at output token 1"):
        verdict.raise_problems()


def test_a_missing_reference_is_said(lively):
    nothing = judged(lively[0], torch.bfloat16, TOKENS, {}, {})
    assert str(nothing) == "no tokens of one device to compare with; run transformer-w3l1.py on the same sizes"
    no_logits = judged(lively[0], torch.bfloat16, TOKENS, TOKENS, {})
    assert "no logits of one device to compare with; run transformer-w3l1.py again" in str(no_logits)
    nothing.raise_problems()
    no_logits.raise_problems()


# --- whose file ------------------------------------------------------------------------------------------------------
RECORD = {
    "utc_time": "2026-01-02T03:04:05Z", "model": "random:tiny", "dtype": "bfloat16", "seed": 0, "device": "cpu",
    "shapes": {"hidden_size": 64}, "prompt_length": 16, "n1": 2, "n2": 6,
}  # fmt: skip


def some():
    generator = torch.Generator().manual_seed(1)
    logits = {size: torch.randn(min(size, 4), 3, 50, generator=generator) for size in (1, 8)}
    return Saved({size: [[row, 7] for row in range(size)] for size in (1, 8)}, logits)


def test_what_is_saved_is_read(tmp_path):
    saved = some()
    assert save_logits(tmp_path, RECORD, saved) == tmp_path / "transformer_w3l1_logits.safetensors"
    found = read_logits(tmp_path, json.loads(json.dumps(RECORD)))
    assert found.forced == saved.forced
    assert found.logits.keys() == {1, 8}
    assert all(found.logits[size].equal(saved.logits[size]) for size in (1, 8))
    assert os.listdir(tmp_path) == ["transformer_w3l1_logits.safetensors"]


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"model": "random:other"}, {"dtype": "float16"}, {"shapes": {"hidden_size": 65}}, {"n2": 7},
     {"utc_time": "2026-01-02T03:04:06Z"}],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_another_run_s_logits_are_not_used(other, tmp_path):
    save_logits(tmp_path, RECORD, some())
    assert read_logits(tmp_path, RECORD | other) == Saved()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing"])
def test_a_damaged_file_is_not_used(damage, tmp_path):
    path = save_logits(tmp_path, RECORD, some())
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": path.read_bytes()[:-20], "empty": b"", "text": b"not tensors at all"}[damage])
    assert read_logits(tmp_path, RECORD) == Saved()


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = save_logits(tmp_path, RECORD, some())
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            save_logits(tmp_path, RECORD | {"seed": 3}, some())
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("other", [{}, {"seed": 1}, {"model": "random:other"}, {"device": "cuda:0"}])
def test_the_reference_is_of_the_same_model_and_sizes(other, tmp_path):
    (tmp_path / "transformer_w3l1.csv").write_text("batch_size,time_us\n1,10.5\n8,20\n")
    (tmp_path / "transformer_w3l1.json").write_text(json.dumps(RECORD | {"output_token_ids": {"1": [[5, 6]]}}))
    save_logits(tmp_path, RECORD, some())
    found = check.read_reference(tmp_path, RECORD | {"utc_time": "later", "world": 2} | other)
    if other:
        assert found == check.Reference()
    else:
        assert found.step_us == {1: 10.5, 8: 20} and found.tokens == {1: [[5, 6]]}
        assert found.saved.forced == some().forced

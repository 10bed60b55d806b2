"""The proof in 16 bits: figures against Hugging Face's logits, limits that hold at their edges, bugs that it must
see.
"""

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import fidelity
from common.engine import Engine
from common.errors import CheckFailed, UserError
from common.fidelity import Finding, Paths, Percentile, Sizes, decode_part, prompt_part
from common.kernels.linear import Linear
from common.kernels.runtime import Kernels
from common.operations import with_kernels
from common.peers import HuggingFacePeer
from common.results import read_rows

ROOT = Path(__file__).resolve().parents[2]
SIZES = Sizes(prompt=70, rows=3, steps=5, context=40, row_context=11)


def cast(model, dtype):
    """The same weights, rounded."""

    def rounded(value):
        if isinstance(value, Linear):
            return Linear(value.weight.to(dtype))
        return dataclasses.replace(value, weight=value.weight.to(dtype))

    layers = tuple(
        type(w)(**{f.name: rounded(getattr(w, f.name)) for f in dataclasses.fields(w)}) for w in model.layers
    )
    embedding = model.embed_tokens.to(dtype)
    return dataclasses.replace(
        model, embed_tokens=embedding, layers=layers, norm=rounded(model.norm), lm_head=rounded(model.lm_head)
    )


def paths_of(float32, fast, **options):
    engine = Engine(fast, page_size=4, num_pages=60, max_requests=SIZES.rows, **options)
    plain = [with_kernels(model, Kernels.PLAIN, fused_weights=False) for model in (float32, fast)]
    return Paths(*plain, fast, engine)


def text(model, length=SIZES.tokens):
    draw = random.Random(3)
    return [draw.randrange(model.config.vocab_size) for _ in range(length)]


def windows_of(ids):
    length = SIZES.row_context + SIZES.steps + 1
    return [ids[9 * row : 9 * row + length] for row in range(SIZES.rows)]


def peer_nll(model, window, first):
    """Mean NLL of window[first:], from Hugging Face's logits over the whole window."""
    logits = HuggingFacePeer(model).logits(window[:-1])
    return F.cross_entropy(logits[first - 1 :], torch.tensor(window[first:])).item()


def check_against_peer(model, paths):
    ids = text(model)
    found = prompt_part(paths, ids, SIZES)
    expected = peer_nll(model, ids[: SIZES.prompt + 1], 1)
    assert found.tokens == SIZES.prompt
    assert [found.nll_float32, found.nll_plain, found.nll_fast] == pytest.approx([expected] * 3, abs=1e-4)
    windows = windows_of(ids)
    found = decode_part(paths, windows, SIZES.row_context)
    expected = sum(peer_nll(model, window, SIZES.row_context + 1) for window in windows) / len(windows)
    assert found.tokens == SIZES.rows * SIZES.steps
    assert [found.nll_float32, found.nll_plain, found.nll_fast] == pytest.approx([expected] * 3, abs=1e-4)
    assert found.delta_logit_fast < 1e-3 and paths.engine.num_free_pages == paths.engine.pool.capacity


@pytest.mark.parametrize("piece", [512, 17])
def test_figures_are_hugging_face_s(piece, lively, monkeypatch):
    """All three paths in float32, pieces of a prompt over earlier pages included: one truth."""
    monkeypatch.setattr(fidelity, "PIECE", piece)
    monkeypatch.setattr(fidelity, "ROWS_AT_ONCE", 32)
    model, _ = lively
    check_against_peer(model, paths_of(model, model))


def test_figures_of_our_kernels_in_graphs_are_hugging_face_s(pretend_gpu, monkeypatch):
    monkeypatch.setattr(fidelity, "PIECE", 33)
    model, _ = pretend_gpu
    paths = paths_of(model, model)
    replays, run = [], paths.engine.graphs.run

    def counted(*args):
        replays.append(len(args[0].slots))
        return run(*args)

    paths.engine.graphs.run = counted
    check_against_peer(model, paths)
    assert replays == [SIZES.rows] * SIZES.steps


class _Bugs:
    """What a fast path gets wrong, put into one that is right."""

    @staticmethod
    def eps(fast):
        norms = [dataclasses.replace(w, input_norm=dataclasses.replace(w.input_norm, eps=0.2)) for w in fast.layers]
        return dataclasses.replace(fast, layers=tuple(norms))

    @staticmethod
    def half_angles(fast):
        config = dataclasses.replace(fast.config, rope_theta=fast.config.rope_theta * 1.1)
        return dataclasses.replace(fast, config=config)

    @staticmethod
    def eight_bits(fast):
        layers = [dataclasses.replace(w, qkv=Linear(w.qkv.weight.to(torch.float8_e4m3fn).to(w.qkv.dtype)))
                  for w in fast.layers]  # fmt: skip
        return dataclasses.replace(fast, layers=tuple(layers))


def problems_of(model, fast_of):
    half = cast(model, torch.bfloat16)
    right, paths = paths_of(model, half), paths_of(model, fast_of(half))
    paths = dataclasses.replace(paths, plain=right.plain)
    ids = text(model)
    prompt = prompt_part(paths, ids, SIZES).problems(nll=True, logits=True)
    return prompt, decode_part(paths, windows_of(ids), SIZES.row_context).problems(nll=False, logits=True)


def test_16_bits_are_as_near_as_plain_16_bits(lively):
    assert problems_of(lively[0], lambda fast: fast) == ([], [])


@pytest.mark.parametrize("bug", ["eps", "half_angles", "eight_bits"])
def test_bugs_of_a_fast_path_are_seen(bug, lively):
    prompt, decodes = problems_of(lively[0], getattr(_Bugs, bug))
    assert prompt and decodes


def test_a_decode_that_takes_its_own_tokens_is_seen(lively, monkeypatch):
    """Not teacher-forced at all: the windows' random tokens are never what a model samples."""
    monkeypatch.setattr(Engine, "set_next_tokens", lambda *_: None)
    assert problems_of(lively[0], lambda fast: fast)[1]


# --- figures and limits ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.5, 0.999, 1.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_percentiles_are_numpy_s(share, scale):
    values = (torch.randn(5, 2003, generator=torch.Generator().manual_seed(1)).abs() * scale).float()
    counted = Percentile()
    for row in values:
        counted.add(row)
    expected = np.quantile(values.numpy(), share, method="inverted_cdf")
    assert counted.value(share) == pytest.approx(expected, rel=6e-4)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_one_number_that_is_none_spoils_a_percentile(bad):
    counted = Percentile()
    counted.add(torch.rand(10_000))
    assert 0 < counted.value(0.999) < 1
    counted.add(torch.tensor([0.5, bad]))
    assert math.isnan(counted.value(0.5))


def finding(plain, fast, tokens=2000, delta=(1.0, 1.0)):
    return Finding("part", tokens, 3.0, plain, fast, *delta)


@pytest.mark.parametrize(
    "given, wrong",
    [
        (finding(3.01, 3.0149), 1),  # near plain, and further from float32 than 1.2 times its distance + 0.001
        (finding(3.01, 3.0129), 0),
        (finding(3.01, 3.0131), 1),
        (finding(3.03, 3.0351), 1),
        (finding(3.03, 3.0349), 0),
        (finding(2.97, 2.9651), 0),
        (finding(2.97, 2.9649), 1),
        (finding(3.0, 3.0011), 1),
        (finding(3.0, 3.0011, tokens=500), 0),  # a quarter of the tokens: limits twice as wide
        (finding(3.0, 3.0021, tokens=500), 1),
        (finding(3.0, math.nan), 2),
        (finding(3.0, 3.0, delta=(1.0, 1.49)), 0),
        (finding(3.0, 3.0, delta=(1.0, 1.51)), 1),
        (finding(3.0, 3.0, delta=(1.0, math.nan)), 1),
        (finding(3.0, 3.0, delta=(0.0, 0.1)), 1),
    ],
)
def test_limits(given, wrong):
    assert len(given.problems(nll=True, logits=True)) == wrong
    assert given.problems(nll=False, logits=False) == []


# --- the command -----------------------------------------------------------------------------------------------------
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "common.fidelity", "--model", "random:tiny", "--device", "cpu", "--quick"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "fidelity.csv", fidelity.COLUMNS)
    assert [row["part"] for row in rows] == ["prompt of 192", "1 x 8 decodes", "4 x 8 decodes", "12 x 4 decodes"]
    assert [row["tokens"] for row in rows] == [192, 8, 32, 48] and {row["problem"] for row in rows} == {"none"}
    record = json.loads((tmp_path / "fidelity.json").read_text())
    assert (record["dtype"], record["graphs"]) == ("bfloat16", False)
    assert "the fast path in bfloat16 is as near to float32" in done.stdout


def test_what_fails_is_written_and_exits_1(tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "LOGIT_RATIO", 1e-3)
    args = fidelity.build_parser().parse_args(
        ["--model", "random:tiny", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    )
    with pytest.raises(CheckFailed, match=r"1 x 8 decodes: logits .* times as far from float32 as plain 16 bits'"):
        fidelity.main(args)
    assert "times as far" in read_rows(tmp_path / "fidelity.csv", fidelity.COLUMNS)[1]["problem"]


def test_a_context_that_is_too_short_is_refused(tmp_path):
    args = fidelity.build_parser().parse_args(["--model", "random:tiny", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="reads 2113 tokens, the model's context is 2048; use --quick"):
        fidelity.main(args)


@pytest.mark.slow
def test_the_embedded_model_in_bfloat16(embedded, tmp_path):
    """A small share of the text: some 20 s on a CPU; the whole command takes minutes there."""
    _, tokenizer = embedded
    ids = tokenizer.encode((ROOT / "common" / "data" / "prompt_text.txt").read_text(encoding="utf-8"))
    assert len(ids) >= Sizes().tokens and Sizes().prompt >= 2000 and all(r * s >= 2000 for r, s in Sizes().batches)
    args = fidelity.build_parser().parse_args(
        ["--model", "embedded", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    )
    fidelity.main(args)
    rows = read_rows(tmp_path / "fidelity.csv", fidelity.COLUMNS)
    assert all(2 < row["nll_float32"] < 5 and row["delta_logit_plain"] > 0.01 for row in rows)

"""The ablation: every rung the same tokens, each bar what its name says, rows that hold together.

The GPU's ladder is walked on the CPU (`pretend_gpu`: our kernels under the interpreter, stand-ins for CUDA graphs).
"""

import json
import os
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from assignment3.section3.flashinfer_pipeline import Engine
from common import cli, roofline
from common.equality import greedy_reference
from common.errors import CheckFailed, UserError
from common.kernels.runtime import Kernels
from common.operations import UnfusedLinear, with_kernels
from common.paged.backends import Backend
from common.results import read_rows
from common.scripts import ablation
from common.scripts.experiment import Experiment

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "assignment3" / "section3" / "flashinfer_pipeline.py"
ON_CPU = ["no cache", "KV cache", "fused qkv, gate_up", "oneDNN prepacked weights", "pages, gathered by torch"]
ON_GPU = [
    "no cache", "KV cache", "fused qkv, gate_up", "fused norms, activation, residual", "paged attention kernel",
    "CUDA graph",
]  # fmt: skip
CEILINGS = roofline.Ceilings("cpu", "cpu", 1e6, 1e6, 0, {"float32": {"burst": 1e6, "sustained": 1e6}})


def experiment(given, folder, **options):
    model, tokenizer = given
    args = {"batch_sizes": [1, 3], "input_length": 17, "output_lengths": [2, 6], "repeats": 2, "warmup": 1}
    args |= {
        "backend": "auto",
        "page_size": 4,
        "resume": False,
        "interrupted": False,
        "device": "cpu",
        "preset": "quick",
    }
    return Experiment(Namespace(**(args | options)), folder, set(), model, tokenizer, CEILINGS)


def prompts_of(model, batch, length=19):
    draw = random.Random(batch)
    return [[draw.randrange(model.config.vocab_size) for _ in range(length)] for _ in range(batch)]


def rungs_of(given, folder, batch):
    measured = ablation.Ablation(experiment(given, folder), Engine)
    return ablation.ladder(measured.exp.model, measured.backend, measured._engine(measured._batch(batch)), batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_rung_gives_the_tokens_of_full_recompute(batch, lively, tmp_path):
    model, _ = lively
    prompts = prompts_of(model, batch)
    expected = [greedy_reference(model, prompt, 6) for prompt in prompts]
    rungs = rungs_of(lively, tmp_path, batch)
    assert [rung.technique for rung in rungs] == ON_CPU
    for rung in rungs:
        run = rung.generate(prompts, 6)
        assert run.tokens == expected, rung.technique
        assert len(run.stamps) == 6 and run.stamps == sorted(run.stamps)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_gpu_s_rungs_too(batch, pretend_gpu, tmp_path):
    model, _ = pretend_gpu
    prompts = prompts_of(model, batch, length=10)  # three pages, and a fourth is opened while it decodes
    plain = with_kernels(model, Kernels.PLAIN)  # and not our kernels, which the interpreter takes long for
    expected = [greedy_reference(plain, prompt, 4) for prompt in prompts]
    rungs = rungs_of(pretend_gpu, tmp_path, batch)
    own = "matrix-vector kernels" if batch == 1 else "few-row product kernels"
    assert [rung.technique for rung in rungs] == [*ON_GPU, own]
    for rung in rungs:
        assert rung.generate(prompts, 4).tokens == expected, rung.technique


def test_what_each_rung_is_handed(pretend_gpu, monkeypatch):
    """One technique more at each: levels of the weights, then the attend, then graphs."""
    model, _ = pretend_gpu
    made = []

    def make_engine(handed, *, graphs):
        made.append((handed.layers[0].qkv.kernels, graphs))
        return None

    triton, torch_only = Backend("triton", "", False, True), Backend("torch", "", True, False)
    loops = {name: [] for name in ("no_cache", "contiguous_cache")}
    for name, seen in loops.items():
        monkeypatch.setattr(ablation, name, lambda handed, *_, seen=seen: seen.append(handed))
    for rung in ablation.ladder(model, triton, make_engine, 1)[:4]:
        rung.generate([], 0)
    qkvs = [handed.layers[0].qkv for name in loops for handed in loops[name]]
    assert [isinstance(linear, UnfusedLinear) for linear in qkvs] == [True, True, False, False]
    assert [linear.kernels for linear in qkvs] == [Kernels.PLAIN] * 3 + [Kernels.FUSED]
    assert made == [(Kernels.FUSED, False), (Kernels.FUSED, True), (Kernels.ALL, True)]
    at_300 = [rung.technique for rung in ablation.ladder(model, triton, make_engine, 300)]
    assert at_300 == ON_GPU  # so many rows take the library's products: no bar that would be the one before again
    gathered = [rung.technique for rung in ablation.ladder(model, torch_only, make_engine, 1)]
    assert gathered == [*ON_GPU[:4], "pages, gathered by torch", "matrix-vector kernels"]


def test_without_prepacked_weights_there_is_no_such_bar(lively, tmp_path):
    model, tokenizer = lively
    half = ablation.with_kernels(model, Kernels.ALL)
    for layer in half.layers:
        assert layer.qkv.is_prepacked
    plain = ablation.with_kernels(model, Kernels.PLAIN)
    assert [rung.technique for rung in rungs_of((plain, tokenizer), tmp_path, 2)] == [*ON_CPU[:3], ON_CPU[4]]


def test_rows_from_stamps(lively, tmp_path, monkeypatch):
    """Speeds and shares by hand: one row decodes 2 -> 6, three rows half as many steps, 2 -> 4."""

    def ladder(model, backend, make_engine, batch_size):
        def rung(name, step):
            return ablation.Rung(
                name,
                lambda prompts, n: ablation.Generation(
                    [[7] * n for _ in prompts], [9 + step * i * i for i in range(n)]
                ),
            )

        return [rung("slow", 0.5), rung("fast", 0.125)]

    monkeypatch.setattr(ablation, "ladder", ladder)
    exp = experiment(lively, tmp_path)
    rows = ablation.Ablation(exp, Engine).measure().rows
    assert [(r["batch_size"], r["technique"]) for r in rows] == [(1, "slow"), (1, "fast"), (3, "slow"), (3, "fast")]
    assert [r["time"] for r in rows] == [0.5 * 24, 0.125 * 24, 0.5 * 8, 0.125 * 8]  # steps of i^2: 25 - 1 and 9 - 1
    assert [r["tokens_per_s"] for r in rows] == pytest.approx([4 / 12, 4 / 3, 6 / 4, 6 / 1])
    assert [r["speedup"] for r in rows] == [None, pytest.approx(4), None, pytest.approx(4)]
    assert [r["repeats"] for r in rows] == [2] * 4
    c = exp.model.config
    weights, kv = 4 * c.num_linear_parameters, 8 * c.num_hidden_layers * c.kv_size
    # Tokens 3 to 6 of the one row: contexts of 19 to 22 tokens read, one more written, at 1e15 bytes a second.
    num_bytes = 4 * weights + kv * (19 + 20 + 21 + 22 + 4)
    assert rows[0]["mbu"] == pytest.approx(num_bytes / 1e15 / 12)
    assert rows[0]["ceiling_tokens_per_s"] == pytest.approx(4 / (num_bytes / 1e15))
    text = ablation.conclusion(rows)
    assert "batch 1: 0.3333 tokens/s with slow" in text and "fast bought most (4x)" in text and "lost" not in text


def test_a_rung_with_other_tokens_is_refused_before_it_is_timed(lively, tmp_path, monkeypatch):
    class OnePositionTooFar(ablation.Decode):
        def __init__(self, model, cache):
            super().__init__(model, cache)
            self.angles = ablation_table(model).at(self.positions + 1)

    from common.attention import rotary_table

    def ablation_table(model):
        return rotary_table(model.config, model.device)

    monkeypatch.setattr(ablation, "Decode", OnePositionTooFar)
    with pytest.raises(CheckFailed, match="batch 1, KV cache against no cache, 3 tokens a row: row 0 differs"):
        ablation.Ablation(experiment(lively, tmp_path), Engine).measure()
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_was_timed_and_resume_measures_the_rest(lively, tmp_path, monkeypatch, capsys):
    seconds, calls = ablation._Batch.seconds, []

    def interrupted(self, rung):
        calls.append((self.size, rung.technique))
        if len(calls) == 8:  # the third rung's second time
            raise KeyboardInterrupt
        return seconds(self, rung)

    monkeypatch.setattr(ablation._Batch, "seconds", interrupted)
    exp = experiment(lively, tmp_path, batch_sizes=[1])
    rows = ablation.Ablation(exp, Engine).measure().rows
    assert exp.args.interrupted and [r["technique"] for r in rows] == ON_CPU
    assert [r["repeats"] for r in rows] == [2, 2, 1, 1, 1]
    (tmp_path / "pipeline_ablation.csv").write_text(
        "".join((tmp_path / "pipeline_ablation.csv").read_text().splitlines(keepends=True)[:4])
    )
    calls[:] = [None] * 100
    again = experiment(lively, tmp_path, batch_sizes=[1], resume=True)
    rows_again = ablation.Ablation(again, Engine).measure().rows
    assert rows_again[:3] == rows[:3] and [r["technique"] for r in rows_again] == ON_CPU
    assert [name for _, name in calls[100:]] == ON_CPU[3:] * 2
    assert rows_again[3]["speedup"] == pytest.approx(rows_again[3]["tokens_per_s"] / rows[2]["tokens_per_s"])


@pytest.mark.parametrize("name", ablation.UNUSED)
def test_options_without_a_meaning_are_refused(name):
    args = Namespace(**dict.fromkeys(ablation.UNUSED), ablation=True)
    args.compare = ()
    cli.refuse_unused(args, ablation.UNUSED, "not used by --ablation; leave one of them out")
    setattr(args, name, ("hf",) if name == "compare" else True)
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: not used by --ablation"):
        cli.refuse_unused(args, ablation.UNUSED, "not used by --ablation; leave one of them out")


def run_script(*options):
    command = [
        sys.executable,
        str(SCRIPT),
        "--model",
        "random:tiny",
        "--device",
        "cpu",
        "--ablation",
        *map(str, options),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_the_script(tmp_path):
    done = run_script("--preset", "quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same tokens") == 2 * (len(ON_CPU) - 1)
    assert "tokens/s with no cache" in done.stdout and "pipeline_ablation.png" in done.stdout
    rows = read_rows(tmp_path / "pipeline_ablation.csv", ablation.COLUMNS)
    assert [(r["batch_size"], r["technique"]) for r in rows] == [(b, name) for b in (1, 4) for name in ON_CPU]
    for before, row in zip([None, *rows], rows):
        speedup = None if row["technique"] == ON_CPU[0] else row["tokens_per_s"] / before["tokens_per_s"]
        assert row["speedup"] == (None if speedup is None else pytest.approx(speedup))
        assert 0 < row["mbu"] <= row["tokens_per_s"] / row["ceiling_tokens_per_s"] * 1.0001
    assert (tmp_path / "pipeline_ablation.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "pipeline_ablation.json").read_text())
    assert record["backend"] == "torch" and record["options"]["ablation"] is True
    again = run_script("--preset", "quick", "--out", tmp_path, "--resume", "--no-plot")
    assert again.returncode == 0, again.stderr
    assert read_rows(tmp_path / "pipeline_ablation.csv", ablation.COLUMNS) == rows and "png" not in again.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (["--output-lengths", "5"], "--output-lengths: --ablation times from the first to the last"),
        (["--seq-lens", "64"], "--seq-lens: not used by --ablation"),
        (["--prompt", "hello"], "--prompt: not used by --ablation"),
        (["--input-length", "2045"], "pass the model's context of 2048"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path):
    done = run_script("--preset", "quick", *options, "--out", tmp_path)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_presets_fit_the_parser():
    for sizes in ablation.PRESETS.values():
        assert len(sizes["output_lengths"]) == 2 and sizes["batch_sizes"][0] == 1
    assert cli.DEFAULT_REPEATS >= 5

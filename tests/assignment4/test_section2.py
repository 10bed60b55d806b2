"""The scripts of assignment 4, section 2, as a learner runs them, on the smallest model and two CPU processes.

Catches: a missing or misnamed file or column, tokens or logits that differ from one device, figures that a failed check
loses, a reference of another run, options that ranks disagree on, a
plain run that leaves processes behind, Ctrl-C that loses rows.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.results import read_rows

ROOT = Path(__file__).resolve().parents[2]
SECTION = ROOT / "assignment4" / "Section2"
COLUMNS = ["world", "batch_size", "time_us", "tokens_per_s", "allreduce_share", "memory_bytes", "bytes_read"]
QUICK = ["--model", "random:tiny", "--device", "cpu", "--preset", "quick"]


def environment():
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}


def run(*arguments, cwd=None, env=None):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=cwd, env=environment() | (env or {}), check=False
    )


def torchrun(count, script, *arguments, **kw):
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", script, *arguments, **kw)


def header(path):
    return path.read_text().split("\n")[0].split(",")


def test_a_plain_run_measures_one_device_and_two_processes(tmp_path):
    done = run(SECTION / "transformer-tp2.py", *QUICK, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = tmp_path / "transformer_w3l1.csv", tmp_path / "transformer_tp2.csv"
    assert header(one)[:7] == COLUMNS
    assert header(two)[:7] == COLUMNS
    reference = {row["batch_size"]: row for row in read_rows(one, COLUMNS)}
    rows = read_rows(two, [*COLUMNS, "one_device_us", "speed_up"])
    assert [(row["world"], row["batch_size"]) for row in rows] == [(2, 1), (2, 2)]
    for row in rows:
        assert row["one_device_us"] == reference[row["batch_size"]]["time_us"]
        assert row["speed_up"] == pytest.approx(row["one_device_us"] / row["time_us"])
        assert row["allreduce_share"] == pytest.approx(row["allreduce_us"] / row["time_us"])
        assert row["allreduce"] == "gloo"
    assert (tmp_path / "transformer_tp2.png").read_bytes().startswith(b"\x89PNG")
    for batch_size in (1, 2):
        logits = f"the logits of {batch_size} x 4 positions are off by at most "
        assert f"batch {batch_size} against one device: the same tokens; {logits}" in done.stdout
    parts = json.loads((tmp_path / "transformer_tp2.json").read_text())["ranks"]
    assert [part["q_heads"] for part in parts] == [2, 2]

    # The tokens of three processes, which torchrun starts, are compared with the same file; --resume finds nothing new.
    again = torchrun(3, SECTION / "transformer-tp2.py", *QUICK, "--out", tmp_path, "--no-plot")
    assert again.returncode == 0, again.stderr
    assert "against one device: the same tokens" in again.stdout
    assert read_rows(two, COLUMNS)[0]["world"] == 3
    before = two.read_text()
    resumed = torchrun(3, SECTION / "transformer-tp2.py", *QUICK, "--out", tmp_path, "--no-plot", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert two.read_text() == before


def test_wrong_tokens_are_found_out(tmp_path):
    """A reference with one other token: the script must fail its own check, with exit code 1."""
    assert run(SECTION / "transformer-w3l1.py", *QUICK, "--out", tmp_path).returncode == 0
    path = tmp_path / "transformer_w3l1.json"
    record = json.loads(path.read_text())
    record["output_token_ids"]["2"][1][3] = (record["output_token_ids"]["2"][1][3] + 1) % 512
    path.write_text(json.dumps(record))
    done = run(SECTION / "transformer-tp2.py", *QUICK, "--out", tmp_path, "--skip-reference")
    assert done.returncode == 1
    assert "batch 2 against one device: row 1 differs at output token 3" in done.stderr
    assert len(done.stderr.splitlines()) == 1

    # The figures are not lost.
    assert [row["batch_size"] for row in read_rows(tmp_path / "transformer_tp2.csv", COLUMNS)] == [1, 2]
    assert (tmp_path / "transformer_tp2.png").exists()
    assert "on 2 processes a step of batch 1 took" in done.stdout
    found = json.loads((tmp_path / "transformer_tp2.json").read_text())["check"]
    assert "row 1 differs at output token 3" in found["problems"][0] and len(found["agreed"]) == 2


@pytest.mark.parametrize("dtype, factor", [("bfloat16", 1.2), ("float32", 1.01)])
def test_a_broken_shard_is_found_by_its_logits(dtype, factor, tmp_path):
    """As it is, two processes pass, in 16 bits too; with one rank's parts of o_proj a little too large, they do not."""
    options = [*QUICK, "--dtype", dtype, "--out", tmp_path]
    done = run(SECTION / "transformer-tp2.py", *options, "--no-plot")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"batch 2 .*the logits of 2 x 4 positions are off by at most .* in {dtype}\)", done.stdout)
    program = ROOT / "tests" / "common" / "rank_programs" / "broken_shard.py"
    broken = torchrun(2, program, factor, SECTION / "transformer-tp2.py", *options)
    assert broken.returncode == 1
    for batch_size in (1, 2):
        off = rf"the logits of {batch_size} x 4 positions are off by at most \S+ of their norm"
        said = rf"check failed: .*batch {batch_size} against one device: {off}.*; rounding to {dtype} explains"
        assert re.search(said, broken.stderr), broken.stderr
    assert len(read_rows(tmp_path / "transformer_tp2.csv", COLUMNS)) == 2
    assert "wrote" in broken.stdout and (tmp_path / "transformer_tp2.png").exists()


def test_a_resumed_reference_keeps_what_it_had_and_another_seed_s_is_not_used(tmp_path):
    from common.tensor_parallel.check import read_logits

    def reference(*arguments):
        done = run(SECTION / "transformer-w3l1.py", *QUICK, "--out", tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "transformer_w3l1.json").read_text())
        return record["output_token_ids"], read_logits(tmp_path, record)

    tokens, saved = reference("--batch-sizes", "2")
    resumed_tokens, resumed = reference("--batch-sizes", "1,2", "--resume")
    assert list(resumed_tokens) == ["2", "1"] and resumed_tokens["2"] == tokens["2"]
    assert resumed.logits[2].equal(saved.logits[2]) and resumed.logits[1][0].shape == saved.logits[2][0].shape
    assert resumed.forced[2] == [row[:3] for row in tokens["2"]]
    assert reference("--resume")[1].logits.keys() == {1, 2}  # nothing new: nothing touched

    other = torchrun(2, SECTION / "transformer-tp2.py", *QUICK, "--out", tmp_path, "--seed", "1", "--no-plot")
    assert other.returncode == 0, other.stderr
    assert "no tokens of one device to compare with; run transformer-w3l1.py on the same sizes" in other.stdout


def test_ranks_print_one_answer(tmp_path):
    arguments = [*QUICK, "--prompt", "hi", "--ignore-eos"]
    texts = {}
    for name in ("w3l1", "tp2"):
        tokens = tmp_path / f"{name}.jsonl"
        done = run(SECTION / f"transformer-{name}.py", *arguments, "--out", tmp_path, "--dump-tokens", tokens)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("> hi") == 1
        texts[name] = tokens.read_text()
    assert texts["w3l1"] == texts["tp2"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--world", "5"], "5 processes cannot share 4 query heads; start at most 4"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        pytest.param(["--allreduce", "symm"], "--allreduce symm: needs GPUs", marks=pytest.mark.slow),
        pytest.param(["--output-lengths", "8"], "--output-lengths: takes two lengths", marks=pytest.mark.slow),
        (["--world", "0"], "argument --world"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = run(SECTION / "transformer-tp2.py", *QUICK, "--skip-reference", *arguments, "--out", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr


def start_by_hand(rank, port, *arguments, cwd=None):
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(SECTION / "transformer-tp2.py"), "--device", "cpu", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment() | variables, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_different_options_are_found_before_loading(tmp_path, free_port):
    common = ["--model", "random:tiny", "--out", tmp_path, "--prompt", "hi"]
    ranks = [start_by_hand(rank, free_port, *common, "--seed", rank) for rank in range(2)]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    said = "".join(err for _, err in outputs)
    assert "option --seed is 0 on rank 0 and 1 on rank 1" in said
    assert not any("model:" in out for out, _ in outputs)


def test_different_weights_are_found_before_loading(tmp_path, free_port):
    """The same name and shapes on both ranks, other numbers inside, as two machines might have."""
    import torch
    from safetensors.torch import save_file

    from common.config import SHAPES
    from common.tensor_source import expected_shapes

    for rank in range(2):
        folder = tmp_path / f"machine{rank}" / "model"
        folder.mkdir(parents=True)
        torch.manual_seed(rank)
        save_file({n: torch.randn(s) for n, s in expected_shapes(SHAPES["tiny"]).items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(SHAPES["tiny"].to_hf_dict()))
    ranks = [
        start_by_hand(rank, free_port, "--model", "model", "--prompt", "hi", cwd=tmp_path / f"machine{rank}")
        for rank in range(2)
    ]
    said = "".join(rank.communicate(timeout=60)[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert re.search("model files is .* on rank 0 and .* on rank 1", said), said


@pytest.mark.slow
def test_interrupt_keeps_the_rows(tmp_path):
    """Ctrl-C while the second batch size is measured: the first row stays, exit code 130, nobody is left."""
    command = [sys.executable, str(SECTION / "transformer-tp2.py"), *QUICK, "--skip-reference", "--out", str(tmp_path)]
    command += ["--repeats", "120", "--no-plot"]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    csv = tmp_path / "transformer_tp2.csv"
    end = time.monotonic() + 120
    while not (csv.exists() and len(csv.read_text().splitlines()) == 2):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)  # the launcher passes it on, as it does at a terminal
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert err.count("interrupted: keeping the rows measured so far") == 1
    assert len(read_rows(csv, COLUMNS)) >= 1
    assert "wrote" in out


def test_allreduce_profile(tmp_path):
    sizes = ["--bytes", "2^10..2^14", "--batch-sizes", "1,2", "--repeats", "2"]
    done = run(SECTION / "profile_allreduce.py", *sizes, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    csv = tmp_path / "profile_allreduce.csv"
    assert ",".join(header(csv)) == (
        "backend,algorithm,world,batch_size,bytes,time_us,time_us_p10,time_us_p90,algbw_gb_per_s,busbw_gb_per_s"
    )
    rows = read_rows(csv, [])
    assert [r["bytes"] for r in rows if r["batch_size"] is None] == [1 << e for e in range(10, 15)]
    assert [(r["batch_size"], r["bytes"]) for r in rows if r["batch_size"]] == [(1, 16384), (2, 32768)]
    for row in rows:
        assert row["backend"] == "gloo" and row["world"] == 2
        assert row["algbw_gb_per_s"] == pytest.approx(row["bytes"] / row["time_us"] / 1e3)
        assert row["busbw_gb_per_s"] == pytest.approx(row["algbw_gb_per_s"])  # 2 (n - 1) / n is 1 for two
        assert row["time_us_p10"] <= row["time_us"] <= row["time_us_p90"]
    assert (tmp_path / "profile_allreduce.png").read_bytes().startswith(b"\x89PNG")
    assert "profiling gloo between 2 CPU processes instead" in done.stdout


def test_sentences_are_about_the_smallest_and_largest_batch_wherever_their_rows_stand():
    """--resume appends what was missing behind larger ones."""
    sizes = dict(time_us=1000.0, memory_bytes=1, bytes_read=1, world=2, allreduce_share=0.5, speed_up=None)
    rows = [sizes | {"batch_size": n, "tokens_per_s": 10.0 * n} for n in (2, 8, 1, 4)]
    args = SimpleNamespace(input_length=8, output_lengths=[2, 4])
    loaded = SimpleNamespace(exp=SimpleNamespace(args=args, floor_s=lambda tokens: 1e-4))
    one = runpy.run_path(str(SECTION / "transformer-w3l1.py"))["conclusion"](loaded, rows)
    assert one.startswith("a step of batch 1 took 1 ms") and "batch 8 gave 80 tokens/s" in one
    two = runpy.run_path(str(SECTION / "transformer-tp2.py"))["conclusion"](rows, "cuda")
    assert two.startswith("on 2 processes a step of batch 1 took 1 ms")

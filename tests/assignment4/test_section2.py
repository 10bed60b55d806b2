"""The scripts of assignment 4, section 2, as a learner runs them, on the smallest model and two CPU processes.

Catches: a missing or misnamed file or column, tokens that differ from one device, options that ranks disagree on, a
plain run that leaves processes behind, Ctrl-C that loses rows.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.results import read_rows

SECTION = Path(__file__).resolve().parents[2] / "assignment4" / "Section2"
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
    assert "batch 1 against one device: the same tokens; batch 2 against one device: the same tokens" in done.stdout
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
    command += ["--repeats", "400", "--no-plot"]
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

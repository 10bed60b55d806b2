"""What a user can get wrong: each is one line on stderr that names it, exit code 2, and nothing written.

Catches: a traceback, a refusal after minutes of measuring, a folder or a half result left behind, a wrong exit code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assignment2_scripts import MEASURING, ROOT, TINY, run
from safetensors.torch import load_file, save_file

from common.config import SHAPES
from common.tensor_source import expected_shapes

CPU = ("--device", "cpu", "--preset", "quick")


def refused(result, *named: str) -> None:
    code, out, err = result
    assert code == 2, (code, out, err)
    assert err.count("\n") == 1 and "error" in err and "internal" not in err and "Traceback" not in err, err
    for text in named:
        assert text in err, (text, err)


@pytest.fixture(params=MEASURING)
def name(request):
    return request.param


@pytest.fixture
def attempt(in_process, tmp_path, name):
    """Run the script with an --out that does not exist yet; afterwards it must still not exist."""

    def call(*args, out: bool = True):
        folder = tmp_path / "new" / "out"
        result = in_process(name, *args, *(["--out", folder] if out else []))
        assert not folder.parent.exists(), "written although it was refused"
        return result

    return call


@pytest.mark.parametrize(
    "args, named",
    [
        (["--preset", "huge"], ["--preset", "huge", "laptop"]),
        (["--output-lengths", ""], ["--output-lengths", "empty"]),
        (["--output-lengths", "8,4"], ["--output-lengths", "ascending"]),
        (["--output-lengths", "8:4:1"], ["--output-lengths", "descending"]),
        (["--output-lengths", "1:1000000000:1"], ["--output-lengths", "10,000"]),
        (["--output-lengths", "0"], ["--output-lengths"]),
        (["--output-lengths", "ten"], ["--output-lengths", "ten"]),
        (["--input-length", "1,2"], ["--input-length"]),
        (["--input-length", "-3"], ["--input-length"]),
        (["--device", "gpu"], ["--device", "gpu"]),
        (["--dtype", "int4"], ["--dtype", "int4"]),
        (["--seed", "-1"], ["--seed"]),
        (["--repeats", "0"], ["--repeats"]),
        (["--nonsense"], ["--nonsense"]),
        (["--prompt", ""], ["--prompt"]),
        (["--prompt", "a", "--prompts", "b"], ["--prompts"]),
        (["--raw"], ["--raw", "--prompt"]),
        (["--prompt", "a", "--resume"], ["--resume", "--prompt"]),
        (["--prompts", "/no/such/file"], ["--prompts", "/no/such/file"]),
        (["--model", ""], ["--model"]),
    ],
)
def test_options(attempt, args, named):
    if "--model" in args:
        refused(attempt(*CPU, *args), *named)
    else:
        refused(attempt(*TINY, *args), *named)


@pytest.mark.parametrize(
    "source, named",
    [
        ("/no/such/folder", ["--model /no/such/folder", "no such folder"]),
        ("random:huge", ["random:huge", "llama3-8b"]),
        ("random:llama3-70b", ["random:llama3-70b", "free"]),
    ],
)
def test_models(attempt, source, named):
    refused(attempt(*CPU, "--model", source), *named)


def test_the_context_is_a_limit_and_what_fits_is_said(attempt, name):
    said = ["context of 100", "60"]
    refused(
        attempt(*TINY, "--context", 100, "--input-length", 40, "--output-lengths", 61), *said
    ) if "prefill" not in name else None
    if "prefill" in name:
        refused(attempt(*TINY, "--context", 100, "--input-length", 40, "--output-lengths", 90), "context of 100")
    refused(attempt(*TINY, "--context", 100, "--input-length", 100), "--input-length", "100")
    refused(attempt(*TINY, "--context", 100, "--prompt", "x" * 99, "--output-lengths", 2), "99 prompt + 2", "at most 1")
    refused(attempt(*TINY, "--context", 100, "--prompt", "x" * 200), "200 prompt", "100")
    refused(attempt(*TINY, "--context", 10**17), "--context")


def test_a_preset_is_clipped_where_a_typed_length_is_refused(in_process, tmp_path):
    code, out, err = in_process("single_batch", *TINY, "--context", 21, "--out", tmp_path)
    assert code == 0, err
    assert "8 left out" in out and "21" in out
    code, out, err = in_process("single_batch", *TINY, "--context", 10, "--prompt", "hello", "--out", tmp_path)
    assert code == 0 and " 5 tokens in" in out.replace("\n", " "), out + err  # the preset's 8 do not fit


def test_cuda_where_there_is_none(attempt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:3"):
        refused(attempt("--model", "random:tiny", "--preset", "quick", "--device", device), "--device", "cpu")


def test_an_unwritable_out(in_process, name, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "x", "/proc/x"):
        refused(in_process(name, *TINY, "--out", out), "--out", str(out))


def test_an_unwritable_token_file_is_refused_before_measuring(attempt, name, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "t.jsonl", tmp_path / "no" / "t.jsonl", tmp_path):
        refused(attempt(*TINY, "--dump-tokens", path), "--dump-tokens", str(path))
        refused(attempt(*TINY, "--prompt", "x", "--dump-tokens", path), "--dump-tokens", str(path))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint in three shards, with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder, config = tmp_path_factory.mktemp("checkpoint"), SHAPES["tiny"]
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict()))
    generator = torch.Generator().manual_seed(0)
    tensors = {n: 0.02 * torch.randn(s, generator=generator) for n, s in expected_shapes(config).items()}
    weight_map = {}
    for i in range(3):
        part = {n: t for j, (n, t) in enumerate(sorted(tensors.items())) if j % 3 == i}
        save_file(part, folder / f"model-{i}.safetensors")
        weight_map |= {n: f"model-{i}.safetensors" for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_config(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def damage_nan(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, path)


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config cut": (lambda f: truncate(f / "config.json"), "config.json"),
    "shard missing": (lambda f: (f / "model-1.safetensors").unlink(), "model-1.safetensors"),
    "shard truncated": (lambda f: truncate(f / "model-2.safetensors"), "model-2.safetensors"),
    "shard corrupt": (lambda f: (f / "model-0.safetensors").write_bytes(b"\x00" * 500), "model-0.safetensors"),
    "NaN": (lambda f: damage_nan(f / "model-0.safetensors"), "NaN"),
    "wrong shapes": (lambda f: change_config(f / "config.json", intermediate_size=180), "has shape"),
    "too few layers": (lambda f: change_config(f / "config.json", num_hidden_layers=3), "model.layers.2"),
    "architecture": (lambda f: change_config(f / "config.json", architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "bias": (lambda f: change_config(f / "config.json", attention_bias=True), "attention_bias"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
}


# Loading is the same code in all scripts: one of them gets every kind of damage, the others two.
@pytest.mark.parametrize(
    "name, damage",
    [(n, d) for n in MEASURING for d in DAMAGE if n == "single_batch" or d in ("no config", "shard truncated")],
    indirect=["name"],
)
def test_damaged_checkpoints(attempt, checkpoint, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    damaged, named = DAMAGE[damage]
    damaged(folder)
    refused(attempt(*CPU, "--model", folder), named, str(folder))


def test_the_undamaged_checkpoint_runs(in_process, checkpoint, tmp_path):
    code, out, err = in_process("single_batch", *CPU, "--model", checkpoint, "--out", tmp_path)
    assert code == 0, err
    assert f"from {checkpoint}, because --model names the folder" in out


def test_a_batch_that_does_not_fit_in_memory(in_process, tmp_path, monkeypatch):
    """Typed: refused, with what fits. The preset's: clipped, and said."""
    from common.scripts import batch_sweep

    per_row = 65_000  # measured: a process with 50,000 rows took 3.2 GB more than with 1,000; K and V are a sixth of it
    monkeypatch.setattr(batch_sweep, "free_bytes", lambda device: int(3.5 * per_row))
    typed = in_process("uniform_prefill", *TINY, "--batch-sizes", "1,4", "--out", tmp_path / "x")
    refused(typed, "4 is above", "at most 3")
    code, out, err = in_process("uniform_prefill", *TINY, "--out", tmp_path / "y")
    assert code == 0 and "4 left out" in out, err


def test_several_output_lengths_for_one_batch(in_process, tmp_path):
    for name in MEASURING[2:]:
        refused(in_process(name, *TINY, "--output-lengths", "2,4", "--out", tmp_path / "x"), "--output-lengths", "one")
    assert not (tmp_path / "x").exists()


def test_as_processes(tmp_path):
    """Four of the above end to end, as a shell sees them."""
    for args in (["--model", "/no/such"], ["--preset", "huge"], ["--output-lengths", "3,2"]):
        done = run("no_kv", *CPU, *args, "--out", tmp_path / "x", code=2, cwd=tmp_path)
        assert done.stdout.count("\n") <= 1 and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
    args = [sys.executable, str(ROOT / "assignment2" / "no_kv.py"), *CPU, "--model", "/no/such", "--debug"]
    done = subprocess.run(args, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60)
    assert done.returncode == 2 and "Traceback" in done.stderr

"""Tensor-parallel decoding with real processes against the same decoder on one: logits and greedy tokens, float32.

Catches: a part read from the wrong place, a sum left out or done twice, a head gathered in the wrong order or with its
padding, a cache with the wrong heads, ranks that drift apart.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.config import SHAPES, ModelConfig
from common.tensor_source import expected_shapes

PROGRAM = Path(__file__).parents[1] / "rank_programs" / "equality.py"
TINY = dataclasses.replace(SHAPES["tiny"], vocab_size=301, hidden_size=48, intermediate_size=77, head_dim=8)
# Query heads, KV heads: the embedded model's; one KV head for many; as many as query heads; groups of two.
HEADS = {2: [(9, 3), (4, 1), (3, 3)], 3: [(8, 4), (9, 3)], 4: [(9, 3), (6, 6)], 5: [(9, 3), (5, 1)]}


def save_checkpoint(config: ModelConfig, folder: Path, seed: int) -> Path:
    """Random weights whose logits are of order 1, as config.json and model.safetensors."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) == 2 else 0.1) + (len(shape) == 1)
        for name, shape in expected_shapes(config).items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict()))
    return folder


def run_ranks(world_size: int, *arguments: object, program: Path = PROGRAM) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)


def check(results: str, world_size: int) -> None:
    for line in results.splitlines():
        found = json.loads(line)
        assert found["largest"] > 0.5  # or the tolerance would mean nothing
        assert found["difference"] < 1e-4 * found["largest"]
        assert found["verdict"].startswith("tokens: the same tokens")
        assert found["ranks_agree"]
        assert max(found["bytes_read"]) < found["whole_bytes"]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=SLOW), 4, pytest.param(5, marks=SLOW)])
def test_same_logits_and_tokens_as_one_process(world_size, tmp_path):
    folders = []
    for number, (heads, kv_heads) in enumerate(HEADS[world_size]):
        config = dataclasses.replace(
            TINY,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=number % 2 == world_size % 2,
        )
        folders.append(save_checkpoint(config, tmp_path / str(number), seed=10 * world_size + number))
    done = run_ranks(world_size, *folders)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(folders)
    check(done.stdout, world_size)


@pytest.mark.parametrize("sabotage", ["no sum", pytest.param("padded head", marks=SLOW)])
def test_the_comparison_sees_known_bugs(sabotage, tmp_path):
    """The same comparison with a sum left out, or the head's padding left in, must fail."""
    config = dataclasses.replace(TINY, num_attention_heads=4, num_key_value_heads=2)
    folder = save_checkpoint(config, tmp_path / "model", seed=1)
    patch = {
        "no sum": "collectives.TensorParallel.all_reduce = lambda self, x, residual: x + residual",
        "padded head": "collectives.even_parts = lambda total, parts: [range(-(-total // parts))] * parts",
    }[sabotage]
    program = tmp_path / "sabotaged.py"
    root = str(Path(__file__).resolve().parents[3])
    source = PROGRAM.read_text().split("with open_world")
    start = f"import sys\nsys.path.insert(0, {root!r})\nfrom common.tensor_parallel import collectives\n{patch}\n"
    program.write_text(start + source[0].replace("parents[3]", "parents[0]") + "with open_world" + source[1])
    done = run_ranks(2, folder, program=program)
    if done.returncode == 0:
        with pytest.raises(AssertionError):
            check(done.stdout, 2)
    else:  # found by the program itself, and not some other failure
        assert "differs at output token" in done.stderr or "AssertionError" in done.stderr


@pytest.mark.slow
def test_the_embedded_model_on_two_and_three_processes():
    """Uneven groups (2 + 1) and even ones; a rank reads its part of the linears and the whole embedding."""
    for world_size in (2, 3):
        from common import embedded

        done = run_ranks(world_size, embedded.model_folder())
        assert done.returncode == 0, done.stderr
        check(done.stdout, world_size)
        found = json.loads(done.stdout)
        config = SHAPES["smollm2-135m"]
        embedding = 4 * config.vocab_size * config.hidden_size
        layers = found["whole_bytes"] - embedding
        share = -(-3 // world_size) / 3  # KV groups of the fullest rank
        assert max(found["bytes_read"]) < embedding + (share + 0.01) * layers

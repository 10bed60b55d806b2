"""The decoder against Hugging Face's, float32, on random weights that Hugging Face itself wrote to disk.

Catches: wrong rotation order or frequencies, a norm with the wrong eps or in the wrong precision, query heads on the
wrong KV heads, a head tied that should not be, `rows` picked from the wrong layer, head_dim derived where it is given.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import llama
from common.attention import Prefill
from common.checkpoint import Shard, build
from common.config import ModelConfig, RopeScaling
from common.tensor_source import SafetensorsSource

BASE = ModelConfig(
    vocab_size=331,
    hidden_size=96,
    intermediate_size=208,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
CASES = {
    "gqa": BASE,
    "mha": dataclasses.replace(BASE, num_key_value_heads=6),
    "mqa": dataclasses.replace(BASE, num_key_value_heads=1),
    "tied": dataclasses.replace(BASE, tie_word_embeddings=True),
    "head_dim wider than hidden / heads": dataclasses.replace(BASE, head_dim=32),
    "head_dim narrower than hidden / heads": dataclasses.replace(BASE, head_dim=10),
    "llama3 scaling": dataclasses.replace(
        BASE, rope_theta=500.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), max_position_embeddings=256
    ),
    "large eps": dataclasses.replace(BASE, rms_norm_eps=0.5),
    "five layers, one head": dataclasses.replace(
        BASE, num_hidden_layers=5, num_attention_heads=1, num_key_value_heads=1, head_dim=64
    ),
}
TOLERANCE = 2e-4


def save_hf(config: ModelConfig, folder, *, seed: int, scale: float = 1.0):
    """A random model of Hugging Face's own making, saved as a checkpoint folder. `scale` widens the embedding."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config.to_hf_dict())).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))  # all-ones norms would hide a forgotten weight
            else:
                parameter.mul_(4)  # logits of order 1, so that the tolerance means something
        model.model.embed_tokens.weight.mul_(scale)
    model.save_pretrained(folder)
    return model


def load_ours(folder):
    config = ModelConfig.from_pretrained(folder)
    source = SafetensorsSource(folder, config)
    return build(config, source, Shard.whole(config), torch.device("cpu"), torch.float32)


def packed_logits(model, prompts, rows=None):
    tokens = torch.tensor([t for prompt in prompts for t in prompt])
    return model.logits(model.forward(tokens, Prefill(model, [len(p) for p in prompts]), rows))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_hugging_face(name, tmp_path):
    config = CASES[name]
    hf = save_hf(config, tmp_path, seed=len(name))
    ours = load_ours(tmp_path)
    assert ours.config == dataclasses.replace(config, bos_token_id=ours.config.bos_token_id)
    rng = random.Random(name)
    # One prompt longer than llama3 scaling's original length, one of a single token.
    lengths = [min(100, config.max_position_embeddings), 1, rng.randint(2, 60)]
    prompts = [[rng.randrange(config.vocab_size) for _ in range(n)] for n in lengths]
    with torch.inference_mode():
        expected = torch.cat([hf(torch.tensor([p])).logits[0] for p in prompts])
    assert expected.abs().max() > 0.5  # or the tolerance would mean nothing
    got = packed_logits(ours, prompts)
    assert (got - expected).abs().max() < TOLERANCE
    rows = torch.tensor([lengths[0] - 1, lengths[0], sum(lengths) - 1, 0])  # last of each, and out of order
    assert (packed_logits(ours, prompts, rows) - expected[rows]).abs().max() < TOLERANCE


def test_prompts_longer_than_a_cpu_tile(tmp_path):
    """Long prompts go tile by tile on a CPU: lengths at, around and between the tiles' edges."""
    hf = save_hf(dataclasses.replace(BASE, max_position_embeddings=512), tmp_path, seed=3)
    ours = load_ours(tmp_path)
    rng = random.Random(3)
    for lengths in ([128, 129], [256, 257, 5], [391]):
        prompts = [[rng.randrange(BASE.vocab_size) for _ in range(n)] for n in lengths]
        with torch.inference_mode():
            expected = torch.cat([hf(torch.tensor([p])).logits[0] for p in prompts])
        assert (packed_logits(ours, prompts) - expected).abs().max() < TOLERANCE


def test_activations_past_float16_range(tmp_path):
    """Their squares overflow float16 (and float32 sums of float16 squares are what the norm must take)."""
    hf = save_hf(BASE, tmp_path, seed=5, scale=1e6)
    ours = load_ours(tmp_path)
    prompt = list(range(40))
    assert ours.embed(torch.tensor(prompt)).abs().max() > 65504
    with torch.inference_mode():
        expected = hf(torch.tensor([prompt])).logits[0]
    assert (packed_logits(ours, [prompt]) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param("interleaved", id="rotation of neighbours instead of halves"),
        pytest.param("no causal mask", id="prefill that sees the future"),
        pytest.param("eps", id="eps of another checkpoint"),
    ],
)
def test_the_comparison_sees_known_bugs(bug, tmp_path, monkeypatch):
    """The bugs this file is for, put back as patches: the same comparison must fail."""
    hf = save_hf(CASES["large eps"], tmp_path, seed=1)
    ours = load_ours(tmp_path)
    if bug == "interleaved":

        def interleaved(x, cos, sin):
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

        monkeypatch.setattr("common.attention.rotate", interleaved)
    elif bug == "no causal mask":

        def bidirectional(q, k, v):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return (
                torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(0, 1)
            )

        monkeypatch.setattr("common.attention.causal_attention", bidirectional)
    else:
        config = dataclasses.replace(ours.config, rms_norm_eps=1e-5)
        source = SafetensorsSource(tmp_path, config)
        ours = build(config, source, Shard.whole(config), torch.device("cpu"), torch.float32)
    prompt = list(range(50, 90))
    with torch.inference_mode():
        expected = hf(torch.tensor([prompt])).logits[0]
    assert (packed_logits(ours, [prompt]) - expected).abs().max() > 10 * TOLERANCE


def test_the_decoder_knows_no_backend_and_fits_on_a_screen():
    """It imports no Triton and has one branch, on the wanted rows: what runs where is chosen behind its operations."""
    tree = ast.parse(inspect.getsource(llama))
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = {a.name for n in imports for a in n.names} | {getattr(n, "module", None) or "" for n in imports}
    assert not any("triton" in name or "flashinfer" in name or "paged" in name for name in modules), modules
    branches = (ast.If, ast.IfExp, ast.Match, ast.While, ast.Try)
    found = [ast.unparse(n.test) for n in ast.walk(tree) if isinstance(n, branches)]
    assert found == ["rows is not None and i == len(self.layers) - 1"]
    assert len(inspect.getsource(llama.Llama.forward).splitlines()) <= 40

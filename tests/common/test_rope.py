"""Rotary tables against float64 arithmetic and against transformers' own functions.

Catches: angles in too narrow a type, positions that collapse past 2,048, another exponent or scaling, a rotation in
the wrong order. The float16 bug is kept below as a patch: the check must see it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common import rope
from common.config import SHAPES, ModelConfig, RopeScaling

PLAIN = dataclasses.replace(SHAPES["tiny"], head_dim=64, rope_theta=500000.0, max_position_embeddings=9000)
SCALED = dataclasses.replace(PLAIN, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 1024))
# Angles are float32: one that is p radians off by half a unit in the last place at position 9000.
TOLERANCE = 9000 * 2.0**-23


def oracle_angles(config: ModelConfig, positions: np.ndarray) -> np.ndarray:
    """RoFormer's formula and Llama 3.1's scaling, pair by pair in float64."""
    frequencies = []
    for pair in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2.0 * pair / config.head_dim)
        if (s := config.rope_scaling) is not None:
            wavelength = 2 * math.pi / frequency
            longest_kept = s.original_max_position_embeddings / s.high_freq_factor
            shortest_stretched = s.original_max_position_embeddings / s.low_freq_factor
            if wavelength > shortest_stretched:
                frequency /= s.factor
            elif wavelength >= longest_kept:
                blend = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
                    s.high_freq_factor - s.low_freq_factor
                )
                frequency = (1 - blend) * frequency / s.factor + blend * frequency
        frequencies.append(frequency)
    return np.outer(positions, np.array(frequencies))


def table_error(config: ModelConfig) -> float:
    """Largest difference of the table from the oracle, over every position."""
    table = rope.RotaryTable(config)
    angles = oracle_angles(config, np.arange(config.max_position_embeddings))
    cos, sin = table.cos.double().numpy(), table.sin.double().numpy()
    return max(np.abs(cos - np.cos(angles)).max(), np.abs(sin - np.sin(angles)).max())


@pytest.mark.parametrize("config", [PLAIN, SCALED], ids=["plain", "llama3"])
def test_every_position_is_float64s(config):
    assert table_error(config) < TOLERANCE


@pytest.mark.parametrize(
    "scaling",
    [None, RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 8192), RopeScaling(3.0, 2.0, 7.0, 300)],
)
@pytest.mark.parametrize("theta, head_dim", [(10000.0, 128), (500000.0, 64), (100000.0, 10)])
def test_frequencies_are_transformers(scaling, theta, head_dim):
    config = dataclasses.replace(PLAIN, rope_theta=theta, head_dim=head_dim, rope_scaling=scaling)
    hf = LlamaConfig.from_dict(config.to_hf_dict())
    if scaling is None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        expected = LlamaRotaryEmbedding(hf).inv_freq
    else:
        expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](hf, "cpu")
        assert attention_factor == 1.0
    torch.testing.assert_close(rope.inverse_frequencies(config), expected, rtol=2e-6, atol=0)


def test_positions_past_2048_are_told_apart():
    """In float16 2049 is 2048. Neighbouring positions must differ, and rotated vectors with them."""
    table = rope.RotaryTable(PLAIN)
    cos, sin = table.at(torch.tensor([2047, 2048, 2049, 8191, 8192], dtype=torch.int32))
    assert cos.shape == sin.shape == (5, 1, 32)
    rows = torch.cat([cos, sin], -1).flatten(1)
    assert all((rows[i] - rows[j]).abs().max() > 0.5 for i in range(5) for j in range(i))


def test_rounded_positions_are_refused():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        with pytest.raises(TypeError, match="collapse"):
            rope.RotaryTable(PLAIN).at(torch.arange(4).to(dtype))


@pytest.mark.parametrize("bug", ["float16 positions", "float16 angles", "bfloat16 frequencies", "scaling ignored"])
def test_the_oracle_sees_known_bugs(bug, monkeypatch):
    config, arange, outer, frequencies = PLAIN, torch.arange, torch.outer, rope.inverse_frequencies
    if bug == "float16 positions":
        monkeypatch.setattr(rope.torch, "arange", lambda *a, **kw: arange(*a, **kw).half())
    elif bug == "float16 angles":
        monkeypatch.setattr(rope.torch, "outer", lambda a, b: outer(a, b).half().float())
    elif bug == "bfloat16 frequencies":
        monkeypatch.setattr(rope, "inverse_frequencies", lambda c: frequencies(c).bfloat16().float())
    else:
        config = SCALED
        monkeypatch.setattr(rope, "_llama3_scaled", lambda f, scaling: f)
    assert table_error(config) > 10 * TOLERANCE


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_halves_are_rotated_against_each_other(dtype, tolerance):
    """Element i is paired with element i + d/2, as complex numbers times e^(i angle)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 5, 16, generator=generator).to(dtype)
    config = dataclasses.replace(PLAIN, head_dim=16)
    positions = torch.tensor([0, 1, 2, 100, 2049, 4097, 8999])
    got = rope.rotate(x, *rope.RotaryTable(config).at(positions))
    assert got.dtype == dtype
    wide = x.double().numpy()
    turned = (wide[..., :8] + 1j * wide[..., 8:]) * np.exp(1j * oracle_angles(config, positions.numpy()))[:, None]
    expected = np.concatenate([turned.real, turned.imag], -1)
    error = np.abs(got.double().numpy() - expected)
    assert (error <= tolerance * (np.abs(expected) + 1) + 2 * TOLERANCE * np.abs(wide).max()).all()
    neighbours = np.empty_like(expected)  # the interleaved order, which must not pass
    turned = (wide[..., 0::2] + 1j * wide[..., 1::2]) * np.exp(1j * oracle_angles(config, positions.numpy()))[:, None]
    neighbours[..., 0::2], neighbours[..., 1::2] = turned.real, turned.imag
    assert np.abs(neighbours - expected).max() > 0.5

"""Rotary position embeddings: the tables of cosines and sines, and the rotation.

Two details decide whether a Llama checkpoint gives right answers, and both are tests:
- positions stay integers and angles float32: in float16 positions beyond 2,048 collapse onto each other;
- the halves of a head are rotated against each other (Hugging Face's "rotate_half" order), not neighbouring elements.
"""

from __future__ import annotations

import math

import torch

from common.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Angle per position of each rotated pair, float32 [head_dim / 2]; RoFormer (arXiv 2104.09864), section 3.2.2."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is not None:
        frequencies = _llama3_scaled(frequencies, config.rope_scaling)
    return frequencies


def _llama3_scaled(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, the band between blended."""
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_share = ((context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return kept_share * frequencies + (1 - kept_share) * frequencies / scaling.factor


class RotaryTable:
    """Cosines and sines of every position of the context, float32 [context, head_dim / 2] each."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        positions = torch.arange(config.max_position_embeddings, dtype=torch.int64).float()
        angles = torch.outer(positions, inverse_frequencies(config))
        self.cos = angles.cos().to(device)
        self.sin = angles.sin().to(device)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for integer `positions` [T], each [T, 1, head_dim / 2] so that they broadcast over the heads."""
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"positions must be int32 or int64, not {positions.dtype}: rounded positions collapse")
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads `x` [T, H, d] by `cos`, `sin` [T, 1, d / 2]; computed in float32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)

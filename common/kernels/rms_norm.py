"""RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight, accumulated in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Norm:
    """A norm's parameters: `weight` [D] in the model's dtype, and the checkpoint's own `eps`."""

    weight: torch.Tensor
    eps: float


def rms_norm_reference(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """[T, D] -> [T, D] in x's dtype. Squares of float16 activations overflow past 256: hence float32 inside."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * (wide * scale).to(x.dtype)


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """[T, D] -> [T, D]."""
    return rms_norm_reference(x, norm)

"""SwiGLU's activation (arXiv 2002.05202): silu(gate) * up, on the fused output of gate_up."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 F] (gate first) -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 F] (gate first) -> [T, F]."""
    return silu_mul_reference(gate_up)

"""The decoder, written once: a Llama over packed tokens.

Tokens of any number of sequences stand one after another in a single dimension T; there is no padding and no batch
dimension. What differs between "no cache", "cached", "batched", "paged" and "chunked" is the object passed as `attend`
(common/attention.py) and the loop around the model.

T tokens, R wanted rows, D hidden size, Hq / Hkv query / key-value heads of d elements, F feed-forward width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.config import ModelConfig
from common.kernels.linear import Linear, greedy_ids, linear_add, linear_float32, norm_gate_up_silu, norm_linear
from common.kernels.rms_norm import Norm, rms_norm

Attend = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """The weights of one layer, q, k, v and gate, up fused: three products become one, two become one."""

    input_norm: Norm
    qkv: Linear  # [(Hq + 2 Hkv) d, D]
    o_proj: Linear  # [D, Hq d]
    post_norm: Norm
    gate_up: Linear  # [2 F, D]
    down_proj: Linear  # [D, F]


@dataclass(frozen=True)
class Llama:
    """A decoder's weights and the forward pass over them. `common.checkpoint.load` makes one."""

    config: ModelConfig
    embed_tokens: torch.Tensor  # [V, D]
    layers: tuple[Layer, ...]
    norm: Norm
    lm_head: Linear  # [V, D]
    origin: str = ""  # where the weights came from, for provenance
    bytes_read: int = 0  # what was read of the checkpoint's files: a rank of a tensor-parallel run reads its slices

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.dtype

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.embed_tokens)

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, attend: Attend, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids [T] -> normalised hidden states [T, D], or [R, D] when only `rows` [R] are wanted.

        The last layer's keys and values are stored for all T tokens, but the rest of it is computed on `rows` alone.
        """
        x = self.embed(tokens)  # [T, D]
        for i, w in enumerate(self.layers):
            qkv = norm_linear(x, w.input_norm, w.qkv)  # [T, (Hq + 2 Hkv) d]
            a = attend(i, qkv)  # rotate q, k; store k, v; attend -> [T, Hq d]
            if rows is not None and i == len(self.layers) - 1:
                a, x = a[rows], x[rows]
            x = linear_add(a, w.o_proj, x)  # x + a W^T, [T, D]
            g = norm_gate_up_silu(x, w.post_norm, w.gate_up)  # [T, F]
            x = linear_add(g, w.down_proj, x)  # [T, D]
        return rms_norm(x, self.norm)

    @torch.inference_mode()
    def greedy(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, D] -> the likeliest next ids [R], int64: `logits(hidden).argmax(-1)`, without a float32
        copy.
        """
        return greedy_ids(hidden, self.lm_head)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, D] -> logits [R, V], float32."""
        return linear_float32(hidden, self.lm_head)

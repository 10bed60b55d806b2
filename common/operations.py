"""The same decoder with plainer operations: what an ablation takes away, and what a fast path is held against.

The decoder calls its operations with its weights, and the weights say how they are computed (`Kernels`). So a plainer
decoder is the same one with other wrappers around the same tensors: common/llama.py does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from common.kernels.linear import Linear
from common.kernels.rms_norm import Norm
from common.kernels.runtime import Kernels
from common.llama import Layer, Llama


class UnfusedLinear(Linear):
    """A fused weight multiplied part by part: q, k, v as three products and gate, up as two, each after the other.

    sizes: rows of each part. The parts are views of the one weight; their few rows of results are put together at the
    end, a small copy. (Products into columns of one result need none, but cuBLAS took 300 us for such a product.)
    """

    def __init__(self, weight: torch.Tensor, sizes: Sequence[int]) -> None:
        super().__init__(weight, kernels=Kernels.PLAIN)
        self.sizes = list(sizes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(x, part) for part in self.weight.split(self.sizes)], dim=1)


def with_kernels(model: Llama, kernels: Kernels, *, fused_weights: bool = True) -> Llama:
    """`model` with its operations computed as `kernels` says; without `fused_weights`, q, k, v and gate, up are
    multiplied apart.

    Weights are shared, but where a CPU holds them prepacked the plain ones are made anew (as much memory again).
    """
    c = model.config

    def norm(given: Norm) -> Norm:
        return replace(given, kernels=kernels)

    def linear(given: Linear, sizes: Sequence[int] = ()) -> Linear:
        if given.group is not None:
            raise ValueError("a rank of a tensor-parallel run has no plainer form")
        return UnfusedLinear(given.weight, sizes) if sizes else Linear(given.weight, kernels=kernels)

    apart = not fused_weights
    qkv, gate_up = (c.q_size, c.kv_size, c.kv_size), (c.intermediate_size, c.intermediate_size)
    layers = tuple(
        Layer(
            input_norm=norm(w.input_norm),
            qkv=linear(w.qkv, qkv if apart else ()),
            o_proj=linear(w.o_proj),
            post_norm=norm(w.post_norm),
            gate_up=linear(w.gate_up, gate_up if apart else ()),
            down_proj=linear(w.down_proj),
        )
        for w in model.layers
    )
    return replace(model, layers=layers, norm=norm(model.norm), lm_head=linear(model.lm_head))

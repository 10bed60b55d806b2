"""The decoder's products: norm_linear, linear_add, norm_gate_up_silu, and the head.

The plain version of each is the paper's line. On a CPU in float32 the weight is kept in the block layout that oneDNN
computes with, made once at load: `F.linear` would reorder it again at every call, which at one row costs more than the
product itself.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.kernels.rms_norm import Norm, rms_norm
from common.kernels.silu_mul import silu_mul

# oneDNN chooses the block layout for this many rows; measured, 32 serves 1 row and 512 rows alike.
PACK_ROWS = 32


def _can_prepack(weight: torch.Tensor) -> bool:
    """Both operators are private to torch, so they are looked for rather than assumed."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class Linear:
    """A weight [out, in] and how to multiply with it. There are no biases in a Llama.

    `group`: the process group over which this product's input columns are split (tensor parallelism, row split), or
    None. `linear_add` sums over it; nothing else of the decoder knows.
    """

    def __init__(self, weight: torch.Tensor, *, prepack: bool = True, group: dist.ProcessGroup | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.group = group
        self._packed = None
        self._weight: torch.Tensor | None = weight
        if prepack and _can_prepack(weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
            self._weight = None  # the packed copy replaces the plain one: a model is held once

    @property
    def is_prepacked(self) -> bool:
        return self._packed is not None

    @property
    def weight(self) -> torch.Tensor:
        """[out, in] as a plain tensor (a copy where only the packed form is held)."""
        return self._weight if self._weight is not None else self._packed.to_dense()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return F.linear(x, self._weight)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + x W^T, the sum inside the product's epilogue where the library has one. Returns a new tensor."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, None, "add")
        return torch.addmm(residual, x, self._weight.t())


def norm_linear(x: torch.Tensor, norm: Norm, linear: Linear) -> torch.Tensor:
    """rms_norm(x) W^T: [T, D] -> [T, out]."""
    return linear(rms_norm(x, norm))


def linear_add(a: torch.Tensor, linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """x + a W^T: [T, in], [T, D] -> [T, D]; summed over the ranks of `linear.group` where the input is split."""
    if linear.group is None:
        return linear.plus(a, x)
    partial = linear(a)
    dist.all_reduce(partial, group=linear.group)
    return x + partial


def norm_gate_up_silu(x: torch.Tensor, norm: Norm, gate_up: Linear) -> torch.Tensor:
    """silu(g) * u with g, u = rms_norm(x) [W_gate; W_up]^T: [T, D] -> [T, F]."""
    return silu_mul(norm_linear(x, norm, gate_up))

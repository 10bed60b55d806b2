"""The decoder's products: norm_linear, linear_add, norm_gate_up_silu, and the head.

The plain version of each is the paper's line. On a CPU in float32 the weight is kept in the block layout that oneDNN
computes with, made once at load: `F.linear` would reorder it again at every call, which at one row costs more than the
product itself. On a GPU a decode step's few rows take our own kernels (matvec.py, small_gemm.py, hopper_gemm.py), with
their neighbours fused; `choose` is the one place where that is decided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from common.kernels.argmax import argmax, argmax_reference
from common.kernels.hopper_gemm import hopper_gemm, runs_hopper_gemm
from common.kernels.matvec import MAX_IN_FEATURES, matvec
from common.kernels.rms_norm import Norm, rms_norm
from common.kernels.runtime import Kernels, runs_triton
from common.kernels.silu_mul import silu_mul, silu_mul_reference
from common.kernels.small_gemm import small_gemm, small_gemm_pays

if TYPE_CHECKING:
    from common.tensor_parallel.collectives import TensorParallel

# oneDNN chooses the block layout for this many rows; measured, 32 serves 1 row and 512 rows alike.
PACK_ROWS = 32
# Up to how many rows small_gemm beats cuBLAS with its neighbours unfused, and at how many rows hopper_gemm beats both:
# measured in decode steps on an H200 (docs/performance.md). Above 128 rows its tiles of 192 and 256 rows of x must be
# nearly full: cuBLAS has tiles of any multiple of 8.
MOST_ROWS = {"norm_linear": 32, "linear_add": 64, "norm_gate_up_silu": 64, "linear_float32": 64}
HOPPER_ROWS = {
    "linear_add": {*range(33, 129), *range(185, 193)},
    "norm_gate_up_silu": {*range(33, 129), *range(185, 193), *range(249, 257)},
}
GEMMS = {"small_gemm": small_gemm, "hopper_gemm": hopper_gemm}


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

    `group`: the ranks over which this product's input columns are split (tensor parallelism, row split; a
    `common.tensor_parallel.collectives.TensorParallel`), or None. `linear_add` sums over it; nothing else of the
    decoder knows. `kernels`: how it and its neighbours are computed; below ALL nothing is prepacked.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        group: TensorParallel | None = None,
        kernels: Kernels = Kernels.ALL,
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.group, self.kernels = group, kernels
        self._packed = None
        self._weight: torch.Tensor | None = weight
        if kernels is Kernels.ALL and _can_prepack(weight):
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
        """residual + x W^T, the sum inside the product's epilogue. `residual` may be overwritten with the result.

        In place, cuBLAS takes the residual as the product's beta = 1 operand; into a new tensor, torch copies it first.
        """
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, None, "add")
        if self.kernels is Kernels.PLAIN:
            return residual + self(x)
        return residual.addmm_(x, self._weight.t())


class SplitHead(Linear):
    """A head of which this rank holds some vocabulary rows; `linear_float32` gathers the logits from all ranks.

    weight: [this rank's rows, in]; total_rows: the vocabulary. Called with the sampled rows alone, so little travels.
    """

    def __init__(self, weight: torch.Tensor, ranks: TensorParallel, total_rows: int) -> None:
        super().__init__(weight)
        self.ranks, self.total_rows = ranks, total_rows

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """[R, this rank's rows] -> [R, total_rows], the same bits on every rank."""
        return self.ranks.gather_columns(part, self.total_rows)


def choose(x: torch.Tensor, linear: Linear, operation: str) -> str:
    """Which product runs in an operation of MOST_ROWS: "matvec" (one row), "small_gemm" or "hopper_gemm" (on Hopper,
    for the rows that the tables say) or "library".
    """
    if linear.is_prepacked or linear.kernels is not Kernels.ALL or not runs_triton(x):
        return "library"
    rows = len(x)
    if rows == 1 and linear.in_features <= MAX_IN_FEATURES:
        return "matvec"
    if rows in HOPPER_ROWS.get(operation, ()) and runs_hopper_gemm(x, linear.weight):
        return "hopper_gemm"
    return "small_gemm" if 1 < rows <= MOST_ROWS[operation] and small_gemm_pays(x) else "library"


def norm_linear(x: torch.Tensor, norm: Norm, linear: Linear) -> torch.Tensor:
    """rms_norm(x) W^T: [T, D] -> [T, out]."""
    kernel = choose(x, linear, "norm_linear")
    if kernel == "matvec":
        return matvec(x, linear.weight, norm_weight=norm.weight, eps=norm.eps)
    x = rms_norm(x, norm)
    return linear(x) if kernel == "library" else GEMMS[kernel](x, linear.weight)


def linear_add(a: torch.Tensor, linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """x + a W^T: [T, in], [T, D] -> [T, D], perhaps in x's memory; summed over the ranks where the input is split."""
    kernel = choose(a, linear, "linear_add")
    product = matvec if kernel == "matvec" else GEMMS.get(kernel)
    if linear.group is None:
        return product(a, linear.weight, residual=x) if product else linear.plus(a, x)
    return linear.group.all_reduce(product(a, linear.weight) if product else linear(a), x)


def norm_gate_up_silu(x: torch.Tensor, norm: Norm, gate_up: Linear) -> torch.Tensor:
    """silu(g) * u with g, u = rms_norm(x) [W_gate; W_up]^T: [T, D] -> [T, F]."""
    kernel = choose(x, gate_up, "norm_gate_up_silu")
    if kernel == "matvec":
        return matvec(x, gate_up.weight, norm_weight=norm.weight, eps=norm.eps, silu=True)
    x = rms_norm(x, norm)
    if kernel in GEMMS:
        return GEMMS[kernel](x, gate_up.weight, silu=True)
    return (silu_mul_reference if gate_up.kernels is Kernels.PLAIN else silu_mul)(gate_up(x))


def linear_float32(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """x W^T in float32, as logits are wanted: [R, D] -> [R, V]. Our kernels do not round to x's dtype in between."""
    return head_product(x, linear).float()


def greedy_ids(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """The index of each row's largest product, [R, D] -> int64 [R]. A library's product is compared as it was rounded:
    making float32 of it first would change nothing but the bytes moved.
    """
    return (argmax_reference if linear.kernels is Kernels.PLAIN else argmax)(head_product(x, linear))


def head_product(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """x W^T in float32 by our kernels or in x's dtype by the library, gathered where ranks hold parts of it."""
    kernel = choose(x, linear, "linear_float32")
    if kernel == "library":
        product = linear(x)
    else:
        product = (matvec if kernel == "matvec" else small_gemm)(x, linear.weight, out_dtype=torch.float32)
    return linear.gather(product) if isinstance(linear, SplitHead) else product

"""Products of 2 to 256 rows on Hopper in CUDA C++: tiles shared over a cluster by multicast, K divided over it.

The kernel is hopper_gemm.cu, which says what it does and why. Here it is built (once, by torch's extension loader; the
library is kept in its cache), its tiles are chosen, and it is called. Where it cannot be built - no nvcc, another
architecture - callers keep Triton's small_gemm and the library's product.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import first_line
from common.kernels.runtime import capability

SOURCE = Path(__file__).with_name("hopper_gemm.cu")
MAX_ROWS = 256
BLOCK_K = 64  # features of a step, as in the source
# Rows of W that a tile may have, by how many rows of x it has: the tiles that the source compiles, without and with
# silu.
COLUMNS = {64: (64, 96, 128), 128: (96, 112, 128, 144), 192: (96, 112, 128, 144), 256: (96, 112, 128)}
COLUMNS_SILU = {64: (224,), 128: (224,), 192: (112,), 256: (112,)}
CLUSTER_SIZES = (1, 2, 3, 4, 6, 8)

# What choosing needs of the machine, fitted to the times of all plans at Llama-3-8B's sizes on one H200 (the choice
# costs 0.7 % against the best plan there, 6 % at most): what a multiprocessor computes, takes in and reads of another's
# memory in a microsecond, what L2 and the memory give to all of them; what a launch and a step of K cost at least.
FLOPS_PER_SM_US = 7.2e6
BYTES_PER_SM_US = 1.24e5
REMOTE_BYTES_PER_SM_US = 2.7e4
L2_BYTES_US = 6.56e6
MEMORY_BYTES_US = 4.59e6
LAUNCH_US = 2.3
STEP_US = 0.036


@dataclass(frozen=True)
class Plan:
    """How a product is cut: `columns` rows of W a tile; clusters of `sharers` tiles that share x, in `parts` of K."""

    columns: int
    sharers: int
    parts: int


def row_class(rows: int) -> int:
    """Rows of x that a tile has room for: 64, 128, 192 or 256."""
    return -(-rows // 64) * 64


def predicted_us(rows: int, outputs: int, features: int, silu: bool, plan: Plan, clusters: tuple[int, ...]) -> float:
    """What a plan should take, from what each part of the machine must do; inf where it does not fit.

    clusters: how many of each of CLUSTER_SIZES run at once.

    All tiles that run at once are a wave. A wave takes as long as its slowest part: the products, what a multiprocessor
    takes in, what L2 gives out (x once a cluster: that is what sharing saves), what the memory gives.
    """
    size = plan.sharers * plan.parts
    tiles = -(-outputs // (plan.columns // 2 if silu else plan.columns))
    if size not in CLUSTER_SIZES:
        return float("inf")
    groups, at_once = -(-tiles // plan.sharers), clusters[CLUSTER_SIZES.index(size)]
    if not at_once or (plan.parts > 1 and (silu or groups > at_once or features < BLOCK_K * plan.parts)):
        return float("inf")
    blocks, share = min(groups, at_once) * size, features / plan.parts
    computed = 2 * row_class(rows) * plan.columns * share / FLOPS_PER_SM_US
    taken = 2 * (rows + plan.columns) * share / BYTES_PER_SM_US
    given = 2 * (rows / plan.sharers + plan.columns) * share * blocks / L2_BYTES_US
    read = 2 * plan.columns * share * blocks / MEMORY_BYTES_US
    summed = 4 * rows * plan.columns / REMOTE_BYTES_PER_SM_US if plan.parts > 1 else 0.0
    wave = max(computed, taken, given, read) + STEP_US * share / BLOCK_K
    return LAUNCH_US + -(-groups // at_once) * wave + summed


def plans_of(rows: int, outputs: int, features: int, silu: bool, clusters: tuple[int, ...]) -> list[Plan]:
    """Every plan that fits, smaller clusters first."""
    columns = (COLUMNS_SILU if silu else COLUMNS)[row_class(rows)]
    plans = [Plan(c, s, p) for s in (1, 2, 4) for p in (1, 2, 3, 4) for c in columns]
    plans = [plan for plan in plans if predicted_us(rows, outputs, features, silu, plan, clusters) < float("inf")]
    return sorted(plans, key=lambda plan: plan.sharers * plan.parts)


@functools.lru_cache(maxsize=1024)
def choose_plan(rows: int, outputs: int, features: int, silu: bool, clusters: tuple[int, ...]) -> Plan:
    """The plan that should take least; of equals the one with the smaller cluster."""
    plans = plans_of(rows, outputs, features, silu, clusters)
    return min(plans, key=lambda plan: predicted_us(rows, outputs, features, silu, plan, clusters))


@functools.lru_cache
def clusters_at_once(device: torch.device) -> tuple[int, ...]:
    """How many clusters of each of CLUSTER_SIZES run at once on the device. The kernel must have been built."""
    with torch.cuda.device(device):
        return tuple(build().tlab_hopper_clusters(size) for size in CLUSTER_SIZES)


@functools.lru_cache
def build():
    """The compiled library, or None (said once, on stderr) where it cannot be built."""
    from torch.utils import cpp_extension

    try:
        library = cpp_extension.load(
            "tlab_hopper_gemm",
            [str(SOURCE)],
            extra_cuda_cflags=["-O3", "-gencode=arch=compute_90a,code=sm_90a"],
            is_python_module=False,
        )
        library = ctypes.CDLL(library)
    except (OSError, RuntimeError, ImportError) as error:
        note = f"note: hopper_gemm.cu was not built ({first_line(error)}); products take the other kernels"
        print(note, file=sys.stderr)
        return None
    pointer, number, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    function = library.tlab_hopper_gemm
    function.argtypes = [pointer, stride, pointer, stride, pointer, number, pointer, *[number] * 8, pointer]
    function.restype = library.tlab_hopper_clusters.restype = number
    library.tlab_hopper_clusters.argtypes = [number]
    return library


def runs_hopper_gemm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes these: bfloat16 on compute capability 9, rows of whole 16-byte pieces, at most 256."""
    return (
        capability(x.device)[0] == 9
        and x.dtype == weight.dtype == torch.bfloat16
        and 1 <= len(x) <= MAX_ROWS
        and x.shape[1] % 8 == weight.shape[0] % 8 == x.stride(0) % 8 == weight.stride(0) % 8 == 0
        and x.stride(1) == weight.stride(1) == 1
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
        and build() is not None
    )


def hopper_gemm(x, weight, *, residual=None, silu=False, plan: Plan | None = None):
    """x [T, K] times weight [N, K]^T, accumulated in float32 and rounded once: [T, N], + residual [T, N] where given;
    with silu, weight is [2F, K], gate rows first, and the result silu(gate) * up, [T, F].

    For tensors that `runs_hopper_gemm` takes; `plan` overrides the choice. Raises RuntimeError where a launch fails.
    """
    rows, features = x.shape
    outputs = weight.shape[0] // 2 if silu else weight.shape[0]
    plan = plan or choose_plan(rows, outputs, features, silu, clusters_at_once(x.device))
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    error = build().tlab_hopper_gemm(
        x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        None if residual is None else residual.data_ptr(), 0 if residual is None else residual.stride(0),
        out.data_ptr(), out.stride(0), rows, outputs, features, silu, plan.columns, plan.sharers, plan.parts,
        torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"hopper_gemm {rows}x{outputs}x{features} {plan}: CUDA error {error}")
    return out

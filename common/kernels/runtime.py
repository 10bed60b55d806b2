"""What every kernel file shares: Triton where it exists, what the device can do, and how a kernel is launched.

Machines without Triton (macOS, Windows) must still import the kernel files for their plain versions, so `jit` and
`tl.constexpr` have stand-ins here; calling a Triton version there raises a UserError.
"""

from __future__ import annotations

import enum
import functools
import os
from types import SimpleNamespace

import torch

from common.errors import UserError

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # no wheel for this platform
    triton = None
    tl = SimpleNamespace(constexpr=object)
    HAS_TRITON = False

# Read once, as Triton does: kernels are interpreted or compiled according to its value when they are defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Kernels(enum.IntEnum):
    """How far the decoder's operations are fused, as their weights say (`Linear.kernels`, `Norm.kernels`)."""

    PLAIN = 0  # torch's operations, one after the other
    FUSED = 1  # norms, activation and greedy choice in a kernel each, the residual in the product's epilogue
    ALL = 2  # products of our own, too, where they pay; on a CPU oneDNN's prepacked weights


class _AbsentKernel:
    def __init__(self, function):
        self.name = function.__name__

    def __getitem__(self, grid):
        raise UserError(f"{self.name} needs Triton, which is not installed here: use the plain torch version")


def jit(function=None, *, varies=(), unaligned=()):
    """`triton.jit`, or a stand-in that raises UserError when launched on a machine without Triton.

    Triton compiles a kernel anew where an int is 1 or a multiple of 16 and where a pointer is one. For what changes
    from step to step that means a second's wait in the middle of serving, and nothing gained. varies: ints that are
    taken as they come; unaligned: pointers into the middle of index arrays.
    """
    if function is None:
        return functools.partial(jit, varies=varies, unaligned=unaligned)
    if not HAS_TRITON:
        return _AbsentKernel(function)
    return triton.jit(function, do_not_specialize=[*varies, *unaligned], do_not_specialize_on_alignment=list(unaligned))


if HAS_TRITON and not INTERPRETED:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
else:  # the interpreter knows no inline assembly; every call stands behind `if PDL`, which is False there
    gdc_launch_dependents = gdc_wait = None


@functools.lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.lru_cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small number under the interpreter, so that its grids stay short."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def runs_triton(x: torch.Tensor) -> bool:
    """Whether the Triton versions run on this tensor's device and dtype: compute capability 7.5 or later, bfloat16 from
    8.0 on. Under TRITON_INTERPRET=1 the CPU still takes the plain versions: tests call the Triton ones by name."""
    if not HAS_TRITON or INTERPRETED or x.device.type != "cuda" or torch.version.hip:
        return False
    least = {torch.float16: (7, 5), torch.float32: (7, 5), torch.bfloat16: (8, 0)}.get(x.dtype)
    return least is not None and capability(x.device) >= least


def has_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch (compute capability 9.0): a kernel may start while the one before it drains, and
    waits with `gdc_wait` before it touches anything that an earlier kernel reads or writes."""
    return HAS_TRITON and not INTERPRETED and capability(device) >= (9, 0)


def launch_options(device: torch.device, **options) -> dict:
    """Keyword arguments of a launch: `PDL` for the kernel, the launch attribute beside it, and `options`."""
    pdl = has_pdl(device)
    return {"PDL": pdl, **options, **({"launch_pdl": True} if pdl else {})}


@functools.lru_cache
def arrival_counters(device: torch.device) -> torch.Tensor:
    """Zeros that kernels count their programs' arrivals in and leave at zero. All kernels of a device share them, so
    those must follow one another (one stream); never freed, because captured graphs hold the address."""
    return torch.zeros(1 << 17, dtype=torch.int32, device=device)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()

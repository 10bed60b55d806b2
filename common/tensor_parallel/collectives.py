"""The two collectives of a tensor-parallel decoder: a sum after each row split, a gathering after the split head.

The sum has several implementations, of which the fastest for a size is chosen:

    library   NCCL on GPUs, gloo on CPUs: a ring or a tree; best for large tensors
    one_shot  every rank reads all ranks' tensors through NVLink and adds them up itself: one kernel, one exchange of
              signals; best for a decode step's few kilobytes
    two_shot  each rank adds up one part of the tensor, then all read the parts: half the bytes of one_shot at two ranks
              and fewer beyond, for one more exchange of signals

The last two work on symmetric memory (a buffer at a known place in every GPU) of torch.distributed; NVLink multicast is
not used. They are looked for at run time: the module is private to torch.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from common.errors import UserError
from common.tensor_parallel.sharding import even_parts

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
MAX_SYMMETRIC_BYTES = 4 << 20  # far above any decode step's activations; prefill goes through the library


class TensorParallel:
    """What `Linear.group` of a split weight is: the ranks, and how their tensors are summed and gathered.

    group: the process group. symmetric: whether to try symmetric memory. All ranks must make it together.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype, *, symmetric: bool = False):
        self.group, self.device, self.dtype = group, device, dtype
        self.size = dist.get_world_size(group)
        self.symmetric = SymmetricMemory(group, device, dtype, MAX_SYMMETRIC_BYTES) if symmetric else None
        self.spent_s = 0.0  # seconds in `all_reduce` so far; on a CPU, where a call returns when it is done
        self.algorithm_of: dict[int, str] = {}  # bytes of a tensor -> algorithm; the library's where none is named

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the ranks, on all of them; x itself may be overwritten."""
        algorithm = self.algorithm_of.get(x.nbytes, "library")
        if self.symmetric is None or algorithm == "library":
            began = time.perf_counter()
            dist.all_reduce(x, group=self.group)
            self.spent_s += time.perf_counter() - began
            return x
        return getattr(self.symmetric, algorithm)(x)

    def name_of(self, x: torch.Tensor) -> str:
        """What sums a tensor of x's size: "gloo", "nccl", "one_shot" or "two_shot"."""
        algorithm = self.algorithm_of.get(x.nbytes, "library")
        return dist.get_backend(self.group) if algorithm == "library" else algorithm

    def gather_columns(self, part: torch.Tensor, total: int) -> torch.Tensor:
        """[R, this rank's columns] -> [R, total], where `total` columns are split as `even_parts` splits them."""
        sizes = [len(columns) for columns in even_parts(total, self.size)]
        widest = max(sizes)
        if part.shape[1] < widest:  # the collective wants equal pieces
            part = torch.nn.functional.pad(part, (0, widest - part.shape[1]))
        pieces = part.new_empty(self.size * len(part), widest)
        _all_gather(pieces, part.contiguous(), group=self.group)
        pieces = pieces.view(self.size, len(part), widest)
        return torch.cat([pieces[rank, :, :size] for rank, size in enumerate(sizes)], dim=1)


class SymmetricMemory:
    """All-reduces over a buffer that every rank's GPU can read in every other's. Made by all ranks together.

    Raises UserError where the machine does not offer it; ask `why_unavailable` first whether this torch does.
    """

    OPERATORS = ("one_shot_all_reduce", "two_shot_all_reduce_")

    def __init__(self, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype, max_bytes: int) -> None:
        import torch.distributed._symmetric_memory as symm_mem

        self.group_name = group.group_name
        self.buffer = symm_mem.empty(max_bytes // dtype.itemsize, dtype=dtype, device=device)
        try:
            self.handle = symm_mem.rendezvous(self.buffer, self.group_name)
        except RuntimeError as error:  # no peer access between the GPUs, no fabric handles in a container, ...
            first_line = (str(error).splitlines() or ["no reason given"])[0]
            raise UserError(f"the GPUs do not share memory ({first_line})") from None

    def fits(self, num_bytes: int) -> bool:
        """Whether the kernels take a tensor of that many bytes: it fits, and ranks can share it in 16-byte pieces."""
        return num_bytes <= self.buffer.nbytes and num_bytes % (16 * dist.get_world_size()) == 0

    def one_shot(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the ranks, as a new tensor. The kernel waits for all ranks before and after it reads."""
        return torch.ops.symm_mem.one_shot_all_reduce(self._put(x), "sum", self.group_name).view_as(x)

    def two_shot(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the ranks, written over x."""
        shared = self._put(x)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self.group_name)
        return x.copy_(shared.view_as(x))

    def _put(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.buffer[: x.numel()]
        shared.copy_(x.reshape(-1))
        return shared


def why_unavailable(device: torch.device) -> str | None:
    """Why symmetric memory cannot be used here, or None."""
    if device.type != "cuda":
        return "it needs GPUs"
    try:
        import torch.distributed._symmetric_memory as symm_mem
    except ImportError:
        return f"torch {torch.__version__} does not have it"
    missing = [name for name in SymmetricMemory.OPERATORS if not hasattr(torch.ops.symm_mem, name)]
    if missing or not hasattr(symm_mem, "rendezvous") or not hasattr(symm_mem, "empty"):
        return f"torch {torch.__version__} lacks {', '.join(missing) or 'its set-up'}"
    return None


def make_tensor_parallel(world: Any, dtype: torch.dtype, choice: str = "auto") -> TensorParallel:
    """The ranks of `world` as tensor-parallel group. choice: `--allreduce`'s auto, nccl or symm.

    auto takes symmetric memory where all ranks have it, and says why where not; symm insists on it.
    """
    if world.device.type != "cuda":
        if choice != "auto":
            raise UserError(f"--allreduce {choice}: needs GPUs; on a CPU gloo sums, use --allreduce auto")
        return TensorParallel(world.group, world.device, dtype)
    if choice == "nccl" or world.size == 1:
        return TensorParallel(world.group, world.device, dtype)
    parallel, problem = None, why_unavailable(world.device)
    if not any(world.exchange(problem)):  # setting it up takes all ranks: none may have stayed away
        try:
            parallel = TensorParallel(world.group, world.device, dtype, symmetric=True)
            world.leave_at_once = True  # tearing down after it was used in a captured graph can hang
        except UserError as error:
            problem = str(error)
    problems = [text for text in world.exchange(problem) if text]
    if parallel is not None and not problems:
        return parallel
    if choice == "symm":
        raise UserError(f"--allreduce symm: {problems[0]}; use --allreduce nccl")
    print(f"all-reduce: NCCL alone; symmetric memory: {problems[0]}")
    return TensorParallel(world.group, world.device, dtype)

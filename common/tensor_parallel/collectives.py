"""The two collectives of a tensor-parallel decoder: a sum after each row split, a gathering after the split head.

The sum has several implementations, of which the fastest for a size is chosen:

    library      NCCL on GPUs, gloo on CPUs: a ring or a tree; best for large tensors
    one_shot     every rank reads all ranks' tensors through NVLink and adds them up itself: a copy into the shared
                 buffer, one kernel, one exchange of signals
    two_shot     each rank adds up one part of the tensor, then all read the parts: half the bytes of one_shot at two
                 ranks and fewer beyond, for one more exchange of signals
    low_latency  every rank writes its tensor into all others' memory, each 32 bits with the number of the call beside
                 them, so that the data is its own signal; one kernel, meant for a decode step's few kilobytes
    push         the same with plain stores and a flag a slice: half low_latency's bytes, for a fence more

The last four work on symmetric memory (a buffer at a known place in every GPU) of torch.distributed: one_shot and
two_shot are torch's, low_latency and push our own (push_all_reduce.py) and add the residual in the same kernel. NVLink
multicast is not used. Symmetric memory is looked for at run time: the module is private to torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from common.errors import UserError
from common.tensor_parallel import push_all_reduce
from common.tensor_parallel.push_all_reduce import PushAllReduce, buffer_bytes
from common.tensor_parallel.sharding import even_parts

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
AllReduce = Callable[..., torch.Tensor]  # (x, residual=None)
MAX_SYMMETRIC_BYTES = 4 << 20  # far above any decode step's activations; prefill goes through the library


class TensorParallel:
    """What `Linear.group` of a split weight is: the ranks, and how their tensors are summed and gathered.

    group: the process group. symmetric: symmetric memory of the same ranks and dtype, or None. All ranks must make it
    together.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        symmetric: SymmetricMemory | None = None,
    ) -> None:
        self.group, self.device, self.dtype = group, device, dtype
        self.size = dist.get_world_size(group)
        self.symmetric = symmetric
        self.spent_s = 0.0  # seconds in `library` so far; on a CPU, where a call returns when it is done
        self.algorithm_of: dict[int, str] = {}  # bytes of a tensor -> algorithm; the library's where none is named

    def all_reduce(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of x over the ranks, on all of them, + residual (the same on all); x itself may be overwritten."""
        algorithm = self.algorithm_of.get(x.nbytes, "library")
        if self.symmetric is None or algorithm == "library":
            return self.library(x, residual)
        return self.symmetric.algorithms(x.nbytes)[algorithm](x, residual)

    def library(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`all_reduce` by NCCL or gloo, over x."""
        began = time.perf_counter()
        dist.all_reduce(x, group=self.group)
        self.spent_s += time.perf_counter() - began
        return _plus(x, residual)

    def algorithms(self, num_bytes: int) -> dict[str, AllReduce]:
        """Name -> `all_reduce`, of all that take a tensor of that many bytes; the library's first."""
        return {"library": self.library} | (self.symmetric.algorithms(num_bytes) if self.symmetric else {})

    def name_of(self, x: torch.Tensor) -> str:
        """What sums a tensor of x's size: "gloo", "nccl", or the name of one over symmetric memory."""
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
    """All-reduces over buffers that every rank's GPU can reach in every other's. Made by all ranks together
    (`make_symmetric`), with the same arguments.

    max_bytes: of a tensor for one_shot and two_shot. pushes: whether low_latency and push are wanted.
    Raises UserError where the machine does not offer it; ask `why_unavailable` first whether this torch does.
    """

    OPERATORS = ("one_shot_all_reduce", "two_shot_all_reduce_")
    SUMMED = (torch.float32, torch.bfloat16)  # by torch's operators; ours sum float16 too

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype, max_bytes: int, *, pushes: bool
    ) -> None:
        import torch.distributed._symmetric_memory as symm_mem

        self.group_name, self.size = group.group_name, dist.get_world_size(group)
        self.buffer = symm_mem.empty(max_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._handles = [self._rendezvous(self.buffer)]  # peers' memory stays mapped for as long as they live
        self.pusher = None
        if pushes:
            # Zero on every rank before any rank gets past the rendezvous, so before any can write into it.
            received = symm_mem.empty(buffer_bytes(self.size) // 8, dtype=torch.int64, device=device).zero_()
            torch.cuda.synchronize(device)
            handle = self._rendezvous(received)
            self._handles.append(handle)
            buffers = [handle.get_buffer(rank, received.shape, received.dtype) for rank in range(self.size)]
            self.pusher = PushAllReduce(dist.get_rank(group), buffers)

    def _rendezvous(self, buffer: torch.Tensor) -> Any:
        import torch.distributed._symmetric_memory as symm_mem

        try:
            return symm_mem.rendezvous(buffer, self.group_name)
        except RuntimeError as error:  # no peer access between the GPUs, no fabric handles in a container, ...
            first_line = (str(error).splitlines() or ["no reason given"])[0]
            raise UserError(f"the GPUs do not share memory ({first_line})") from None

    def algorithms(self, num_bytes: int) -> dict[str, AllReduce]:
        """Name -> all_reduce(x, residual=None), of those that take a tensor of that many bytes."""
        found: dict[str, AllReduce] = {}
        # torch's operators share a tensor in 16-byte pieces.
        fits = num_bytes <= self.buffer.nbytes and num_bytes % (16 * self.size) == 0
        if fits and self.buffer.dtype in self.SUMMED:
            found |= {"one_shot": self.one_shot, "two_shot": self.two_shot}
        if self.pusher is not None:
            found |= {
                name: getattr(self.pusher, name) for name in self.pusher.NAMES if self.pusher.fits(name, num_bytes)
            }
        return found

    def one_shot(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of x over the ranks, as a new tensor. The kernel waits for all ranks before and after it reads."""
        total = torch.ops.symm_mem.one_shot_all_reduce(self._put(x), "sum", self.group_name).view_as(x)
        return _plus(total, residual)

    def two_shot(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of x over the ranks, written over x."""
        shared = self._put(x)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self.group_name)
        return _plus(x.copy_(shared.view_as(x)), residual)

    def _put(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.buffer[: x.numel()]
        shared.copy_(x.reshape(-1))
        return shared


def _plus(total: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return total if residual is None else total.add_(residual)


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


def make_symmetric(
    world: Any, dtype: torch.dtype, max_bytes: int
) -> tuple[SymmetricMemory | None, str | None, str | None]:
    """(symmetric memory, or None where a rank cannot have it; why not; why low_latency and push are left out).

    All ranks call it together and get the same: setting it up takes all of them, so none may have stayed away.
    """
    mine = [why_unavailable(world.device), push_all_reduce.why_unavailable(world.device, dtype)]
    problem, no_push = (next((text for text in texts if text), None) for texts in zip(*world.exchange(mine)))
    symmetric = None
    if problem is None:
        try:
            symmetric = SymmetricMemory(world.group, world.device, dtype, max_bytes, pushes=no_push is None)
            world.leave_at_once = True  # tearing down after it was used in a captured graph can hang
        except UserError as error:
            problem = str(error)
        problem = next((text for text in world.exchange(problem) if text), None)
        if problem is None and symmetric.pusher is not None:  # a smaller device than ours holds fewer programs
            limits = world.exchange(symmetric.pusher.max_bytes)
            symmetric.pusher.max_bytes = {name: min(each[name] for each in limits) for name in limits[0]}
    return (symmetric if problem is None else None), problem, no_push


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
    symmetric, problem, no_push = make_symmetric(world, dtype, MAX_SYMMETRIC_BYTES)
    if problem is not None:
        if choice == "symm":
            raise UserError(f"--allreduce symm: {problem}; use --allreduce nccl")
        print(f"all-reduce: NCCL alone; symmetric memory: {problem}")
    elif no_push is not None:
        print(f"all-reduce: low_latency and push left out: {no_push}")
    return TensorParallel(world.group, world.device, dtype, symmetric)

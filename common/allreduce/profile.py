"""The all-reduces that profile_allreduce.py compares: what there is here, whether each sums right, how it is timed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from common.allreduce.timing import AllReduce, time_eager, time_in_graph
from common.errors import CheckFailed, UserError
from common.memory import free_bytes, human_bytes
from common.tensor_parallel.collectives import make_symmetric
from common.tensor_parallel.push_all_reduce import WORD
from common.timing import Timing

if TYPE_CHECKING:
    from common.distributed import World

MAX_GRAPH_BYTES = 1 << 28  # beyond, a launch is nothing beside the transfer: a graph would show the same again
MAX_SYMMETRIC_BYTES = 1 << 28
TENSORS = 6  # of a point's size that are held at one time, the graph's four among them


@dataclass(frozen=True)
class Variant:
    """One way to sum. time(bytes, repeats): measured by all ranks together."""

    backend: str
    algorithm: str
    all_reduce: AllReduce
    time: Callable[[int, int], Timing]
    max_bytes: int
    granularity: int

    def takes(self, num_bytes: int) -> bool:
        return num_bytes <= self.max_bytes and num_bytes % self.granularity == 0


def default_dtype(device: torch.device) -> torch.dtype:
    """What a model would run in on the device: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def points_that_fit(
    points: Sequence[tuple[int | None, int]], world: World, dtype: torch.dtype
) -> list[tuple[int | None, int]]:
    """The points of whole elements whose tensors fit in every rank's free memory; what is left out is said."""
    free = free_bytes(world.device) // (1 if world.device.type == "cuda" else world.size)
    limit = min(world.exchange(int(0.8 * free) // TENSORS))
    kept = [(batch, size) for batch, size in points if size <= limit and size % dtype.itemsize == 0]
    if len(kept) < len(points):
        print(f"{len(points) - len(kept)} sizes left out: above {human_bytes(limit)}, or no whole number of elements")
    if not kept:
        raise UserError(f"--bytes: no size fits; give multiples of {dtype.itemsize} up to {limit}")
    return kept


def make_variants(world: World, dtype: torch.dtype, largest: int) -> tuple[list[Variant], list[str]]:
    """What can be compared here, and a line for each thing that cannot. All ranks call it together."""
    device, group = world.device, world.group

    def library(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=group)
        return x

    def eager(all_reduce: AllReduce, num_bytes: int, repeats: int) -> Timing:
        return time_eager(world, all_reduce, _zeros(num_bytes, dtype, device), repeats=repeats)

    def graph(all_reduce: AllReduce, num_bytes: int, repeats: int) -> Timing:
        return time_in_graph(world, all_reduce, _zeros(num_bytes, dtype, device), repeats=repeats)

    backend = dist.get_backend(group)
    variants = [Variant(backend, "eager", library, partial(eager, library), 1 << 62, dtype.itemsize)]
    if device.type != "cuda":
        return variants, ["NCCL and symmetric memory left out: they need GPUs; these are processes on the CPU"]
    variants.append(Variant(backend, "graph", library, partial(graph, library), MAX_GRAPH_BYTES, dtype.itemsize))
    symmetric, problem, no_push = make_symmetric(world, dtype, min(largest, MAX_SYMMETRIC_BYTES))
    if symmetric is None:
        return variants, [f"symmetric memory left out: {problem}"]
    left_out = []
    if dtype in symmetric.SUMMED:
        size, granularity = symmetric.buffer.nbytes, 16 * world.size
        for name, all_reduce in (("one_shot", symmetric.one_shot), ("two_shot", symmetric.two_shot)):
            variants.append(Variant("symm", name, all_reduce, partial(graph, all_reduce), size, granularity))
    else:
        left_out.append(f"one_shot and two_shot left out: torch's do not sum {str(dtype).removeprefix('torch.')}")
    pusher = symmetric.pusher
    if pusher is None:
        return variants, [*left_out, f"low_latency and push left out: {no_push}"]
    for name, all_reduce in (("low_latency", pusher.low_latency), ("push", pusher.push)):
        variants.append(Variant("triton", name, all_reduce, partial(graph, all_reduce), pusher.max_bytes[name], WORD))
    return variants, left_out


def _zeros(num_bytes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)


def check_sum(world: World, variant: Variant, num_bytes: int, dtype: torch.dtype) -> None:
    """The sum of small whole numbers, which every dtype holds exactly, each rank's another. Raises CheckFailed."""
    count = num_bytes // dtype.itemsize
    index = torch.arange(count, device=world.device)
    mine = ((index + 7 * world.rank) % 5 + world.rank % 3).to(dtype)
    expected = sum((index + 7 * rank) % 5 + rank % 3 for rank in range(world.size))
    got = variant.all_reduce(mine)
    wrong = int((got.to(torch.int64) != expected).sum())
    counts = world.exchange(wrong)
    if any(counts):
        raise CheckFailed(
            f"{variant.backend} {variant.algorithm} of {num_bytes} bytes: wrong sums, elements by rank: {counts}"
        )


# --- provenance ------------------------------------------------------------------------------------------------------
def facts(world: World, dtype: torch.dtype, skipped: Sequence[str]) -> dict[str, Any]:
    """What is recorded beside the rows: the machine's own speeds, and the link's where it is known."""
    from common import roofline

    record: dict[str, Any] = {"device": str(world.device), "dtype_used": str(dtype), "left_out": list(skipped)}
    if world.device.type == "cuda":
        record["link_gb_per_s"] = nvlink_gb_per_s()
        return record
    record["ceilings"] = roofline.ceilings(world.device, "float32")
    return record


def nvlink_gb_per_s() -> float | None:
    """All NVLinks of the first GPU together, in one direction, as the driver tells; None where there are none."""
    command = ["nvidia-smi", "nvlink", "--status", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_nvlink_status(done.stdout)


def parse_nvlink_status(text: str) -> float | None:
    """The sum of the lines "Link 0: 26.562 GB/s"; a link that is down has no speed."""
    speeds = [float(value) for value in re.findall(r"^\s*Link \d+: ([\d.]+) GB/s", text, re.MULTILINE)]
    return sum(speeds) or None

"""How long something takes: CUDA events on a GPU, `perf_counter` on a CPU; median with p10 and p90 over repeats.

- `measure`: one thing, warmed up.
- `interleaved`: alternatives side by side in one process, in turn, so that a clock that drifts hits them all alike.
- `graph_kernel_time`: a kernel's own time, from a CUDA graph of many calls, without the time of launching it.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError

MIN_GRAPH_CALLS = 20
MIN_SAMPLES = 3  # of a time limit's: fewer say nothing about the spread


@dataclass(frozen=True)
class Timing:
    """Seconds. The percentiles interpolate linearly between samples (as numpy's default does)."""

    median_s: float
    p10_s: float
    p90_s: float
    samples: tuple[float, ...]


def summarise(samples: Sequence[float]) -> Timing:
    """The statistics of measured seconds; at least one sample."""
    if not samples:
        raise ValueError("no samples to summarise")
    return Timing(statistics.median(samples), percentile(samples, 10), percentile(samples, 90), tuple(samples))


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the samples lie, interpolated linearly."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    value = ordered[low] + (ordered[high] - ordered[low]) * (position - low)
    return min(value, ordered[high])  # rounding must not lift it above the larger neighbour


def synchronize(device: Any) -> None:
    """Wait until the device has done all that was asked of it; nothing to wait for on a CPU."""
    if _is_cuda(device):
        import torch

        torch.cuda.synchronize(device)


def measure(fn: Callable[[], object], *, device: Any, warmup: int = 1, repeats: int = 5) -> Timing:
    """Time `fn()` `repeats` times after `warmup` untimed calls. device: "cpu", "cuda", "cuda:1" or a torch.device."""
    return interleaved({"": fn}, device=device, warmup=warmup, repeats=repeats)[""]


def interleaved(
    fns: Mapping[str, Callable[[], object]],
    *,
    device: Any,
    warmup: int = 1,
    repeats: int = 5,
    limit_s: float | None = None,
) -> dict[str, Timing]:
    """Time the alternatives in turn: one sample of each, then the next of each, each round beginning one further on.

    limit_s: no further round begins after this long, once there are MIN_SAMPLES of each; so that what is slow is timed
    less often and does not take the whole sweep's time.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats {repeats} must be at least 1 and warmup {warmup} at least 0")
    names = list(fns)
    begin = time.perf_counter()
    for name in names:
        for _ in range(warmup):
            fns[name]()
    synchronize(device)
    once = _event_seconds if _is_cuda(device) else _clock_seconds
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        if limit_s is not None and turn >= MIN_SAMPLES and time.perf_counter() - begin > limit_s:
            break
        shift = turn % len(names) if names else 0
        for name in names[shift:] + names[:shift]:  # who comes first after whom must not favour anyone
            samples[name].append(once(fns[name], device))
    return {name: summarise(values) for name, values in samples.items()}


def graph_kernel_time(
    calls: Sequence[Callable[[], object]], *, repeats: int = 20, agree: Callable[[int], int] = int
) -> Timing:
    """Seconds PER CALL of kernels replayed from one CUDA graph, on the current device.

    calls: closures over distinct inputs and outputs, together at least 4x the L2 cache, so that no call finds its
    data there. They are captured in turn, round and round until the graph holds at least 20, and must neither wait for
    the device nor allocate outside torch. A sample is several replays in a row, for some milliseconds: the time that
    the host takes to submit the first one must not count. UserError without CUDA.

    agree: several ranks whose calls wait for one another must replay equally often. Each has a number of its own; this
    returns the one that all take.
    """
    import torch

    if repeats < 1:
        raise ValueError("graph_kernel_time needs at least one repeat")
    replay, count = graph_sample(calls, agree=agree)
    device = torch.device("cuda", torch.cuda.current_device())
    return summarise([_event_seconds(replay, device) / count for _ in range(repeats)])


def graph_sample(
    calls: Sequence[Callable[[], object]], *, least_s: float = 4e-3, agree: Callable[[int], int] = int
) -> tuple[Callable[[], None], int]:
    """(replay, number of calls): `replay()` submits a captured graph of `calls` as often as fills `least_s`.

    agree: see `graph_kernel_time`.
    """
    import torch

    graph, count = capture(calls)
    for _ in range(3):
        graph.replay()
    device = torch.device("cuda", torch.cuda.current_device())
    times = agree(max(1, min(100, round(least_s / max(_event_seconds(graph.replay, device), 1e-6)))))

    def replay() -> None:
        for _ in range(times):
            graph.replay()

    return replay, times * count


def capture(calls: Sequence[Callable[[], object]]) -> tuple[Any, int]:
    """(CUDA graph, number of calls in it): `calls` in turn, round and round until there are at least 20.

    Each has run once on the capturing stream before: nothing is compiled inside, and what libraries set up for a stream
    that they see for the first time is there. UserError without CUDA.
    """
    import torch

    if not calls:
        raise ValueError("a graph needs at least one call")
    if not torch.cuda.is_available():
        raise UserError("kernel times in a CUDA graph need a CUDA device; none is visible")
    rounds = -(-MIN_GRAPH_CALLS // len(calls))
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for call in calls:
            call()
    main.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            for _ in range(rounds):
                for call in calls:
                    call()
    finally:
        torch.cuda.set_stream(main)  # a capture that fails leaves torch on the capturing stream
    return graph, rounds * len(calls)


def _event_seconds(fn: Callable[[], object], device: Any) -> float:
    import torch

    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        fn()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def _clock_seconds(fn: Callable[[], object], device: Any) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")

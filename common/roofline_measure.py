"""How `common.roofline` measures: memory passes and matrix products, on a CPU and on a CUDA device.

Rates are bytes or operations over the BEST time of several tries: a ceiling is what the machine can do, and whatever
disturbs a try can only make it slower.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from common import machine, timing
from common.memory import free_bytes

Shape = tuple[int, int, int]  # m, n, k of [m, k] x [k, n]
CPU_SIZES = tuple(2**e for e in range(9, 12))
GPU_SIZES = tuple(2**e for e in range(10, 15))
GPU_QUICK_SIZES = (2**12, 2**13)
PROMPT_ROWS = 8192  # rows of the Llama-3-8B products: a long prompt, where products are at their best
LLAMA3_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # name: (n, k)
MAX_CALL_S = 0.5  # a product that would take longer is left out: some CPUs have no fast float16
GPU_BUFFER_BYTES = 2 << 30
MIN_CPU_BUFFER_BYTES = 128 << 20


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: a GPU's L2."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return machine.last_level_cache_bytes()


def release(device: torch.device) -> None:
    """Give the buffers back to the device: a script sizes its KV pool by the memory that is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- memory ----------------------------------------------------------------------------------------------------------
def memory(device: torch.device, *, quick: bool) -> list[tuple[str, str, float]]:
    """(kind, what moved the bytes, GB/s). kind is "copy" (bytes read + written) or "read"."""
    return _gpu_memory(device, quick=quick) if device.type == "cuda" else _cpu_memory(quick=quick)


def _cpu_memory(*, quick: bool) -> list[tuple[str, str, float]]:
    """With all of torch's threads. Which operation reaches the real bandwidth depends on how torch vectorises it, so
    several are tried. A cache line that is written is fetched first on most CPUs; that fetch is not counted, so `copy`
    may lie below `read`.
    """
    size = max(MIN_CPU_BUFFER_BYTES, 4 * machine.last_level_cache_bytes())
    size = min(size, free_bytes(torch.device("cpu")) // 8)
    words = size // 4 // 4096 * 4096
    x, y = torch.ones(words), torch.ones(words)
    matrix, vector, half = x.view(-1, 4096), torch.ones(4096), words // 2
    tries: dict[tuple[str, str], tuple[int, Callable[[], Any]]] = {
        ("copy", "copy_"): (8 * words, lambda: y.copy_(x)),
        ("copy", "mul"): (8 * words, lambda: torch.mul(x, 1.0, out=y)),
        ("read", "sum"): (4 * words, lambda: x.sum()),
        ("read", "dot"): (8 * half, lambda: torch.dot(x[:half], x[half : 2 * half])),
        ("read", "mv"): (4 * words, lambda: torch.mv(matrix, vector)),
        ("read", "amax"): (4 * words, lambda: x.amax()),
    }
    budget = 0.1 if quick else 0.3
    return [(kind, name, moved / _best_cpu_seconds(fn, budget) / 1e9) for (kind, name), (moved, fn) in tries.items()]


def _gpu_memory(device: torch.device, *, quick: bool) -> list[tuple[str, str, float]]:
    """Our own kernels in a CUDA graph, each in several configurations. The buffer is far above 4x L2: a cache that
    keeps part of a buffer from one pass to the next would flatter it.
    """
    from common.kernels import streaming

    with torch.cuda.device(device):
        size = max(4 * cache_bytes(device), min(GPU_BUFFER_BYTES, free_bytes(device) // 4))
        words = size // 4 // (2 * streaming.ALIGN_WORDS) * (2 * streaming.ALIGN_WORDS)
        buffer = torch.ones(words, dtype=torch.int32, device=device)
        src, dst = buffer[: words // 2], buffer[words // 2 :]
        partial = torch.empty(words // 16384 + 1, dtype=torch.int32, device=device)
        repeats = 5 if quick else 20
        measured = []
        for config in streaming.COPY_CONFIGS:
            seconds = _graph_seconds(lambda c=config: streaming.copy(src, dst, c), repeats)
            measured.append(("copy", "triton " + "x".join(map(str, config)), 4 * words / seconds / 1e9))
        for config in streaming.READ_CONFIGS:
            seconds = _graph_seconds(lambda c=config: streaming.read(buffer, partial, c), repeats)
            measured.append(("read", "triton " + "x".join(map(str, config)), 4 * words / seconds / 1e9))
    return measured


def _graph_seconds(call: Callable[[], object], repeats: int) -> float:
    return min(timing.graph_kernel_time([call], repeats=repeats).samples)


def _best_cpu_seconds(fn: Callable[[], object], budget_s: float) -> float:
    """The best of at least two calls, for about `budget_s`."""
    fn()
    best, spent, calls = math.inf, 0.0, 0
    while calls < 2 or (spent < budget_s and calls < 1000):
        start = time.perf_counter()
        fn()
        seconds = time.perf_counter() - start
        best, spent, calls = min(best, seconds), spent + seconds, calls + 1
    return best


# --- products --------------------------------------------------------------------------------------------------------
def products(device: torch.device, dtype: str, *, quick: bool) -> Iterator[tuple[str, Shape, float]]:
    """(name, shape, TFLOP/s in a short run) by size, as they are measured. There is always at least one."""
    if device.type == "cpu":
        yield from _cpu_products(dtype, quick)
        return
    shapes = {f"square {size}": (size, size, size) for size in (GPU_QUICK_SIZES if quick else GPU_SIZES)}
    for name, (n, k) in LLAMA3_8B.items():
        if not quick or name in ("gate_up", "down"):
            shapes[f"llama3-8b {name}"] = (PROMPT_ROWS, n, k)
    free = free_bytes(device)
    for index, (name, shape) in enumerate(shapes.items()):
        m, n, k = shape
        if index and 4 * (m * k + n * k + m * n) > free // 2:
            continue
        multiply = _product(device, dtype, shape, transposed=True)
        with torch.cuda.device(device):
            yield name, shape, 2 * m * n * k / _burst_seconds(multiply, device) / 1e12


def _cpu_products(dtype: str, quick: bool) -> Iterator[tuple[str, Shape, float]]:
    """Both layouts of the second factor: which is faster differs between dtypes and libraries."""
    for layout, transposed in (("linear", True), ("square", False)):
        expected = 0.0
        for size in CPU_SIZES:
            if expected > MAX_CALL_S:
                break
            shape = (size, size, size)
            seconds = _best_cpu_seconds(_product(torch.device("cpu"), dtype, shape, transposed), 0.1 if quick else 0.2)
            expected = 8 * seconds  # of the next size
            yield f"{layout} {size}", shape, 2 * size**3 / seconds / 1e12


def sustained_product(device: torch.device, dtype: str, name: str, shape: Shape, *, quick: bool) -> float:
    """TFLOP/s of one product run without a pause for seconds; the first half only heats up and is not counted."""
    multiply = _product(device, dtype, shape, transposed=not name.startswith("square") or device.type == "cuda")
    m, n, k = shape
    seconds = (0.4 if quick else 1.0) if device.type == "cpu" else (2.0 if quick else 4.0)
    _run_for(multiply, device, seconds / 2)
    calls, taken = _run_for(multiply, device, seconds / 2)
    return 2 * m * n * k * calls / taken / 1e12


def _run_for(fn: Callable[[], object], device: torch.device, seconds: float) -> tuple[int, float]:
    """Call `fn` for about `seconds`, the GPU's queue never empty. Returns (calls, seconds they took)."""
    batch = 1
    timing.synchronize(device)
    start, calls = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds:
        for _ in range(batch):
            fn()
        calls += batch
        timing.synchronize(device)
        # A wait for the GPU costs some µs: make it rare beside the work, but look at the clock a few times a second.
        if device.type == "cuda" and batch < 4096 and (time.perf_counter() - start - taken) < 0.1:
            batch *= 2
    return calls, taken


def _burst_seconds(fn: Callable[[], object], device: torch.device) -> float:
    """Seconds a call in the best of several runs of about 5 ms: too short for the power limit to lower the clock."""
    once = timing.measure(fn, device=device, warmup=2, repeats=3).median_s
    count = max(1, min(200, round(5e-3 / once)))

    def run() -> None:
        for _ in range(count):
            fn()

    return min(timing.measure(run, device=device, warmup=1, repeats=5).samples) / count


def _product(device: torch.device, dtype: str, shape: Shape, transposed: bool) -> Callable[[], torch.Tensor]:
    """A matrix product of normally distributed numbers (zeros would draw less power) into a buffer made once.

    transposed: the second factor is stored [n, k], as the weights of a linear layer are.
    """
    m, n, k = shape
    torch_dtype = getattr(torch, dtype)
    random = torch.Generator(device).manual_seed(0)  # of its own: a script's random numbers must not depend on this
    a = torch.randn(m, k, device=device, generator=random).to(torch_dtype)
    b = torch.randn(*((n, k) if transposed else (k, n)), device=device, generator=random).to(torch_dtype)
    out = torch.empty(m, n, device=device, dtype=torch_dtype)
    right = b.T if transposed else b
    return lambda: torch.mm(a, right, out=out)

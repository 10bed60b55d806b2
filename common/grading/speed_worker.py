"""Times a built file on the GPU beside a copy of the same bytes and the installed peers: WORKER LAB FILE COPY_LIBRARY.

Prints one JSON object. Calls rotate over sets of buffers of at least four times the L2 cache; alternatives are timed in
turn; outputs hold NaN before the timed calls and are checked after them.
"""

import ctypes
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, CALLS = 15, 20
EPSILON = 1e-6
# lab -> (mangled symbol, sizes of the timed call)
TIMED = {
    "rms_norm/matrix": ("_Z15rms_norm_matrixPfS_S_iif", (8192, 8192)),
    "rms_norm/vector": ("_Z15rms_norm_vectorPfS_S_if", (1 << 20,)),
    "silu/CUDA": ("_Z4siluPfS_i", (8192 * 8192,)),
    "silu": ("", (8192 * 8192,)),
    "host_GPU": ("_Z17copy_first_columnPfS_ii", (8192, 65536)),
}


def pointer(tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class Sets:
    """Buffers used in turn: x and y of `count` floats, w of `weights`."""

    def __init__(self, torch, count: int, weights: int):
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)
        number = max(2, min(64, 4 * l2 // (4 * (2 * count + weights)) + 1))
        self.x = [torch.randn(count, device="cuda") for _ in range(number)]
        self.w = [1 + 0.5 * torch.randn(max(weights, 1), device="cuda") for _ in range(number)]
        self.y = [torch.full((count,), float("nan"), device="cuda") for _ in range(number)]
        self.turn = 0

    def next(self):
        self.turn = (self.turn + 1) % len(self.x)
        return self.x[self.turn], self.w[self.turn], self.y[self.turn]


def learner_call(torch, lab: str, artefact: Path, sets: Sets):
    symbol, sizes = TIMED[lab]
    if lab == "silu":
        from common.grading.triton_worker import load_function

        function = load_function(artefact, "silu_triton")

        def run_triton():
            x, _, y = sets.next()
            sets.y[sets.turn] = function(x)

        return run_triton
    function = getattr(ctypes.CDLL(str(artefact)), symbol)
    function.restype = None
    integers = [ctypes.c_int(v) for v in sizes]

    def run():
        x, w, y = sets.next()
        if lab == "silu/CUDA":
            function(pointer(x), pointer(y), *integers)
        else:
            function(pointer(x), pointer(w), pointer(y), *integers, ctypes.c_float(EPSILON))

    return run


def copy_call(torch, library: str, floats: int, sets: Sets):
    """`floats` floats read and as many written."""
    if library == "-":
        return lambda: sets.y[sets.turn].copy_(sets.next()[0])
    copy = ctypes.CDLL(library).copy_floats
    copy.restype = None
    sources = [torch.empty(floats, device="cuda") for _ in range(len(sets.x))]
    targets = [torch.empty(floats, device="cuda") for _ in range(len(sets.x))]
    state = [0]

    def run():
        state[0] = (state[0] + 1) % len(sources)
        copy(pointer(sources[state[0]]), pointer(targets[state[0]]), ctypes.c_size_t(floats))

    return run


def peer_calls(torch, lab: str, sets: Sets) -> dict:
    """torch, torch.compile, FlashInfer and Liger, where they are installed and fit."""
    calls = {}
    shape = TIMED[lab][1] if lab == "rms_norm/matrix" else (1, -1)
    if lab.startswith("silu"):
        functional = torch.nn.functional.silu
        calls["torch"] = lambda: functional(sets.next()[0])
        compiled = torch.compile(functional)
        calls["torch.compile"] = lambda: compiled(sets.next()[0])
        return calls

    def norm(x, w):
        return torch.nn.functional.rms_norm(x.view(shape), (w.numel(),), w, EPSILON)

    compiled = torch.compile(norm)
    calls["torch"] = lambda: norm(*sets.next()[:2])
    calls["torch.compile"] = lambda: compiled(*sets.next()[:2])
    if lab == "rms_norm/matrix" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        calls["Liger"] = lambda: liger(*sets.next()[:2])

        def liger(x, w):
            return LigerRMSNormFunction.apply(x.view(shape), w, EPSILON, 0.0, "llama", False)

    return calls


def time_in_turn(torch, calls: dict) -> dict[str, float]:
    """Seconds a call, by name: the median over rounds in which every alternative has its turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in list(calls.items()):
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
        except Exception as error:  # a peer that does not run here is left out by name
            if name in ("own", "copy"):
                raise
            print(f"{name} left out: {error}".splitlines()[0], file=sys.stderr)
            del calls[name]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start.record()
            for _ in range(CALLS):
                call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e-3 / CALLS)
    return {name: statistics.median(values) for name, values in times.items() if values}


def check(torch, lab: str, sets: Sets) -> None:
    """The last output of the timed calls, against float64."""
    x, w, y = (t.double() for t in (sets.x[sets.turn], sets.w[sets.turn], sets.y[sets.turn]))
    if lab.startswith("silu"):
        expected = x * torch.sigmoid(x)
    else:
        x = x.view(TIMED[lab][1] if lab == "rms_norm/matrix" else (1, -1))
        expected = (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON) * w).view(-1)
    if not torch.allclose(y.view(-1), expected.view(-1), rtol=1e-4, atol=1e-5):
        raise SystemExit("the outputs of the timed calls are wrong")


def time_first_column(torch, artefact: Path) -> dict:
    """Wall time of the call with a synchronisation, median of 100, the host's caches flushed before each."""
    symbol, (rows, cols) = TIMED["host_GPU"]
    function = getattr(ctypes.CDLL(str(artefact)), symbol)
    function.restype = None
    matrix = torch.empty(rows, cols)
    matrix[:, 0] = torch.arange(rows)
    mapped = 2
    if int(torch.cuda.cudart().cudaHostRegister(matrix.data_ptr(), matrix.numel() * 4, mapped)):
        raise SystemExit("cudaHostRegister failed")
    column, large = torch.full((rows,), float("nan"), device="cuda"), torch.zeros(512 << 20, dtype=torch.uint8)
    times = []
    for i in range(100):
        large.fill_(i)
        column.fill_(float("nan"))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function(pointer(matrix), pointer(column), ctypes.c_int(rows), ctypes.c_int(cols))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    if not torch.equal(column.cpu(), matrix[:, 0]):
        raise SystemExit("the outputs of the timed calls are wrong")
    return {"own": statistics.median(times), "bytes": 4 * rows}


def main(lab: str, artefact: Path, copy_library: str) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    torch.cuda.init()
    device = torch.cuda.get_device_name(0)
    if lab == "host_GPU":
        print(json.dumps(time_first_column(torch, artefact) | {"device": device, "copy": None, "peers": {}}))
        return
    sizes = TIMED[lab][1]
    count, weights = 1, 0
    for size in sizes:
        count *= size
    if lab.startswith("rms_norm"):
        weights = sizes[-1]
    sets = Sets(torch, count, weights)
    moved = 4 * (2 * count + weights)
    calls = {"own": learner_call(torch, lab, artefact, sets), "copy": copy_call(torch, copy_library, moved // 8, sets)}
    own = calls["own"]
    times = time_in_turn(torch, calls | peer_calls(torch, lab, sets))
    own()
    torch.cuda.synchronize()
    check(torch, lab, sets)
    peers = {name: t for name, t in times.items() if name not in ("own", "copy")}
    print(json.dumps({"own": times["own"], "copy": times["copy"], "peers": peers, "bytes": moved, "device": device}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3])

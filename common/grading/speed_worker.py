"""Times built files on the GPU beside a copy of the same bytes and the installed peers: WORKER JOB.json RESULT.json.

The job: {"lab", "files": {name: path}, "library": path of timing.so (the copies), "peers": whether to time them,
"graph": whether to try graphs}. The result: {"device", "bytes", "rows": {name: {...}}, "left_out": {peer: why},
"wrong": {name: how}}.

A figure is the time of one call in a CUDA graph of at least 20 calls over distinct buffers, four times the L2 cache in
all, every alternative in turn; the time of a single launch stands beside it. A file whose calls cannot be captured (it
waits for the device) is timed call after call between two events, and its `form` says so. Against self-deception: new
inputs before each round, outputs that hold NaN before the last, all of them compared with float64 after it, inputs
compared with what they were; a call that is right on its own and wrong here is reported under `wrong`.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in place of this folder, whose run.py and build.py are no one else's

COPIES = ("one vector a thread", "four in flight and streamed")  # in the order of tlab_copy's `streamed`
ROUNDS, GRAPH_CALLS, SINGLES, FIRST_COLUMN_CALLS = 15, 20, 20, 100
MOST_BYTES = 6 << 30  # of all buffers of one alternative
SUSPECT_ABOVE = 1.05
EPSILON = 1e-6
DEVICE = "cuda"
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


class Buffers:
    """Sets of buffers used in turn: x and y of `count` floats, w of `weights`; at least 4x the L2 cache in all."""

    def __init__(self, torch, lab: str):
        sizes = TIMED[lab][1]
        self.shape = sizes if len(sizes) == 2 else (1, *sizes)
        self.count = self.shape[0] * self.shape[1]
        weights = self.shape[1] if lab.startswith("rms_norm") else 0
        self.bytes = 4 * (2 * self.count + weights)  # what a call must move
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        free, _ = torch.cuda.mem_get_info()
        # x, y, the copy's two buffers and a peer's output: about three times the bytes of a call for each set.
        affordable = max(2, min(MOST_BYTES, free // 12) // self.bytes)
        self.number = min(affordable, max(GRAPH_CALLS, -(-4 * cache // self.bytes)))
        self.x = [torch.empty(self.count, device=DEVICE) for _ in range(self.number)]
        self.w = [1 + 0.5 * torch.randn(max(weights, 1), device=DEVICE) for _ in range(self.number)]
        self.y = [torch.empty(self.count, device=DEVICE) for _ in range(self.number)]
        self.renew()

    def renew(self) -> None:
        """New inputs, so that a result kept from an earlier call is wrong."""
        for x in self.x:
            x.normal_(0.25, 3.0)

    def spoil_outputs(self) -> None:
        for y in self.y:
            y.fill_(float("nan"))


class Native:
    """A built file's calls on the i-th buffers; `replay` submits a graph of them, or the calls themselves."""

    def __init__(self, library: ctypes.CDLL, call: Callable[[int], None], number: int):
        self.library, self.call, self.number, self.form = library, call, number, "events"
        self.calls = -(-GRAPH_CALLS // number) * number
        self.library.tlab_error.restype = ctypes.c_char_p
        self.executable = ctypes.c_void_p()
        for i in range(number):
            call(i)
        self.check(library.tlab_synchronize())

    def check(self, error: int) -> None:
        if error:
            raise RuntimeError(self.library.tlab_error(error).decode())

    def capture(self) -> None:
        """The form becomes `graph`, or stays `events` where the calls cannot be captured."""
        self.check(self.library.tlab_graph_begin())
        for i in range(self.calls):
            self.call(i % self.number)
        if self.library.tlab_graph_end(ctypes.byref(self.executable)) == 0:
            self.form = "graph"
        self.library.tlab_synchronize()

    def replay(self) -> None:
        if self.form == "graph":
            self.check(self.library.tlab_graph_launch(self.executable))
        else:
            for i in range(self.calls):
                self.call(i % self.number)


def native_call(lab: str, path: Path, buffers: Buffers) -> Native:
    symbol, sizes = TIMED[lab]
    library = ctypes.CDLL(str(path))
    function = getattr(library, symbol)
    function.restype = None
    rest = [ctypes.c_int(v) for v in sizes]
    if lab != "silu/CUDA":
        rest.append(ctypes.c_float(EPSILON))
        arguments = [[pointer(x), pointer(w), pointer(y), *rest] for x, w, y in zip(buffers.x, buffers.w, buffers.y)]
    else:
        arguments = [[pointer(x), pointer(y), *rest] for x, y in zip(buffers.x, buffers.y)]
    return Native(library, lambda i: function(*arguments[i]), buffers.number)


def copy_calls(torch, path: Path, buffers: Buffers) -> dict[str, Native]:
    """The copies that move the same bytes, half of them read and half written; the faster one is the ceiling."""
    library = ctypes.CDLL(str(path))
    floats = buffers.bytes // 8 // 4 * 4
    pairs = [[torch.zeros(floats, device=DEVICE) for _ in range(2)] for _ in range(buffers.number)]
    arguments = [[pointer(a), pointer(b), ctypes.c_size_t(floats)] for a, b in pairs]
    calls = {}
    for streamed, name in enumerate(COPIES):
        calls[name] = Native(
            library, lambda i, streamed=streamed: library.tlab_copy(*arguments[i], streamed), buffers.number
        )
        calls[name].keep = pairs
    return calls


def with_one_copy(rows: dict[str, dict]) -> dict[str, dict]:
    """The rows with the faster of COPIES as "copy" alone; its note has the times of both."""
    fastest = min((rows[name] for name in COPIES), key=lambda row: row["time_us"])
    note = "the faster of two: " + ", ".join(f"{name} {rows[name]['time_us']:.2f} us" for name in COPIES)
    return {"copy": fastest | {"note": note}} | {name: row for name, row in rows.items() if name not in COPIES}


class InTorch:
    """A function of torch tensors (a Triton file, or a peer) on the i-th buffers, captured by torch."""

    def __init__(self, function: Callable, buffers: Buffers, graph: bool):
        from common.timing import graph_sample

        self.function, self.buffers, self.form = function, buffers, "events"
        # Results are kept, so that no call writes where the one before it did.
        self.outputs: list = [None] * buffers.number
        self.calls = -(-GRAPH_CALLS // buffers.number) * buffers.number
        self.call(0)  # what fails here fails without a graph too
        if graph:
            try:
                each = [lambda i=i: self.call(i) for i in range(buffers.number)]
                self.replay, self.calls = graph_sample(each, least_s=0)
                self.form = "graph"
            except RuntimeError as error:  # a call that waits for the device cannot be captured
                print(f"timed without a graph: {error}".splitlines()[0], file=sys.stderr)

    def call(self, i: int) -> None:
        self.outputs[i] = self.function(self.buffers.x[i], self.buffers.w[i])

    def replay(self) -> None:
        for i in range(self.calls):
            self.call(i % self.buffers.number)


def expected(torch, lab: str, buffers: Buffers, i: int):
    """float64, flat, of the i-th input."""
    x = buffers.x[i].double()
    if lab.startswith("silu"):
        return x * torch.sigmoid(x)
    x = x.view(buffers.shape)
    return (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON) * buffers.w[i].double()).view(-1)


def wrong_outputs(torch, lab: str, engine, buffers: Buffers) -> str | None:
    """Replays on outputs that hold NaN; what is wrong with outputs or inputs after it, or None."""
    buffers.renew()
    buffers.spoil_outputs()
    before = [x.view(torch.int32).sum(dtype=torch.int64).item() for x in buffers.x]
    engine.replay()
    torch.cuda.synchronize()
    outputs = engine.outputs if isinstance(engine, InTorch) else buffers.y
    for i in range(buffers.number):
        if buffers.x[i].view(torch.int32).sum(dtype=torch.int64).item() != before[i]:
            return "the timed calls change their inputs"
        want, got = expected(torch, lab, buffers, i), outputs[i].view(-1)
        bad = ~((got - want).abs() <= 1e-4 * want.abs() + 1e-5)
        if bad.any():
            at = int(bad.nonzero()[0])
            return (
                f"right on its own, wrong among the timed calls (other inputs, same buffers): element {at} is"
                f" {got[at].item():.7g}, expected {want[at].item():.7g}"
            )
    return None


def prepared(torch, lab: str, make: Callable, buffers: Buffers, graph: bool) -> tuple[object, str | None]:
    """(engine, what is wrong with it). Its graph is given up where its replay leaves outputs wrong: a file may launch
    into a stream of its own, which the capture does not see."""
    engine = make()
    if isinstance(engine, Native) and graph:
        engine.capture()
    problem = wrong_outputs(torch, lab, engine, buffers)
    if problem and isinstance(engine, Native) and engine.form == "graph":
        engine.form = "events"
        problem = wrong_outputs(torch, lab, engine, buffers)
    return engine, problem


def timed(torch, engines: dict, buffers: Buffers) -> dict[str, dict]:
    """Rows by name; every alternative has its turn in each round, after inputs that no call has seen."""
    from common import timing

    device = torch.device(DEVICE)
    # A sample lasts some milliseconds: the time in which the host submits the first call must not count.
    repeats = {}
    for name, engine in engines.items():
        once = timing.interleaved({name: engine.replay}, device=device, warmup=1, repeats=1)[name].median_s
        repeats[name] = max(1, min(100, round(4e-3 / max(once, 1e-6))))

    def sample(name: str) -> Callable[[], None]:
        def replays() -> None:
            for _ in range(repeats[name]):
                engines[name].replay()

        return replays

    samples: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for turn in range(ROUNDS):
        buffers.renew()
        shift = turn % len(names)
        order = {name: sample(name) for name in names[shift:] + names[:shift]}
        for name, one in timing.interleaved(order, device=device, warmup=0, repeats=1).items():
            samples[name].append(one.median_s / repeats[name] / engines[name].calls)
    single = timing.interleaved({n: lambda e=e: e.call(0) for n, e in engines.items()}, device=device, repeats=SINGLES)
    rows = {}
    for name, engine in engines.items():
        summary = timing.summarise(samples[name])
        rows[name] = {
            "time_us": summary.median_s * 1e6,
            "time_us_p10": summary.p10_s * 1e6,
            "time_us_p90": summary.p90_s * 1e6,
            "single_launch_us": single[name].median_s * 1e6,
            "form": engine.form,
        }
    return rows


def time_on_device(torch, job: dict) -> dict:
    from common.grading import speed_peers

    lab, graph, buffers = job["lab"], job["graph"], Buffers(torch, job["lab"])
    result: dict = {"bytes": buffers.bytes, "rows": {}, "left_out": {}, "wrong": {}}
    makers: dict[str, Callable] = {}
    for name, path in job["files"].items():
        if lab == "silu":
            from common.grading.triton_worker import load_function

            function = load_function(Path(path), "silu_triton")
            makers[name] = lambda f=function: InTorch(lambda x, w: f(x), buffers, graph)
        else:
            makers[name] = lambda p=path: native_call(lab, Path(p), buffers)
    engines: dict = dict(copy_calls(torch, Path(job["library"]), buffers))
    if graph:
        for name in COPIES:
            engines[name].capture()
    for name, make in makers.items():
        engine, problem = prepared(torch, lab, make, buffers, graph)
        if problem:
            result["wrong"][name] = problem
        else:
            engines[name] = engine
    if job["peers"]:
        functions, result["left_out"] = speed_peers.peers(torch, lab, buffers.shape, EPSILON)
        for name, function in functions.items():
            try:
                engine, problem = prepared(torch, lab, lambda f=function: InTorch(f, buffers, graph), buffers, graph)
            except Exception as error:  # a peer that does not run here is left out by name, whatever it raises
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
                torch.cuda.synchronize()
            if problem:
                result["left_out"][name] = problem
            else:
                engines[name] = engine
    result["rows"] = with_one_copy(timed(torch, engines, buffers))
    copy = result["rows"]["copy"]["time_us"]
    if any(result["rows"][n]["time_us"] * SUSPECT_ABOVE < copy for n in job["files"] if n in result["rows"]):
        result["rows"] = with_one_copy(timed(torch, engines, buffers))  # again, together with the ceiling
    return result


def time_first_column(job: dict) -> dict:
    """Wall time of the call with a synchronisation, the first column thrown out of the host's caches before each."""
    from common.timing import summarise

    symbol, (rows, cols) = TIMED["host_GPU"]
    result: dict = {"bytes": 4 * rows, "rows": {}, "left_out": {}, "wrong": {}}
    for name, path in job["files"].items():
        library = ctypes.CDLL(str(path))
        library.tlab_error.restype = ctypes.c_char_p
        times, wrong = (ctypes.c_double * FIRST_COLUMN_CALLS)(), ctypes.c_int()
        function = ctypes.cast(getattr(library, symbol), ctypes.c_void_p)
        error = library.tlab_time_first_column(function, rows, cols, FIRST_COLUMN_CALLS, times, ctypes.byref(wrong))
        if error:
            raise RuntimeError(f"{name}: {library.tlab_error(error).decode()}")
        if wrong.value:
            result["wrong"][name] = (
                f"{wrong.value} of {FIRST_COLUMN_CALLS + 2} timed calls (a new column before each) gave another column"
            )
            continue
        summary = summarise([t * 1e-6 for t in times])
        result["rows"][name] = {
            "time_us": summary.median_s * 1e6,
            "time_us_p10": summary.p10_s * 1e6,
            "time_us_p90": summary.p90_s * 1e6,
            "single_launch_us": summary.median_s * 1e6,
            "form": "wall",
        }
    return result


def main(job: dict) -> dict:
    import torch

    torch.cuda.init()
    with torch.inference_mode():
        result = time_first_column(job) if job["lab"] == "host_GPU" else time_on_device(torch, job)
    return result | {"device": torch.cuda.get_device_name(0)}


if __name__ == "__main__":
    # A file of its own for the result: what the learner's code prints must not matter.
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))

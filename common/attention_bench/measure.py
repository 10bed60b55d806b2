"""Measuring attention backends side by side: each point is checked against a reference, then timed, then gated.

For every case: make inputs, compute the reference once; then for each backend the first call (with its compilation and
plan), the comparison, and only then the timing, of all correct backends in turn. On CUDA the time of a call comes from
a CUDA graph of at least 20 calls over distinct inputs, together at least four times the L2 cache, and beside it from
single launches; a call of more than 10 ms is timed by launches alone, for launching no longer matters there.

A row always comes out: `status` is ok, unsupported, "out of memory", wrong or failed (an error in our own kernel), and
`note` says why.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import cli, results, roofline, timing
from common.attention_bench import backends as attention_backends
from common.attention_bench.backends.base import Backend, Call, Case, Prepared, Unsupported
from common.attention_bench.backends.reference import TOLERANCE, reference, relative_error
from common.attention_bench.backends.triton_kernels import check_interpreted, use_interpreter
from common.attention_bench.options import Heads, names_of, parse_backends, parse_configs
from common.errors import CheckFailed, UserError, first_line, is_out_of_memory
from common.memory import free_bytes, human_bytes

OK, UNSUPPORTED, OUT_OF_MEMORY, WRONG, FAILED = "ok", "unsupported", "out of memory", "wrong", "failed"
MAX_COPIES = {"cuda": 512, "cpu": 4}
CACHES_TO_FILL = 4
MAX_GRAPHED_CALL_S = 10e-3
MAX_NOTE = 160  # characters of an error that a row keeps
SAMPLING_S = 1.5  # for a backend's samples at one point; what is slow is sampled less often, three times at least
COMPILED_S = 0.25  # a first call on CUDA that takes longer compiled something
SLOW_FAILURE_S = 5.0  # a failure that took longer compiled in vain; the next size would end in the same error
HEADROOM = 0.9  # of the free memory: allocators round up

# Columns after those of the file itself.
DETAILS = ("time_us_p10", "time_us_p90", "launch_us", "plan_us", "jit_s", "tflops", "gb_per_s", "flop_per_byte")
DETAILS += ("form", "in_cache", "error", "status", "note", results.SUSPECT)


# --- what is settled before measuring ---------------------------------------------------------------------------------
@dataclass
class Bench:
    """A benchmark that is ready to measure. `ceilings` is replaced when a point makes the gate measure them again."""

    args: argparse.Namespace
    phase: str
    out: Path
    device: torch.device
    dtype: torch.dtype
    typed: set[str]
    configs: dict[str, Heads]
    backends: list[Backend]
    missing: dict[str, str]  # name -> reason
    ceilings: roofline.Ceilings
    compiled: set[tuple] = field(default_factory=set)  # what has run before: its compilation is behind it
    given_up: dict[tuple, str] = field(default_factory=dict)  # (backend, head_dim) -> the failure that took so long

    def ceiling(self, ceilings: roofline.Ceilings) -> float:
        """TFLOP/s of the best product for prefill, GB/s of reading for decode."""
        if self.phase == "prefill":
            return ceilings.peak_tflops(self.dtype)
        return ceilings.memory_gb_per_s("read")

    def figure(self, case: Case, seconds: float) -> float:
        return case.flops / seconds / 1e12 if self.phase == "prefill" else case.num_bytes / seconds / 1e9

    def provenance(self, **facts: Any) -> dict[str, Any]:
        return results.provenance(
            self.args,
            dtype=roofline.dtype_name(self.dtype),
            device=str(self.device),
            ceilings=self.ceilings,
            # Lists in `sizes` may differ between a run and its resumption: other configurations are other rows.
            sizes={n: [h.num_heads, h.num_kv_heads, h.head_dim] for n, h in self.configs.items()},
            tolerance=TOLERANCE[self.dtype],
            **facts,
        )


def prepare(args: argparse.Namespace, script_file: str, presets: Mapping[str, Mapping[str, Any]], phase: str) -> Bench:
    """Everything before the first measurement, cheapest refusals first. Raises UserError; writes nothing."""
    configs = parse_configs(args)
    names = parse_backends(args, phase)
    backends = [attention_backends.BY_NAME[name] for name in (names_of(phase) if names is None else names)]
    for heads in configs.values():
        refusals = {b.name: reason for b in backends if (reason := b.refuses_head_dim(heads.head_dim))}
        if refusals and (names is not None or len(refusals) == len(backends)):
            name = next(iter(refusals))
            raise UserError(f"--head-dim: {name}: {refusals[name]}; choose another size or other --backends")
    out = cli.output_dir(args, script_file)
    on_cpu = args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available())
    interpreted = on_cpu and any(b.name == "triton" for b in backends) and use_interpreter()
    from common import checkpoint  # only now: it imports the kernels, and whether they are interpreted is settled then

    device = checkpoint.pick_device(args.device)
    dtype = checkpoint.pick_dtype(args.dtype, device)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    typed = cli.apply_preset(args, presets, device.type)
    args.config, args.backends = list(configs), names  # lists: rows say which of them were measured
    missing = {b.name: reason for b in backends if (reason := b.missing(device))}
    bench = Bench(args, phase, out, device, dtype, typed, configs, [], missing, roofline.ceilings(device, dtype))
    bench.backends = [b for b in backends if b.name not in missing]
    if interpreted:
        _check_triton(bench)
    print("backends: " + (", ".join(b.name for b in bench.backends) or "none"))
    for name, reason in missing.items():
        print(f"  without {name}: {reason}")
    return bench


def _check_triton(bench: Bench) -> None:
    """On a CPU: our kernels in Triton's interpreter against the reference. CheckFailed if they are wrong."""
    shapes = {(heads.group, heads.head_dim): heads for heads in bench.configs.values()}
    worst, allowed = max(check_interpreted(bench.phase, heads) for heads in shapes.values())
    if worst > allowed:
        raise CheckFailed(f"triton, in its interpreter: {bench.phase} is off by {worst:.1e}, more than {allowed:.0e}")
    bench.missing["triton"] = f"right in Triton's interpreter (relative error {worst:.0e}); not timed on a CPU"


def check_memory(bench: Bench, cases: Iterable[Case], option: str) -> None:
    """UserError if a size that was typed cannot fit: inputs and reference alone are above the free memory."""
    free = free_bytes(bench.device)
    for case in cases:
        need = _bytes_needed(case)
        if need > free:
            raise UserError(
                f"{option}: batch {case.batch} with {max(case.kv_lens)} tokens a sequence needs "
                f"{human_bytes(need)}; {human_bytes(free)} are free on {bench.device}; give smaller sizes"
            )


# --- one point --------------------------------------------------------------------------------------------------------
@dataclass
class _Ready:
    """A backend whose output was right: its calls, one for each set of inputs, and what was learnt on the way."""

    calls: list[Call]
    row: dict[str, Any]


def measure_case(bench: Bench, case: Case, backends: Sequence[Backend]) -> dict[str, dict[str, Any]]:
    """Name -> the row's part that was measured: time_us, percent_of_peak and DETAILS. Never raises for a backend."""
    rows = {backend.name: blank_row() for backend in backends}
    able = []
    for backend in backends:
        reason = bench.given_up.get((backend.name, case.heads.head_dim)) or backend.unsupported(case)
        if reason:
            rows[backend.name] |= {"status": UNSUPPORTED, "note": reason}
        else:
            able.append(backend)
    if able:
        try:
            _measure(bench, case, able, rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            for backend in able:
                if rows[backend.name]["status"] is None:
                    rows[backend.name] |= {"status": OUT_OF_MEMORY, "note": first_line(error)[:MAX_NOTE]}
        _release(bench.device)
    return rows


def _measure(bench: Bench, case: Case, able: Sequence[Backend], rows: Mapping[str, dict[str, Any]]) -> None:
    """Everything that holds tensors: inputs, reference, and then each backend in turn."""
    need, free = _bytes_needed(case), free_bytes(bench.device)
    if need > free:  # asked first: a CPU's allocator promises memory that is not there
        raise MemoryError(f"needs {human_bytes(need)} for inputs and reference, {human_bytes(free)} are free")
    inputs = _inputs(bench, case)
    expected = reference(case, inputs[0])
    made = {b.name: _check(bench, b, case, inputs, expected, rows[b.name]) for b in able}
    ready = {name: r for name, r in made.items() if r is not None}
    del expected
    if ready:
        _time(bench, case, ready, bench.ceilings.fits_in_cache(len(inputs) * case.num_bytes))


def _bytes_needed(case: Case) -> int:
    """For one set of inputs, its output, and the reference: the output in float64, K and V without pages."""
    tokens = sum(case.q_lens) if case.phase == "prefill" else case.batch
    out = tokens * case.heads.num_heads * case.heads.head_dim
    return 2 * case.input_bytes + (case.dtype.itemsize + 8) * out


def blank_row() -> dict[str, Any]:
    """What `measure_case` fills in, empty."""
    return dict.fromkeys(("time_us", "percent_of_peak", *DETAILS)) | {results.SUSPECT: False}


def _inputs(bench: Bench, case: Case) -> list[Any]:
    """Sets of inputs that together fill the cache four times, as far as memory and MAX_COPIES allow; at least one."""
    if bench.device.type == "cpu" and bench.phase == "prefill":
        return [case.inputs(bench.args.seed)]  # milliseconds of arithmetic: where the inputs lie does not show
    copies = -(-CACHES_TO_FILL * bench.ceilings.cache_bytes // case.num_bytes)
    # Each set may be held twice: backends without pages keep K and V in a form of their own.
    room = int(free_bytes(bench.device) * HEADROOM / 4 / case.input_bytes)
    copies = max(1, min(copies, MAX_COPIES[bench.device.type], room))
    first = case.inputs(bench.args.seed)
    return [first, *(first.clone() for _ in range(copies - 1))]


def _check(
    bench: Bench, backend: Backend, case: Case, inputs: Sequence[Any], expected: Any, row: dict[str, Any]
) -> _Ready | None:
    """Run once, compare, bind all inputs. None, with the row's status and note filled in, where that does not work."""
    need, free = backend.workspace_bytes(case), free_bytes(bench.device)
    if need > HEADROOM * free:
        note = f"needs about {human_bytes(need)} of workspace, {human_bytes(free)} are free"
        row |= {"status": OUT_OF_MEMORY, "note": note}
        return None
    start = time.perf_counter()
    try:
        prepared = backend.prepare(case)
        call = prepared.bind(inputs[0])
        out = _waited(bench.device, call)
        first_s = time.perf_counter() - start
        row["error"] = relative_error(out, expected)
        if not row["error"] <= TOLERANCE[bench.dtype]:
            row |= {"status": WRONG, "note": f"relative error {row['error']:.1e} against {TOLERANCE[bench.dtype]:.1e}"}
            return None
        del out
        row["jit_s"] = _jit_s(bench, backend, case, inputs[0], first_s)
        row["plan_us"] = _plan_us(bench, prepared)
        return _Ready([call, *(prepared.bind(x) for x in inputs[1:])], row)
    except Exception as error:  # a library refuses in whatever way it likes; the sweep goes on
        row |= _explained(backend, error)
    seconds = time.perf_counter() - start
    if row["status"] == UNSUPPORTED and seconds > SLOW_FAILURE_S:
        note = f"{row['note']} (not tried again: it failed after {seconds:.0f} s)"
        bench.given_up[backend.name, case.heads.head_dim] = note
    try:
        timing.synchronize(bench.device)
    except RuntimeError as error:
        broken = f"{backend.name} broke the CUDA device's context ({row['note']}): {first_line(error)[:MAX_NOTE]}"
        raise CheckFailed(f"{broken}; go on with --resume and --backends without it") from None
    return None


def _jit_s(bench: Bench, backend: Backend, case: Case, inputs: Any, first_s: float) -> float | None:
    """Seconds of compilation in a first call that took `first_s`: what a second one does not take. None where nothing
    was compiled: on a CPU, and where this shape of kernel has run before and was quick now."""
    kind = (backend.name, case.heads, getattr(case, "page_size", None))
    if bench.device.type == "cpu" or (kind in bench.compiled and first_s < COMPILED_S):
        return None
    bench.compiled.add(kind)
    start = time.perf_counter()
    _waited(bench.device, backend.prepare(case).bind(inputs))
    return max(0.0, first_s - (time.perf_counter() - start))


def _waited(device: torch.device, call: Call) -> torch.Tensor:
    out = call()
    timing.synchronize(device)
    return out


def _plan_us(bench: Bench, prepared: Prepared) -> float | None:
    """The host's time for a plan, the copies that it enqueues included; None for backends without one."""
    if prepared.plan is None:
        return None

    def plan() -> None:
        prepared.plan()
        timing.synchronize(bench.device)

    samples = []
    for _ in range(max(3, bench.args.repeats)):
        start = time.perf_counter()
        plan()
        samples.append(time.perf_counter() - start)
    return timing.summarise(samples).median_s * 1e6


def _explained(backend: Backend, error: Exception) -> dict[str, Any]:
    if is_out_of_memory(error):
        return {"status": OUT_OF_MEMORY, "note": "while it ran"}
    note = first_line(error)[:MAX_NOTE]
    if isinstance(error, Unsupported) or not backend.ours:
        return {"status": UNSUPPORTED, "note": note}
    return {"status": FAILED, "note": f"{type(error).__name__}: {note}"}


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- time -------------------------------------------------------------------------------------------------------------
def _time(bench: Bench, case: Case, ready: Mapping[str, _Ready], in_cache: bool) -> None:
    """Fill in the rows' times, in turn over the backends, then hold each figure against its ceiling."""
    launches = _interleaved(bench, {name: _in_turn(r.calls) for name, r in ready.items()})
    runs = {}
    for name, r in ready.items():
        try:
            runs[name] = _run(bench, r, launches[name].median_s)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            r.row |= {"status": OUT_OF_MEMORY, "note": "while its calls were captured"}
    timings = _interleaved(bench, {name: run for name, (run, _) in runs.items()})
    for name, (run, count) in runs.items():
        r = ready[name]

        def figure(timed: timing.Timing, count=count, row=r.row) -> float:
            row["time_us"] = timed.median_s / count * 1e6
            row["time_us_p10"], row["time_us_p90"] = timed.p10_s / count * 1e6, timed.p90_s / count * 1e6
            return bench.figure(case, timed.median_s / count)

        value, suspect = figure(timings[name]), False
        if not (in_cache and bench.phase == "decode"):
            value, bench.ceilings, suspect = roofline.gate(
                value,
                lambda run=run, figure=figure: figure(_interleaved(bench, {"": run})[""]),
                bench.ceiling,
                bench.ceilings,
                bench.device,
                bench.dtype,
            )
        seconds = r.row["time_us"] / 1e6
        r.row |= {
            "status": OK,
            "percent_of_peak": 100 * value / bench.ceiling(bench.ceilings),
            "tflops": case.flops / seconds / 1e12,
            "gb_per_s": case.num_bytes / seconds / 1e9,
            "flop_per_byte": case.flops / case.num_bytes,
            "launch_us": launches[name].median_s * 1e6,
            "in_cache": in_cache,
            results.SUSPECT: suspect,
        }


def _interleaved(bench: Bench, runs: Mapping[str, Callable[[], object]]) -> dict[str, timing.Timing]:
    options = {"warmup": bench.args.warmup, "repeats": bench.args.repeats, "limit_s": SAMPLING_S * len(runs)}
    return timing.interleaved(runs, device=bench.device, **options)


def _in_turn(calls: Sequence[Call]) -> Callable[[], object]:
    """One call at a time, each on the next set of inputs."""
    position = 0

    def call() -> None:
        nonlocal position
        calls[position % len(calls)]()
        position += 1

    return call


def _run(bench: Bench, r: _Ready, launch_s: float) -> tuple[Callable[[], object], int]:
    """(what is timed, how many calls that is): a CUDA graph where it can be had, else calls one by one."""
    if bench.device.type == "cuda" and launch_s <= MAX_GRAPHED_CALL_S:
        try:
            r.row["form"] = "graph"
            return timing.graph_sample(r.calls)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            r.row["note"] = f"not captured: {first_line(error)[:MAX_NOTE]}"
    r.row["form"] = "launch"
    if bench.device.type == "cuda":
        return _in_turn(r.calls), 1

    def all_calls() -> None:
        for call in r.calls:
            call()

    return all_calls, len(r.calls)

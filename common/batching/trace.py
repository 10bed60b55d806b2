"""Does the device ever wait for the host? A timeline of one run, and the share of its time in which anything computed.

    share = union of the kernels' intervals in the middle 80 % of the run / length of that part

The union counts overlapping kernels once; the first and last tenth (warming up, a batch that empties) are left out. All
kernels are counted, but a long run has some million of them and a file of that size opens nowhere, so the file holds a
window around the middle: as many events as a viewer takes. On a CPU the operators of the main thread stand in for the
kernels: there the share says how much of the time was spent inside torch and not in Python between its calls.

The file is Chrome's trace format, as torch.profiler exports it: open it at ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.results import write_atomic

MIDDLE = 0.8
MAX_FILE_EVENTS = 200_000  # some 40 MB of JSON


class Event(NamedTuple):
    """Something that ran: a kernel, a copy, a call of the driver, an operator. Nanoseconds on the profiler's clock."""

    start_ns: int
    end_ns: int
    name: str
    kind: str  # "kernel", "copy" (also memory that is set), "host" (an operator or a call of the CUDA runtime)
    track: int  # the device's stream or the host's thread


@dataclass(frozen=True)
class Share:
    """The busy part of the middle of a run, in seconds. `begin_ns`, `end_ns`: that middle, on the profiler's clock."""

    busy_s: float
    begin_ns: float
    end_ns: float

    @property
    def total_s(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e9

    @property
    def value(self) -> float:
        return self.busy_s / self.total_s if self.total_s else 0.0


def union_length(intervals: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """How much of [begin, end] is covered by at least one of the intervals (start, end), in any order."""
    covered, reached = 0.0, begin
    for start, stop in sorted(intervals):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            covered += stop - start
            reached = stop
    return covered


def middle_share(intervals: Sequence[tuple[int, int]], middle: float = MIDDLE) -> Share:
    """The union of the intervals over the middle of the time from the first start to the last end; 0 of 0 without."""
    if not intervals:
        return Share(0.0, 0.0, 0.0)
    first, last = min(start for start, _ in intervals), max(end for _, end in intervals)
    margin = (last - first) * (1 - middle) / 2
    begin, end = first + margin, last - margin
    return Share(union_length(intervals, begin, end) / 1e9, begin, end)


def window(events: Sequence[Event], most: int = MAX_FILE_EVENTS) -> list[Event]:
    """The events in order of their starts; of more than `most`, those nearest the middle of the list."""
    ordered = sorted(events)
    spare = max(0, len(ordered) - most)
    return ordered[spare // 2 : spare // 2 + most]


# --- recording -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recorded:
    """A run under the profiler: its events, how long it took, and its beginning on the profiler's clock and on the
    engine's, read together.
    """

    events: list[Event]
    wall_s: float
    start_ns: int
    engine_start_s: float


def record(run: Callable[[], Any], device_type: str, engine_clock: Callable[[], float]) -> tuple[Any, Recorded]:
    """`run()` under torch's profiler; what it returned, and what was recorded. engine_clock: seconds.

    On CUDA only the device's activities and the calls that launch them: recording every operator would slow the host
    down, and the host is what the share is about.
    """
    from torch.autograd.profiler import profile

    on_gpu = device_type == "cuda"
    options = {"use_cpu": False, "use_device": "cuda"} if on_gpu else {"use_cpu": True}
    with profile(use_kineto=True, **options) as profiler:
        # Only now: the profiler takes milliseconds to start, on a busy machine many.
        start_ns, engine_start_s = same_moment(engine_clock)
        start = time.perf_counter()
        result = run()
        wall_s = time.perf_counter() - start
    # The raw events: `profiler.function_events` would make a tree of them, which takes minutes for a million.
    events = [_event(raw) for raw in profiler.kineto_results.events()]
    return result, Recorded(events if on_gpu else _of_main_thread(events), wall_s, start_ns, engine_start_s)


def same_moment(clock: Callable[[], float], tries: int = 10) -> tuple[int, float]:
    """(nanoseconds of the time of day, with which the profiler stamps, and `clock()`) at one moment.

    Of several tries the one that took least: in any of them the process may have had to wait between the readings.
    """

    def read() -> tuple[int, int, float]:
        before, value, after = time.time_ns(), clock(), time.time_ns()
        return after - before, (before + after) // 2, value

    _, moment_ns, value = min(read() for _ in range(tries))
    return moment_ns, value


def _event(raw: Any) -> Event:
    name, start_ns = raw.name(), raw.start_ns()
    end_ns = start_ns + raw.duration_ns()
    if raw.device_type().name == "CPU":
        return Event(start_ns, end_ns, name, "host", raw.start_thread_id())
    kind = "copy" if name.startswith(("Memcpy", "Memset")) else "kernel"
    return Event(start_ns, end_ns, name, kind, raw.device_resource_id())


def _of_main_thread(events: Sequence[Event]) -> list[Event]:
    """Those of the thread that has most: the one the loop runs in."""
    if not events:
        return []
    (thread, _), *_ = Counter(event.track for event in events).most_common(1)
    return [event for event in events if event.track == thread]


# --- the file --------------------------------------------------------------------------------------------------------
HOST, DEVICE = (1, "host: operators and calls of the CUDA runtime"), (2, "device")
PROCESSES = {"host": HOST, "kernel": DEVICE, "copy": DEVICE}
STEPS_PROCESS = (0, "steps of the scheduler")


def trace_json(events: Sequence[Event], steps: Sequence[tuple[int, int, str]], origin_ns: int) -> str:
    """Chrome's trace format; times in microseconds after `origin_ns`. steps: (start_ns, end_ns, name) each."""
    processes = dict([STEPS_PROCESS, *PROCESSES.values()])
    rows: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}} for pid, name in processes.items()
    ]
    for start_ns, end_ns, name, kind, track in [*(Event(*step, "step", 0) for step in steps), *events]:
        pid = STEPS_PROCESS[0] if kind == "step" else PROCESSES[kind][0]
        start_us, length_us = (start_ns - origin_ns) / 1e3, (end_ns - start_ns) / 1e3
        rows.append({"ph": "X", "name": name, "cat": kind, "pid": pid, "tid": track, "ts": start_us, "dur": length_us})
    return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"})


def step_events(loop: Any, recorded: Recorded) -> list[tuple[int, int, str]]:
    """The loop's iterations on the profiler's clock: (start_ns, end_ns, name) each."""
    found = []
    for number, iteration in enumerate(loop.iterations):
        start_ns = recorded.start_ns + int((loop.start_s + iteration.start_s - recorded.engine_start_s) * 1e9)
        work = iteration.work
        name = f"{number}: {work.decode_tokens} decodes, {work.prefill_tokens} prompt tokens"
        found.append((start_ns, start_ns + int(iteration.time_us * 1e3), name))
    return found


def trace(path: str, serve: Callable[[], Any], engine: Any, device_type: str) -> str:
    """One more run, `serve() -> Run`, recorded and written to `path`; what is to be said of it, in words."""
    run, recorded = record(serve, device_type, engine.now)
    kernel_kind = "kernel" if device_type == "cuda" else "host"
    share = middle_share([(e.start_ns, e.end_ns) for e in recorded.events if e.kind == kernel_kind])
    shown = window(recorded.events)
    begin, end = (shown[0].start_ns, max(e.end_ns for e in shown)) if shown else (recorded.start_ns, recorded.start_ns)
    steps = [step for step in step_events(run.loops[0], recorded) if step[1] > begin and step[0] < end]
    write_atomic(Path(path), trace_json(shown, steps, recorded.start_ns).encode())
    return in_words(share, recorded, len(shown), (begin - recorded.start_ns) / 1e9, (end - begin) / 1e9, kernel_kind)


def in_words(share: Share, recorded: Recorded, written: int, begin_s: float, length_s: float, kernel_kind: str) -> str:
    """The share, what stands in for kernels on a CPU, and what of a long run the file holds."""
    if not recorded.events:
        return "trace: the profiler recorded nothing."
    what = "kernels ran" if kernel_kind == "kernel" else "operators of the main thread (a CPU has no kernels) ran"
    texts = [
        f"trace: {what} for {share.value:.1%} of the middle {MIDDLE:.0%} of the run ({share.busy_s:.2f} of "
        f"{share.total_s:.2f} s; under the profiler it took {recorded.wall_s:.2f} s)"
    ]
    if share.total_s < 0.9 * MIDDLE * recorded.wall_s:
        texts.append("the profiler did not see all of the run: take the share with care")
    if written < len(recorded.events):
        texts.append(
            f"the file holds {written:,} of {len(recorded.events):,} events, {length_s:.2f} s from {begin_s:.2f} s on; "
            "all of them are in the share"
        )
    return "; ".join(texts) + "."

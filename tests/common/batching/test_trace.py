"""The share of a run in which anything computed, against cases worked out by hand; the file it is shown in."""

import json
import random
import time
from types import SimpleNamespace

import pytest

from common.batching import trace
from common.batching.step_loop import Iteration
from common.batching.trace import Event, Recorded, middle_share, union_length, window
from common.serving import Work


@pytest.mark.parametrize(
    "intervals, expected",
    [
        ([], 0),
        ([(2, 5)], 3),
        ([(2, 5), (5, 7)], 5),  # they touch
        ([(2, 6), (4, 8)], 6),  # they overlap: counted once
        ([(6, 8), (2, 4)], 4),  # not in order
        ([(2, 9), (3, 4), (5, 6)], 7),  # one inside another
        ([(2, 9), (3, 4), (8, 9.5)], 7.5),  # and one behind the inner one
        ([(-5, 3), (9, 40)], 4),  # over both edges
        ([(-5, 40)], 10),
        ([(-5, 0), (10, 12)], 0),  # outside
        ([(3, 3)], 0),
    ],
)
def test_union_by_hand(intervals, expected):
    assert union_length(intervals, 0, 10) == expected


def test_union_against_counting_ticks():
    draw = random.Random(1)
    for _ in range(200):
        intervals = [(start, start + draw.randrange(12)) for start in (draw.randrange(-10, 60) for _ in range(12))]
        ticks = {tick for start, end in intervals for tick in range(start, end)}
        assert union_length(intervals, 5, 40) == len(ticks & set(range(5, 40)))


def test_the_middle_leaves_the_ends_out():
    """A run of 100 s: nothing but its edges is idle, then nothing but its middle."""
    second = 10**9
    edges_idle = [(0, second), (10 * second, 90 * second), (99 * second, 100 * second)]
    share = middle_share(edges_idle)
    assert (share.begin_ns, share.end_ns) == pytest.approx((10 * second, 90 * second))
    assert share.total_s == pytest.approx(80) and share.value == 1
    half = middle_share([(0, 50 * second), (70 * second, 100 * second)])
    assert half.busy_s == pytest.approx(60) and half.value == pytest.approx(0.75)
    assert middle_share([]).value == 0


def test_a_long_run_is_cut_to_its_middle():
    events = [Event(start, start + 5, "k", "kernel", 7) for start in range(100)]
    random.Random(2).shuffle(events)
    assert [e.start_ns for e in window(events, 10)] == list(range(45, 55))
    assert [e.start_ns for e in window(events, 1000)] == list(range(100))


def test_the_file_is_a_chrome_trace_with_the_steps_above():
    work = Work(prefill_tokens=5, decode_tokens=2)
    loop = SimpleNamespace(start_s=3.0, iterations=[Iteration(0.5, 250.0, work, 3, 0, 1)])
    recorded = Recorded([], 1.0, start_ns=1_000_000_000, engine_start_s=2.0)
    steps = trace.step_events(loop, recorded)
    assert steps == [(2_500_000_000, 2_500_250_000, "0: 2 decodes, 5 prompt tokens")]
    events = [
        Event(1_000_002_000, 1_000_005_500, "gemm", "kernel", 7),
        Event(1_000_001_000, 1_000_001_500, "launch", "host", 1),
    ]
    rows = json.loads(trace.trace_json(events, steps, recorded.start_ns))["traceEvents"]
    names = {row["pid"]: row["args"]["name"] for row in rows if row["ph"] == "M"}
    kernel, launch, step = (next(r for r in rows if r["name"].endswith(n)) for n in ("gemm", "launch", "prompt tokens"))
    assert (kernel["ts"], kernel["dur"], kernel["tid"]) == (2.0, 3.5, 7) and names[kernel["pid"]] == "device"
    assert (launch["ts"], launch["dur"]) == (1.0, 0.5) and names[launch["pid"]].startswith("host")
    assert (step["ts"], step["dur"]) == (1.5e6, 250.0) and names[step["pid"]] == "steps of the scheduler"


def kineto_event(name, start, length, device="CUDA", thread=1, stream=7):
    return SimpleNamespace(
        name=lambda: name,
        start_ns=lambda: start,
        duration_ns=lambda: length,
        device_type=lambda: SimpleNamespace(name=device),
        start_thread_id=lambda: thread,
        device_resource_id=lambda: stream,
    )


def test_kernels_copies_and_calls_are_told_apart():
    kernel = trace._event(kineto_event("gemm", 10, 5))
    copy = trace._event(kineto_event("Memcpy HtoD (Pinned -> Device)", 10, 5, stream=9))
    call = trace._event(kineto_event("cudaGraphLaunch", 2, 1, device="CPU", thread=4))
    assert kernel == Event(10, 15, "gemm", "kernel", 7)
    assert (copy.kind, copy.track, call.kind, call.track) == ("copy", 9, "host", 4)


def test_only_kernels_count_on_a_gpu(monkeypatch, tmp_path):
    """A copy and a call fill the time in which no kernel runs: the share must not see them."""
    events = [Event(0, 40, "a", "kernel", 7), Event(40, 100, "Memcpy", "copy", 7), Event(0, 100, "wait", "host", 1)]
    events.append(Event(90, 100, "b", "kernel", 7))
    monkeypatch.setattr(trace, "record", lambda run, *_: (run(), Recorded(events, 1e-7, 0, 0.0)))
    run = SimpleNamespace(loops=[SimpleNamespace(start_s=0.0, iterations=[])])
    text = trace.trace(str(tmp_path / "t.json"), lambda: run, SimpleNamespace(now=lambda: 0.0), "cuda")
    assert "kernels ran for 37.5%" in text  # 10 .. 40 of 10 .. 90


def test_a_trace_that_stops_early_says_so(monkeypatch, tmp_path):
    events = [Event(0, 100, "a", "kernel", 7)]
    monkeypatch.setattr(trace, "record", lambda run, *_: (run(), Recorded(events, 1.0, 0, 0.0)))
    run = SimpleNamespace(loops=[SimpleNamespace(start_s=0.0, iterations=[])])
    text = trace.trace(str(tmp_path / "t.json"), lambda: run, SimpleNamespace(now=lambda: 0.0), "cuda")
    assert "did not see all of the run" in text


def test_recording_on_a_cpu_sees_the_operators_and_not_the_pause():
    torch = pytest.importorskip("torch")
    x = torch.randn(200, 200)

    def run():
        for _ in range(5):
            torch.mm(x, x)
        time.sleep(0.2)
        for _ in range(5):
            torch.mm(x, x)
        return "result"

    result, recorded = trace.record(run, "cpu", time.perf_counter)
    assert result == "result" and recorded.wall_s > 0.2
    assert sum(event.name == "aten::mm" for event in recorded.events) == 10
    assert all(event.kind == "host" for event in recorded.events)
    span = (max(e.end_ns for e in recorded.events) - min(e.start_ns for e in recorded.events)) / 1e9
    assert 0.2 < span <= recorded.wall_s + 0.01
    share = middle_share([(e.start_ns, e.end_ns) for e in recorded.events])
    assert share.busy_s < share.total_s - 0.1


def test_a_step_holds_its_operators_however_long_the_profiler_takes_to_start(monkeypatch):
    """On one clock a step begins before its product and ends after it; a base read before the start is 50 ms off."""
    torch = pytest.importorskip("torch")
    profile = pytest.importorskip("torch.autograd.profiler").profile
    start_profiler = profile.__enter__

    def start_slowly(self):
        time.sleep(0.05)
        started = start_profiler(self)
        time.sleep(0.05)
        return started

    monkeypatch.setattr(profile, "__enter__", start_slowly)
    x, pause_s = torch.randn(200, 200), 0.005  # around a product: far more than the clocks differ by

    def serve():
        iterations, start_s = [], time.perf_counter()
        for number in range(5):
            begin_s = time.perf_counter()
            time.sleep(pause_s)
            torch.mm(x, x)
            time.sleep(pause_s)
            time_us = (time.perf_counter() - begin_s) * 1e6
            iterations.append(Iteration(begin_s - start_s, time_us, Work(decode_tokens=number), 1, 0, 1))
        return SimpleNamespace(loops=[SimpleNamespace(start_s=start_s, iterations=iterations)])

    run, recorded = trace.record(serve, "cpu", time.perf_counter)
    steps = trace.step_events(run.loops[0], recorded)
    products = sorted(event for event in recorded.events if event.name == "aten::mm")
    assert len(products) == len(steps) == 5
    for (begin_ns, end_ns, _), product in zip(steps, products):
        assert begin_ns < product.start_ns and product.end_ns < end_ns


def test_two_clocks_are_read_at_one_moment(monkeypatch):
    """The process is put aside for a second while it reads, in all tries but one."""
    now_ns, tries = [0], iter(range(10))

    def time_of_day():
        now_ns[0] += 100
        return now_ns[0]

    def clock():
        now_ns[0] += 0 if next(tries) == 6 else 10**9
        return now_ns[0] / 1e9

    monkeypatch.setattr(trace.time, "time_ns", time_of_day)
    moment_ns, value = trace.same_moment(clock)
    assert abs(moment_ns - value * 1e9) <= 50 + 1

"""Timing statistics against numpy and a clock that the test turns."""

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import timing
from common.errors import UserError


class Clock:
    """time.perf_counter whose time passes only when the work under test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, *durations: float, log: list | None = None, name: str = ""):
        """A function that takes the durations in turn, round and round."""
        turns = itertools.cycle(durations)

        def run() -> None:
            self.now += next(turns)
            if log is not None:
                log.append(name)

        return run


@settings(deadline=None)
@given(st.lists(st.floats(1e-9, 1e6), min_size=1, max_size=30))
def test_statistics_are_numpys(samples):
    timed = timing.summarise(samples)
    expected = np.percentile(samples, [50, 10, 90])
    np.testing.assert_allclose([timed.median_s, timed.p10_s, timed.p90_s], expected, rtol=1e-12)
    assert timed.samples == tuple(samples)
    assert min(samples) <= timed.p10_s <= timed.median_s <= timed.p90_s <= max(samples)


def test_measure_times_the_repeats_and_not_the_warmup(monkeypatch):
    clock = Clock(monkeypatch)
    fn = clock.work(50.0, 50.0, 1.0, 2.0, 6.0)
    timed = timing.measure(fn, device="cpu", warmup=2, repeats=3)
    assert timed.samples == (1.0, 2.0, 6.0) and timed.median_s == 2.0
    assert timed.p10_s == pytest.approx(1.2) and timed.p90_s == pytest.approx(5.2)


def test_alternatives_take_turns_and_each_goes_first_in_turn(monkeypatch):
    clock, log = Clock(monkeypatch), []
    fns = {name: clock.work(seconds, log=log, name=name) for name, seconds in [("a", 1.0), ("b", 4.0), ("c", 0.5)]}
    timed = timing.interleaved(fns, device="cpu", warmup=1, repeats=4)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: t.samples for name, t in timed.items()} == {"a": (1.0,) * 4, "b": (4.0,) * 4, "c": (0.5,) * 4}
    assert list(timed) == ["a", "b", "c"]


def test_a_time_limit_ends_rounds_and_leaves_three_samples_of_each(monkeypatch):
    clock = Clock(monkeypatch)
    fns = {"slow": clock.work(5.0), "fast": clock.work(1.0)}
    counts = {
        limit: {n: len(t.samples) for n, t in timing.interleaved(fns, device="cpu", repeats=9, limit_s=limit).items()}
        for limit in (1.0, 29.0, 30.0, 1e9, None)
    }
    # 6 seconds to warm up and 6 a round: after 3 rounds 24 seconds, after 4 rounds 30
    assert counts[1.0] == {"slow": 3, "fast": 3}, "a limit never leaves fewer"
    assert counts[29.0] == {"slow": 4, "fast": 4} and counts[30.0] == {"slow": 5, "fast": 5}
    assert counts[1e9] == counts[None] == {"slow": 9, "fast": 9}


@pytest.mark.parametrize(("warmup", "repeats"), [(1, 0), (-1, 1)])
def test_no_samples_is_an_error(warmup, repeats):
    with pytest.raises(ValueError, match="repeats"):
        timing.measure(lambda: None, device="cpu", warmup=warmup, repeats=repeats)
    with pytest.raises(ValueError, match="no samples"):
        timing.summarise([])


def test_an_exception_of_the_work_comes_through():
    def broken() -> None:
        raise UserError("no such kernel")

    with pytest.raises(UserError, match="no such kernel"):
        timing.measure(broken, device="cpu")


def test_graph_times_need_cuda(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA"):
        timing.graph_kernel_time([lambda: None])
    with pytest.raises(ValueError, match="at least one call"):
        timing.graph_kernel_time([])


class FakeCuda:
    """torch.cuda of a device that does at once what is launched, each call in the time that the clock says.

    What runs while a graph is captured takes no time and is kept; `replay` runs it.
    """

    def __init__(self, monkeypatch, clock):
        import torch

        self.clock, self.capturing, self.current, self.streams_of_calls = clock, None, "main", []
        fake = self

        class Stream(str):
            def wait_stream(self, other):
                pass

        class Graph:
            def __init__(self):
                self.calls = []

            def replay(self):
                for seconds in self.calls:
                    clock.now += seconds

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        @contextlib.contextmanager
        def stream(which):
            before, fake.current = fake.current, which
            yield
            fake.current = before

        @contextlib.contextmanager
        def graph(captured, stream):
            fake.current, fake.capturing = stream, captured.calls
            yield  # as torch's, it leaves the stream as it is when what it holds raises
            fake.current, fake.capturing = "main", None

        values = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device": lambda device: contextlib.nullcontext(),
            "synchronize": lambda *_: None,
            "current_stream": lambda: Stream(self.current),
            "set_stream": lambda which: setattr(self, "current", which),
            "Stream": lambda: Stream("side"),
            "stream": stream,
            "graph": graph,
            "CUDAGraph": Graph,
            "Event": Event,
        }
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, seconds):
        def run():
            self.streams_of_calls.append(self.current)
            if self.capturing is None:
                self.clock.now += seconds
            else:
                self.capturing.append(seconds)

        return run


def test_a_graph_holds_the_calls_in_turn_after_each_ran_once_on_its_stream(monkeypatch):
    clock = Clock(monkeypatch)
    cuda = FakeCuda(monkeypatch, clock)
    graph, count = timing.capture([cuda.call(seconds) for seconds in (1.0, 2.0, 4.0)])
    assert count == 21 and graph.calls == [1.0, 2.0, 4.0] * 7 and clock.now == 107.0
    assert cuda.streams_of_calls == ["side"] * (3 + 21) and cuda.current == "main"
    _, count = timing.capture([cuda.call(1.0)] * 50)
    assert count == 50


def test_a_sample_is_as_many_replays_as_fill_some_milliseconds(monkeypatch):
    clock = Clock(monkeypatch)
    cuda = FakeCuda(monkeypatch, clock)
    replay, count = timing.graph_sample([cuda.call(5e-6), cuda.call(15e-6)])  # 20 calls of 10 us: 0.2 ms a graph
    assert count == 20 * 20
    before = clock.now
    replay()
    assert clock.now - before == pytest.approx(4e-3)
    assert timing.graph_sample([cuda.call(1.0)])[1] == 20, "one replay of what takes long"
    assert timing.graph_sample([cuda.call(1e-9)])[1] == 100 * 20, "and not more than a hundred"


def test_kernel_times_are_per_call(monkeypatch):
    clock = Clock(monkeypatch)
    cuda = FakeCuda(monkeypatch, clock)
    timed = timing.graph_kernel_time([cuda.call(5e-6), cuda.call(15e-6)], repeats=4)
    assert timed.samples == pytest.approx((10e-6,) * 4)


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    cuda = FakeCuda(monkeypatch, Clock(monkeypatch))

    def waits():
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        timing.capture([waits])
    assert cuda.current == "main"

"""Timing statistics against numpy and a clock that the test turns."""

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

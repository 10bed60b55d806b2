"""The start in parts: each second counted once, kernels apart from what needed them, cold told from warm."""

import re
from types import SimpleNamespace

import pytest

from common.engine import Engine
from common.kernels import runtime
from common.scripts.start_up import KernelTimes, StartUp


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def kernel(times, seconds, hit):
    times(src=None, metadata={}, metadata_group={}, times=SimpleNamespace(total=seconds * 1e6), cache_hit=hit)


def test_every_second_once():
    clock, kernels = Clock(), KernelTimes()
    start = StartUp(97.5, clock=clock, kernels=kernels)  # 2.5 s of imports
    with start.part("weights"):
        clock.now += 4
    with start.part("graphs"):
        clock.now += 3
        kernel(kernels, 1.5, hit=False)
        kernel(kernels, 0.5, hit=True)
    with start.part("nothing"):
        pass
    line = start.ready()
    assert line == (
        "ready in 9.5 s: imports 2.5 s, weights 4.0 s, graphs 1.0 s, kernels (cold: 1 compiled, 1 from the cache) 2.0 s"
    )
    total, *parts = map(float, re.findall(r"([0-9.]+) s\b", line))
    assert total == sum(parts)
    assert start.first_token() == "no token was computed"
    clock.now += 0.5
    start.token()
    clock.now += 7
    start.token()
    assert start.first_token() == "first token 10.0 s after the command (cold: 1 compiled, 1 from the cache)"


def test_warm_and_without_kernels():
    clock, kernels = Clock(), KernelTimes()
    start = StartUp(99.0, clock=clock, kernels=kernels)
    assert start.ready() == "ready in 1.0 s: imports 1.0 s"
    start.token()
    assert start.first_token() == "first token 1.0 s after the command"
    kernel(kernels, 0.2, hit=True)
    assert "kernels (warm: 1 from the cache) 0.2 s" in start.ready()


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
def test_triton_takes_the_listener(monkeypatch):
    """The name that it is known by belongs to Triton: one that moves it must be noticed."""
    from triton import knobs

    monkeypatch.setattr(knobs.compilation, "listener", None)
    times = KernelTimes().listen()
    assert knobs.compilation.listener is times


@pytest.mark.parametrize("pages, steps", [(100, 2), (31, 2), (30, 0)])
def test_warming_up_reads_two_prompts_and_leaves_nothing(pages, steps, pretend_gpu):
    """26 pages of 4 for 102 tokens and 5 for 19: a pool that is too small for them stays cold."""
    engine = Engine(pretend_gpu[0], page_size=4, num_pages=pages, max_requests=9)
    launched, launch = [], engine.launch
    engine.launch = lambda chunks: launched.append([chunk[1:] for chunk in chunks]) or launch(chunks)
    engine.warm_up(5)
    assert launched == [] and engine.graphs._graphs == {}  # the device is a CPU: there is nothing to make ready
    engine._warm_kernels()
    assert launched == [[(0, 80), (0, 17)], [(17, 1), (80, 20)]][:steps]
    assert engine.num_free_pages == pages and len(engine._free_slots) == 9


def test_warming_up_a_gpu_captures_the_graphs_too(pretend_gpu, monkeypatch):
    model, _ = pretend_gpu
    engine, done = Engine(model, page_size=4, num_pages=40, max_requests=9), []
    engine.model = SimpleNamespace(config=model.config, device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    engine._warm_kernels = lambda: done.append("kernels")
    engine.graphs.capture = lambda size: done.append(f"graphs to {size}")
    engine.warm_up(5)
    engine.warm_up(20)
    assert done == ["kernels", "graphs to 5", "kernels", "graphs to 9"]

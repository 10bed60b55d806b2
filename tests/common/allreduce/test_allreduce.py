"""The fit, the sum check and the choice of all-reduces, without GPUs.

Catches: latency and bandwidth mixed up, a wrong sum that passes, an unknown link speed made up, the slower algorithm.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from common import plots, timing
from common.allreduce import profile as allreduce_profile
from common.allreduce import timing as allreduce_timing
from common.allreduce.plot import draw, fit, leaders, leaders_in_words, series
from common.errors import CheckFailed, UserError
from common.results import ResultFile
from common.tensor_parallel import collectives
from common.timing import summarise


def rows_of(alpha_s, bytes_per_s, sizes):
    return [{"bytes": size, "time_us": 1e6 * (alpha_s + size / bytes_per_s)} for size in sizes]


def test_ranks_replay_a_graph_equally_often(monkeypatch):
    """Each rank measures for itself how often a sample must repeat the graph. All must take rank 0's number, or one
    waits in a collective that the others have not launched. A fake device counts the replays."""
    replays = []

    class Graph:
        def replay(self):
            replays.append(1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(timing, "capture", lambda calls: (Graph(), 20))
    counts = []
    for own_s in (1e-3, 2e-4):  # two ranks that measured a replay differently
        replays.clear()
        monkeypatch.setattr(timing, "_event_seconds", lambda fn, device, own_s=own_s: fn() or own_s)
        world = SimpleNamespace(broadcast=lambda mine: 4, exchange=lambda mine: [mine])
        allreduce_timing.time_in_graph(world, lambda t: t, torch.zeros(4), repeats=5)
        counts.append(len(replays))
    assert counts[0] == counts[1] == 3 + 1 + 5 * 4


@pytest.mark.parametrize("alpha, beta", [(12e-6, 380e9), (400e-6, 1.1e9)])
def test_fit_finds_latency_and_bandwidth(alpha, beta):
    got = fit(rows_of(alpha, beta, [1 << e for e in range(10, 27)]))
    assert got == (pytest.approx(alpha, rel=1e-6), pytest.approx(beta, rel=1e-6))


def test_fit_needs_three_sizes_and_a_slope():
    assert fit(rows_of(1e-5, 1e9, [1024, 2048])) is None
    assert fit([{"bytes": size, "time_us": time} for size, time in ((1024, 30), (2048, 20), (4096, 10))]) is None


def timed(sizes_and_times):
    return [{"bytes": size, "time_us": time} for size, time in sizes_and_times.items()]


def test_the_lead_passes_to_who_is_clearly_faster_or_alone():
    found = {
        "near": timed({1024: 2.0, 2048: 3.0, 4096: 9.0}),
        "wide": timed({1024: 5.0, 2048: 2.97, 4096: 6.0, 8192: 12.0}),  # at 2048 faster by 1 %, which is no lead
        "late": timed({4096: 6.01, 8192: 11.0, 16384: 20.0}),
    }
    assert leaders(found) == [(1024, "near"), (4096, "wide"), (8192, "late")]
    words = ["near from 1 KiB", "wide from 4 KiB", "late from 8 KiB"]
    assert leaders_in_words(found) == words
    found["late"] = timed({16384: 20.0})
    assert leaders_in_words(found) == [*words[:2], "late from 16 KiB (alone)"]
    assert leaders_in_words({"only": found["near"]}) == []


def test_the_picture_names_fits_units_and_leads_beside_the_panels(tmp_path, monkeypatch):
    """Six series in four quarters: no legend on a panel, nothing named twice, every unit there."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda fig, path, footer: figures.append(fig) or path)
    columns = ("backend", "algorithm", "world", "batch_size", "bytes", "time_us", "time_us_p10", "time_us_p90")
    columns += ("algbw_gb_per_s", "busbw_gb_per_s")
    record = {"device": "cuda:0", "link_gb_per_s": 478.116}
    with ResultFile(tmp_path, "profile_allreduce", columns, record, key=["algorithm", "bytes", "batch_size"]) as file:
        for place in range(6):
            for batch, size in [(None, 1 << e) for e in range(10, 31)] + [(1, 8192), (8, 65536)]:
                time_us = (place + 1) * 2 + size / (1000 * (place + 1))
                rates = {"algbw_gb_per_s": size / time_us / 1e3, "busbw_gb_per_s": size / time_us / 1e3}
                times = {"time_us": time_us, "time_us_p10": time_us, "time_us_p90": time_us}
                file.append(backend="b", algorithm=f"a{place}", world=2, batch_size=batch, bytes=size, **times, **rates)
    draw(file.path)
    *panels, key = figures[0].axes
    assert [ax.get_legend_handles_labels()[1] for ax in panels] == [[], [], []]
    texts = [text.get_text() for text in key.get_legend().get_texts()]
    assert len(texts) == 8 and texts[0] == "b a0: 2 µs + bytes / 1 GB/s"
    assert texts[6] == "NVLink, one direction: 478.1 GB/s"
    assert texts[7].splitlines()[:2] == ["the lead changes hands; fastest:", "b a0 from 1 KiB"]
    assert len([line for line in panels[0].lines if line.get_marker() == "*"]) == len(texts[7].splitlines()) - 2


def test_series_keeps_plain_sizes_and_batches_apart():
    rows = [
        {"backend": "gloo", "algorithm": "eager", "batch_size": batch, "bytes": size}
        for batch, size in ((None, 2048), (1, 16384), (None, 1024))
    ]
    assert [row["bytes"] for row in series(rows)["gloo eager"]] == [1024, 2048]
    assert [row["bytes"] for row in series(rows, by_batch=True)["gloo eager"]] == [16384]


class OneOfThree:
    """A world of three ranks seen from rank 1; the others report what this one does."""

    rank, size, device = 1, 3, torch.device("cpu")

    def exchange(self, value):
        return [value] * 3

    def broadcast(self, value):
        return value


def true_sum(x):
    index = torch.arange(len(x))
    return sum((index + 7 * rank) % 5 + rank % 3 for rank in range(3)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_sums_are_found(dtype):
    def variant(all_reduce):
        return allreduce_profile.Variant("gloo", "eager", all_reduce, None, 1 << 20, 1)

    allreduce_profile.check_sum(OneOfThree(), variant(true_sum), 4096, dtype)

    def one_rank_forgotten(x):
        return true_sum(x) - x

    def last_element_wrong(x):
        out = true_sum(x)
        out[-1] += 1
        return out

    for wrong in (one_rank_forgotten, last_element_wrong, lambda x: x):
        with pytest.raises(CheckFailed, match="wrong sums"):
            allreduce_profile.check_sum(OneOfThree(), variant(wrong), 4096, dtype)


STATUS = """GPU 0: NVIDIA H200 (UUID: GPU-0)
    Link 0: 26.562 GB/s
    Link 1: 26.562 GB/s
    Link 2: <inactive>
"""


def test_link_speed_is_the_sum_of_active_links():
    assert allreduce_profile.parse_nvlink_status(STATUS) == pytest.approx(53.124)
    assert allreduce_profile.parse_nvlink_status("Unable to retrieve NVLink information") is None
    assert allreduce_profile.parse_nvlink_status("") is None


LARGE = 1 << 20


@pytest.mark.parametrize(
    "insist, expected",
    [
        (False, {4096: "low_latency", LARGE: "library", 2 * LARGE: "library"}),
        (True, {4096: "low_latency", LARGE: "two_shot", 2 * LARGE: "library"}),
    ],
)
def test_the_fastest_algorithm_is_chosen_by_size(insist, expected, monkeypatch):
    """Times made up: low_latency wins small but does not take the large, which the library wins; `insist` leaves that
    out wherever there is another."""
    micros = {
        "one_shot": {4096: 6, LARGE: 30},
        "two_shot": {4096: 9, LARGE: 20},
        "low_latency": {4096: 3},
        "library": {4096: 10, LARGE: 17, 2 * LARGE: 30},
    }

    def fake_time(world, all_reduce, x, *, repeats):
        return summarise([micros[all_reduce(x)][x.nbytes] * 1e-6])

    def algorithms(num_bytes):
        def named(name):
            def all_reduce(x, residual):
                assert residual.shape == x.shape and residual is not x  # timed as linear_add uses it
                return name

            return all_reduce

        return {name: named(name) for name, times in micros.items() if num_bytes in times}

    monkeypatch.setattr(allreduce_timing, "time_in_graph", fake_time)
    parallel = SimpleNamespace(symmetric=True, dtype=torch.float32, algorithm_of={}, algorithms=algorithms)
    lines = allreduce_timing.choose_algorithms(parallel, OneOfThree(), [1, 256, 512], 1024, insist=insist)
    assert parallel.algorithm_of == expected
    assert len(lines) == 3 and "using low_latency" in lines[0]


@pytest.mark.parametrize("problems", [[None, None], ["no Triton", None], [None, "no peers"]])
def test_a_rank_without_it_decides_for_all(problems, monkeypatch):
    """A rank whose peers cannot have symmetric memory, or not our kernels, must not set it up and wait for them."""

    class World(OneOfThree):
        leave_at_once = False

        def exchange(self, value):
            other = problems[::-1] if isinstance(value, list) else None
            return [value, {"push": 7, "low_latency": 99} if isinstance(value, dict) else other]

    made = []
    memory = SimpleNamespace(pusher=SimpleNamespace(max_bytes={"push": 8, "low_latency": 9}))
    monkeypatch.setattr(collectives, "why_unavailable", lambda device: None)
    monkeypatch.setattr(collectives.push_all_reduce, "why_unavailable", lambda device, dtype: None)
    monkeypatch.setattr(collectives, "SymmetricMemory", lambda *args, pushes: made.append(pushes) or memory)
    world = World()
    world.group = None
    symmetric, problem, no_push = collectives.make_symmetric(world, torch.float32, 1 << 20)
    no_peers, no_triton = problems[::-1]
    assert (problem, no_push) == (no_peers, no_triton)
    assert made == ([] if no_peers else [no_triton is None])
    assert (symmetric, world.leave_at_once) == ((None, False) if no_peers else (memory, True))
    # The other rank has fewer multiprocessors: what one takes, all must take.
    assert memory.pusher.max_bytes["push"] == (8 if no_peers else 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_s_all_reduces_are_asked_for_what_they_sum(dtype):
    """They raise for float16, in the middle of a run on a GPU from before bfloat16."""
    memory = object.__new__(collectives.SymmetricMemory)
    memory.buffer, memory.size = torch.empty(1024, dtype=dtype), 2
    memory.pusher = SimpleNamespace(NAMES=("push",), fits=lambda name, num_bytes: True, push="push")
    torch_s = [] if dtype == torch.float16 else ["one_shot", "two_shot"]
    assert list(memory.algorithms(512)) == [*torch_s, "push"]
    assert list(memory.algorithms(520)) == ["push"]  # no whole 16-byte pieces for both


def test_symmetric_memory_is_refused_by_name_on_a_cpu():
    assert "GPU" in collectives.why_unavailable(torch.device("cpu"))
    for choice in ("nccl", "symm"):
        with pytest.raises(UserError, match=f"--allreduce {choice}: needs GPUs"):
            collectives.make_tensor_parallel(OneOfThree(), torch.float32, choice)

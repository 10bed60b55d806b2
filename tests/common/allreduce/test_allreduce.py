"""The fit, the sum check and the choice of all-reduces, without GPUs.

Catches: latency and bandwidth mixed up, a wrong sum that passes, an unknown link speed made up, the slower algorithm.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from common import timing
from common.allreduce import profile as allreduce_profile
from common.allreduce import timing as allreduce_timing
from common.allreduce.plot import fit, series
from common.errors import CheckFailed, UserError
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


@pytest.mark.parametrize(
    "insist, expected",
    [(False, {4096: "one_shot", 1 << 20: "library"}), (True, {4096: "one_shot", 1 << 20: "two_shot"})],
)
def test_the_fastest_algorithm_is_chosen_by_size(insist, expected, monkeypatch):
    """Times made up: one_shot wins small, the library large; `insist` leaves the library out."""
    micros = {
        "one_shot": {4096: 6, 1 << 20: 30},
        "two_shot": {4096: 9, 1 << 20: 20},
        "library": {4096: 10, 1 << 20: 17},
    }

    def fake_time(world, all_reduce, x, *, repeats):
        return summarise([micros[all_reduce(x)][x.nbytes] * 1e-6])

    monkeypatch.setattr(allreduce_timing, "time_in_graph", fake_time)
    monkeypatch.setattr(allreduce_timing, "_library", lambda x, parallel: "library")
    symmetric = SimpleNamespace(
        one_shot=lambda x: "one_shot", two_shot=lambda x: "two_shot", fits=lambda n: n < 1 << 21
    )
    parallel = SimpleNamespace(symmetric=symmetric, dtype=torch.float32, algorithm_of={})
    lines = allreduce_timing.choose_algorithms(parallel, OneOfThree(), [1, 256], 1024, insist=insist)
    assert parallel.algorithm_of == expected
    assert len(lines) == 2 and "using one_shot" in lines[0]


def test_symmetric_memory_is_refused_by_name_on_a_cpu():
    assert "GPU" in collectives.why_unavailable(torch.device("cpu"))
    for choice in ("nccl", "symm"):
        with pytest.raises(UserError, match=f"--allreduce {choice}: needs GPUs"):
            collectives.make_tensor_parallel(OneOfThree(), torch.float32, choice)

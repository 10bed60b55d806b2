"""Measuring: right before timed, a row for whatever happens, the gate, and what the rows are made to say."""

import argparse
import dataclasses

import pytest
import torch

from common import roofline, timing
from common.attention_bench import measure as attention_bench
from common.attention_bench import report as attention_report
from common.attention_bench import sweep as attention_sweep
from common.attention_bench.backends.base import Backend, PrefillCase, Prepared, Unsupported
from common.attention_bench.backends.torch_sdpa import BACKENDS as TORCH
from common.attention_bench.measure import FAILED, OK, OUT_OF_MEMORY, UNSUPPORTED, WRONG
from common.attention_bench.options import Heads
from common.errors import CheckFailed, UserError
from common.roofline import Ceilings

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 16)
CEILINGS = Ceilings("a CPU", "cpu", 20.0, 20.0, 1 << 20, {"float32": {"burst": 0.1, "sustained": 0.09}})
FLASH = next(b for b in TORCH if b.name == "torch-flash")


class Faked(Backend):
    """torch-flash, with its output or its behaviour changed."""

    def __init__(self, name, change=lambda out: out, ours=False):
        self.name, self.change, self.ours = name, change, ours

    def prepare(self, case):
        bind = FLASH.prepare(case).bind
        return Prepared(lambda x: lambda: self.change(bind(x)()))


def raises(error):
    def change(out):
        raise error

    return change


def bench(phase="prefill", device_type="cpu", **fields):
    args = argparse.Namespace(seed=0, repeats=2, warmup=0, resume=False, no_plot=True)
    ceilings = fields.pop("ceilings", CEILINGS)
    return attention_bench.Bench(
        args, phase, None, CPU, torch.float32, set(), {"tiny": HEADS}, list(fields.get("backends", [])), {}, ceilings
    )


CASE = PrefillCase(HEADS, (12, 12), (12, 12), torch.float32, CPU)


def test_a_right_backend_is_timed_and_its_rates_follow_from_the_time():
    row = attention_bench.measure_case(bench(), CASE, [FLASH])["torch-flash"]
    assert row["status"] == OK and row["error"] < 1e-5 and row["form"] == "launch"
    assert row["time_us_p10"] <= row["time_us"] <= row["time_us_p90"]
    assert row["tflops"] * row["time_us"] == pytest.approx(CASE.flops / 1e6)
    assert row["gb_per_s"] * row["time_us"] == pytest.approx(CASE.num_bytes / 1e3)
    assert row["percent_of_peak"] == pytest.approx(100 * row["tflops"] / 0.1)
    assert row["flop_per_byte"] == CASE.flops / CASE.num_bytes


def test_every_way_to_fail_gives_a_row_and_the_others_go_on():
    backends = [
        Faked("shifted", lambda out: out + 1e-2),
        Faked("nan", lambda out: out * torch.nan),
        Faked("refuses", raises(Unsupported("no such head"))),
        Faked("library", raises(RuntimeError("kernel not found\nsecond line"))),
        Faked("mine", raises(ValueError("oops")), ours=True),
        Faked("full", raises(torch.OutOfMemoryError("CUDA out of memory"))),
        Faked("right"),
    ]
    rows = attention_bench.measure_case(bench(), CASE, backends)
    assert {name: row["status"] for name, row in rows.items()} == {
        "shifted": WRONG,
        "nan": WRONG,
        "refuses": UNSUPPORTED,
        "library": UNSUPPORTED,
        "mine": FAILED,
        "full": OUT_OF_MEMORY,
        "right": OK,
    }
    assert rows["library"]["note"] == "kernel not found" and rows["refuses"]["note"] == "no such head"
    assert all(rows[name]["time_us"] is None for name in rows if name != "right")


def test_a_backend_that_would_not_fit_is_not_run(monkeypatch):
    hungry = Faked("hungry", raises(AssertionError("was run")))
    monkeypatch.setattr(hungry, "workspace_bytes", lambda case: 1 << 60, raising=False)
    row = attention_bench.measure_case(bench(), CASE, [hungry])["hungry"]
    assert row["status"] == OUT_OF_MEMORY and "workspace" in row["note"]


def test_inputs_that_would_not_fit_are_rows_in_a_sweep_and_an_error_where_typed(monkeypatch):
    monkeypatch.setattr(attention_bench, "free_bytes", lambda device: 1000)
    rows = attention_bench.measure_case(bench(), CASE, [FLASH, Faked("other")])
    assert {row["status"] for row in rows.values()} == {OUT_OF_MEMORY}
    with pytest.raises(UserError, match="--seq-lens: batch 2 with 12 tokens"):
        attention_bench.check_memory(bench(), [CASE], "--seq-lens")


def test_the_gate_measures_again_with_the_ceiling_and_marks_what_stays(monkeypatch):
    calls = {"timed": 0, "ceilings": 0}

    def too_fast(fns, **_):
        calls["timed"] += 1
        return {name: timing.Timing(1e-9, 1e-9, 1e-9, (1e-9,)) for name in fns}

    def fresh(device, dtype, fresh=False):
        assert fresh
        calls["ceilings"] += 1
        return CEILINGS

    monkeypatch.setattr(timing, "interleaved", too_fast)
    monkeypatch.setattr(roofline, "ceilings", fresh)
    row = attention_bench.measure_case(bench(), CASE, [FLASH])["torch-flash"]
    assert row["suspect"] is True and row["status"] == OK
    assert calls == {"timed": 3, "ceilings": 1}, "launches, the figure, and the figure again"
    rows = [{**row, "backend": "torch-flash"}]
    with pytest.raises(CheckFailed, match="105 %"):
        attention_sweep._verdict(argparse.Namespace(device=torch.device("cuda")), rows)
    attention_sweep._verdict(argparse.Namespace(device=CPU), rows)  # a note: ceilings of a CPU wander


def test_a_figure_that_was_a_hiccup_is_not_suspect(monkeypatch):
    seconds = iter([1e-3, 1e-9, 1.0])

    def first_too_fast(fns, **_):
        value = next(seconds)
        return {name: timing.Timing(value, value, value, (value,)) for name in fns}

    monkeypatch.setattr(timing, "interleaved", first_too_fast)
    monkeypatch.setattr(roofline, "ceilings", lambda device, dtype, fresh: CEILINGS)
    row = attention_bench.measure_case(bench(), CASE, [FLASH])["torch-flash"]
    assert not row["suspect"] and row["time_us"] == 1e6


@pytest.mark.parametrize("status", [WRONG, FAILED])
def test_wrong_outputs_end_in_a_failed_check(status):
    rows = [{"status": OK, "backend": "a", "note": None}, {"status": status, "backend": "b", "note": "why"}]
    with pytest.raises(CheckFailed, match=f"1 of 2 points {status}: b \\(why\\)"):
        attention_sweep._verdict(argparse.Namespace(device=CPU), rows)


# --- the path of a GPU, walked on a CPU -------------------------------------------------------------------------------
@pytest.fixture
def as_if_cuda(monkeypatch):
    """A bench whose device says cuda while its tensors are on the CPU; graphs hold 20 calls and run them."""
    monkeypatch.setattr(attention_bench, "free_bytes", lambda device: 1 << 34)
    monkeypatch.setattr(timing, "_is_cuda", lambda device: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    made = bench(ceilings=dataclasses.replace(CEILINGS, device_type="cuda", tflops={"float32": {"burst": 1e9}}))
    made.device = torch.device("cuda")

    def graph_sample(calls):
        rounds = -(-20 // len(calls))

        def replay():
            for call in [*calls] * rounds:
                call()

        return replay, rounds * len(calls)

    monkeypatch.setattr(timing, "graph_sample", graph_sample)
    return made


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so, and a microsecond whenever somebody looks."""
    now = {"s": 0.0}

    def read():
        now["s"] += 1e-6
        return now["s"]

    monkeypatch.setattr(timing.time, "perf_counter", read)
    return now


def test_a_call_s_time_is_a_share_of_the_graph_s(as_if_cuda, clock):
    def takes_a_millisecond(out):
        clock["s"] += 1e-3
        return out

    row = attention_bench.measure_case(as_if_cuda, CASE, [Faked("a", takes_a_millisecond)])["a"]
    assert row["form"] == "graph" and row["status"] == OK
    assert row["time_us"] == pytest.approx(1e3, rel=0.01) and row["launch_us"] == pytest.approx(1e3, rel=0.01)


def test_what_cannot_be_captured_is_timed_by_launches_and_says_so(as_if_cuda, monkeypatch):
    def refuse(calls):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(timing, "graph_sample", refuse)
    row = attention_bench.measure_case(as_if_cuda, CASE, [Faked("a")])["a"]
    assert (row["status"], row["form"]) == (OK, "launch") and row["note"].startswith("not captured: operation not")

    def full(calls):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "graph_sample", full)
    row = attention_bench.measure_case(as_if_cuda, CASE, [Faked("a")])["a"]
    assert row["status"] == OUT_OF_MEMORY and row["time_us"] is None


class Compiling(Faked):
    """Takes 30 seconds longer to prepare on the occasions that are counted in `slow`; may fail after that."""

    def __init__(self, clock, slow=(0,), error=None):
        super().__init__("compiling")
        self.clock, self.slow, self.error, self.count = clock, slow, error, 0

    def prepare(self, case):
        self.clock["s"] += 30.1 if self.count in self.slow else 0.1
        self.count += 1
        if self.error is not None:
            raise self.error
        return super().prepare(case)


def test_compilation_is_told_from_the_call_whenever_it_happens(as_if_cuda, clock):
    backend = Compiling(clock, slow=(0, 3))  # a first point prepares twice, to tell; others once unless they were slow
    found = [attention_bench.measure_case(as_if_cuda, CASE, [backend])["compiling"]["jit_s"] for _ in range(4)]
    assert found == [pytest.approx(30, rel=0.01), None, pytest.approx(30, rel=0.01), None] and backend.count == 6
    rows = [{"backend": "a", "jit_s": 29.6}, {"backend": "b", "jit_s": None}, {"backend": "c", "jit_s": 0.1}]
    assert attention_report.compile_times(rows) == "compiled first, not part of any time: a 30 s"
    assert attention_report.compile_times(rows[1:]) == ""


def test_what_compiles_in_vain_is_not_compiled_again_at_every_size(as_if_cuda, clock):
    backend = Compiling(clock, error=RuntimeError("ninja: build stopped"))
    rows = [attention_bench.measure_case(as_if_cuda, CASE, [backend])["compiling"] for _ in range(3)]
    assert backend.count == 1 and {row["status"] for row in rows} == {UNSUPPORTED}
    assert rows[2]["note"] == "ninja: build stopped (not tried again: it failed after 30 s)"
    quick = Compiling(clock, slow=(), error=RuntimeError("batch 1 only"))
    for _ in range(3):
        assert attention_bench.measure_case(bench(), CASE, [quick])["compiling"]["note"] == "batch 1 only"
    assert quick.count == 3, "another size may do"


# --- what the rows say -----------------------------------------------------------------------------------------------
def line(backend, *values, config="c", status="ok"):
    return [
        {
            "config": config,
            "backend": backend,
            "n": 2**i,
            "rate": value,
            "status": "ok" if value else "unsupported",
            "note": None if value else "page size",
            "percent_of_peak": value,
            "in_cache": 0,
            "suspect": 0,
        }
        for i, value in enumerate(values)
    ]


def test_crossovers_lie_where_the_lines_cross():
    rows = line("a", 4, 4, 4, 4) + line("b", 2, 2, 6, 6)
    assert attention_report.crossovers(rows, "n", "rate") == [(2**1.5, 4.0, "a", "b")]
    assert attention_report.leaders_text(rows, "n", "rate") == "fastest: a to ~2.8, then b"
    assert attention_report.crossovers(line("a", 1, 2) + line("b", 1.5, 3), "n", "rate") == []


def test_a_leader_that_begins_or_ends_crosses_at_its_first_size():
    rows = line("a", 4, 4, None) + line("b", 2, 2, 3)
    assert attention_report.crossovers(rows, "n", "rate") == [(4, 3, "a", "b")]


def test_a_suspect_figure_wins_nothing():
    rows = line("a", 4, 4) + line("b", 2, 9)
    rows[-1]["suspect"] = 1
    assert [best["backend"] for best, _ in attention_report.winners(rows, "n", "rate")] == ["a", "a"]
    assert attention_report.crossovers(rows, "n", "rate") == []


def test_conclusion_names_the_winner_and_its_lead():
    (text,) = attention_report.conclusion(line("a", 1, 6) + line("b", 2, 3), "n", "rate", "GB/s")
    assert text == "c: fastest: b to ~1.2, then a; at n 2 a gives 6 GB/s, 6 % of the ceiling, 2.00 times b"
    assert attention_report.conclusion(line("a", None), "n", "rate", "GB/s") == ["c: nothing could be measured"]


def test_notes_name_what_has_no_point():
    rows = line("a", None, 2) + line("b", None, None) + line("c", None, None)
    missing = {"x": "not installed: pip install x", "y": "needs a CUDA device", "z": "needs a CUDA device"}
    assert attention_report.notes(rows, "n", missing) == [
        "without x: not installed: pip install x",
        "without y, z: needs a CUDA device",
        "a unsupported at 1: page size",
        "b, c unsupported: page size",
    ]

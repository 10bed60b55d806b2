"""Timing, without a GPU: the worker over libraries that stand in for built files, on CPU tensors; what the grader makes
of its figures; the bench that goes on after a failure."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from common.errors import CheckFailed, UserError
from common.grading import bench_solutions, build, gpu, scorecard
from common.grading.lab import get
from common.grading.outcome import Outcome, Report

torch = pytest.importorskip("torch")
from common.grading import speed_worker  # noqa: E402

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

# What harness/timing.cu and a CUDA device do, for host memory: a call that is captured runs when the graph is launched.
FAKE = r"""
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>
static bool capturing, refuses = %(refuses)s;
static std::vector<std::function<void()>> graph;
static void launch(std::function<void()> f) { if (capturing) graph.push_back(f); else f(); }
extern "C" void tlab_copy(const float *a, float *b, size_t n, int) { launch([=] { memcpy(b, a, 4 * n); }); }
extern "C" const char *tlab_error(int) { return "an error"; }
extern "C" int tlab_synchronize() { return 0; }
extern "C" int tlab_graph_begin() { capturing = true; graph.clear(); return 0; }
extern "C" int tlab_graph_end(void **e) { capturing = false; *e = &graph; return refuses; }
extern "C" int tlab_graph_launch(void *) { for (auto &f : graph) f(); return 0; }
void silu(float *input, float *output, int n) { %(body)s }
"""
RIGHT = "launch([=] { for (int i = 0; i < n; ++i) output[i] = input[i] / (1 + std::exp(-input[i])); });"
OWN_STREAM = RIGHT.replace("launch([=] {", "([=] {").replace("});", "})();")  # the capture does not see it
ONCE_A_BUFFER = "static std::vector<float *> seen; for (float *s : seen) if (s == input) return; seen.push_back(input);"
CHANGES_INPUT = RIGHT[:-4] + "; input[0] = 1; });"


@pytest.fixture
def on_cpu(monkeypatch):
    """The worker's measurements at a small size on CPU tensors, in milliseconds instead of minutes."""
    monkeypatch.setattr(speed_worker, "DEVICE", "cpu")
    monkeypatch.setattr(speed_worker, "TIMED", speed_worker.TIMED | {"silu/CUDA": ("_Z4siluPfS_i", (1 << 10,))})
    monkeypatch.setattr(speed_worker, "ROUNDS", 3)
    monkeypatch.setattr(speed_worker, "SINGLES", 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: type("Properties", (), {"L2_cache_size": 1 << 16})
    )


def library(folder: Path, body: str, refuses: str = "false") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "fake.cpp").write_text(FAKE % {"body": body, "refuses": refuses})
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", "fake.so", "fake.cpp"], cwd=folder, check=True)
    return str(folder / "fake.so")


def job(files: dict[str, str], **more) -> dict:
    base = {"lab": "silu/CUDA", "files": files, "library": next(iter(files.values())), "peers": False, "graph": True}
    return base | more


@needs_compiler
def test_worker_times_in_a_graph_and_without_where_it_must(on_cpu, tmp_path):
    files = {
        "captured": library(tmp_path / "a", RIGHT),
        "refused": library(tmp_path / "b", RIGHT, refuses="true"),
        "own stream": library(tmp_path / "c", OWN_STREAM),
    }
    result = speed_worker.time_on_device(torch, job(files))
    assert not result["wrong"] and result["bytes"] == 8 * 1024
    rows = result["rows"]
    forms = {name: rows[name]["form"] for name in rows}
    assert forms == {"copy": "graph", "captured": "graph", "refused": "events", "own stream": "events"}
    both = re.findall(r"([\d.]+) us", rows["copy"]["note"])
    assert all(name in rows["copy"]["note"] for name in speed_worker.COPIES)
    assert min(map(float, both)) == pytest.approx(rows["copy"]["time_us"], abs=0.01) and len(both) == 2
    assert all(0 < row["time_us_p10"] <= row["time_us"] <= row["time_us_p90"] for row in rows.values())
    without = speed_worker.time_on_device(torch, job({"captured": files["captured"]}, graph=False))
    assert without["rows"]["captured"]["form"] == "events"


@needs_compiler
@pytest.mark.parametrize(
    "body, said", [(ONCE_A_BUFFER + RIGHT, "wrong among the timed calls"), (CHANGES_INPUT, "change their inputs")]
)
def test_worker_tells_a_call_that_is_right_only_once(on_cpu, tmp_path, body, said):
    files = {"good": library(tmp_path / "a", RIGHT), "bad": library(tmp_path / "b", body)}
    result = speed_worker.time_on_device(torch, job(files))
    assert set(result["rows"]) == {"copy", "good"} and said in result["wrong"]["bad"]


def measured(time_us: float, copy_us: float = 100.0, **more) -> dict:
    row = {"time_us_p10": 1.0, "time_us_p90": 2.0, "single_launch_us": 9.0, "form": "graph"}
    rows = {"yours": row | {"time_us": time_us}, "copy": row | {"time_us": copy_us}, "torch": row | {"time_us": 200.0}}
    base = {"bytes": 1_000_000, "rows": rows, "left_out": {"Liger": "not installed"}, "wrong": {}, "device": "a GPU"}
    return base | more


@pytest.mark.parametrize(
    "figures, outcome, points",
    [
        (measured(100.0), Outcome.CORRECT, 20.0),
        (measured(90.0), Outcome.SUSPECT, 0.0),
        (measured(1000.0), Outcome.CORRECT_BUT_SLOW, 20 * 0.1 / 0.9),
        (measured(100.0, wrong={"yours": "wrong among the timed calls"}), Outcome.WRONG, 0.0),
    ],
)
def test_speed_gives_outcome_points_and_lines(monkeypatch, tmp_path, capsys, figures, outcome, points):
    monkeypatch.setattr(gpu, "run_worker", lambda *a, **k: figures)
    monkeypatch.setattr(gpu, "draw", lambda *a: tmp_path / "speed.png")
    report = Report("silu/CUDA", "silu.cu", Outcome.CORRECT, points={"shapes": (80.0, 80.0)})
    gpu.measure_speed(get("silu/CUDA"), Path("x.so"), report, tmp_path)
    assert report.outcome is outcome and report.points["speed"] == (pytest.approx(points), 20.0)
    scorecard.show(report)
    shown = " ".join(capsys.readouterr().out.split())
    if outcome is not Outcome.WRONG:
        assert "in a CUDA graph" in shown and "torch: 5 GB/s" in shown and "Liger: not timed, not installed" in shown
        assert "100.0 us" in shown or "90.0 us" in shown or "1000.0 us" in shown


def test_a_worker_that_fails_is_tried_without_graphs_then_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "timing_library", lambda work: tmp_path / "timing.so")
    monkeypatch.setattr(build, "nvcc", lambda: "nvcc")
    script = tmp_path / "worker.py"
    monkeypatch.setattr(gpu, "WORKER", script)
    script.write_text(
        'import json, sys\njob = json.load(open(sys.argv[1]))\nprint(\'{"not": "the result"}\')\n'
        "if job['graph']: sys.exit('cannot be captured')\nopen(sys.argv[2], 'w').write(json.dumps({'graph': False}))\n"
    )
    assert gpu.run_worker(get("silu/CUDA"), {"yours": tmp_path / "a.so"}, tmp_path) == {"graph": False}
    script.write_text("raise SystemExit('no device')\n")
    with pytest.raises(UserError, match="no device"):
        gpu.run_worker(get("silu/CUDA"), {"yours": tmp_path / "a.so"}, tmp_path)


@pytest.fixture
def pretend_gpu(monkeypatch, tmp_path):
    """A bench whose solutions build at once and whose worker gives figures; `failing` names what does not."""
    failing: set[str] = set()

    def worker(lab, files, work, *, peers=True):
        if failing & set(files) and len(files) > 1 or failing >= set(files):
            raise UserError("timing failed: an illegal memory access")
        rows = {n: measured(100.0)["rows"]["copy"] | {"time_us": 100.0 + i} for i, n in enumerate(files)}
        if lab.name != "host_GPU":
            rows |= {"copy": rows[next(iter(files))] | {"note": "the faster of two"}} | (
                {"torch": rows[next(iter(files))]} if peers else {}
            )
        left_out = {"Liger": "not installed"} if peers else {}
        return {"bytes": 1 << 27, "rows": rows, "left_out": left_out, "wrong": {}, "device": "a GPU"}

    monkeypatch.setattr(gpu, "present", lambda need_nvcc=True: True)
    monkeypatch.setattr(gpu, "run_worker", worker)
    monkeypatch.setattr(build, "gpu_flags", lambda: ("nvcc", "-arch=sm_90"))
    monkeypatch.setattr(bench_solutions, "nvcc_version", lambda: "13.0")
    monkeypatch.setattr(build, "build_for_timing", lambda lab, source, work: tmp_path / "x.so")
    correct = Report("", "", Outcome.CORRECT)
    monkeypatch.setattr(bench_solutions, "grade", lambda lab, path, options: correct)
    monkeypatch.setattr(bench_solutions, "measure_transfers", lambda out, work: None)
    return failing


def bench(out: Path, *more: str) -> list[dict]:
    bench_solutions.main(bench_solutions.build_parser().parse_args(["--out", str(out), *more]))
    return list(csv.DictReader((out / "solutions.csv").open()))


def test_bench_writes_one_csv_one_picture_and_provenance(pretend_gpu, tmp_path, capsys):
    rows = bench(tmp_path / "out")
    labs = {row["lab"] for row in rows}
    assert len(labs) == 5 and sum(row["kind"] == "solution" for row in rows) >= 16
    assert {row["name"] for row in rows if row["lab"] == "silu"} >= {"copy", "torch", "Liger", "3_vectors"}
    assert all(row["note"] == "the faster of two" for row in rows if row["kind"] == "copy")
    assert (tmp_path / "out" / "solutions.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "solutions.json").read_text())["nvcc"] == "13.0"
    said = capsys.readouterr().out
    assert "silu/CUDA: 1_naive is best, 100 % of the copy: reaches the mark (at least 95 % of the copy)" in said
    assert "host_GPU: 1_copy_each is best, 100 us: MISSES the mark (at most 60 us)" in said


def test_bench_goes_on_after_a_failure_and_says_so(pretend_gpu, tmp_path, capsys, monkeypatch):
    pretend_gpu |= {"2_in_flight"}
    monkeypatch.setattr(bench_solutions, "measure_transfers", lambda out, work: (_ for _ in ()).throw(UserError("bus")))
    with pytest.raises(CheckFailed, match="3 of the measurements failed"):  # in both SiLU labs; and the transfers
        bench(tmp_path / "out")
    rows = {(r["lab"], r["name"]): r for r in csv.DictReader((tmp_path / "out" / "solutions.csv").open())}
    assert rows["silu", "2_in_flight"]["outcome"] == "not timed" and "illegal" in rows["silu", "2_in_flight"]["note"]
    assert rows["silu", "3_vectors"]["time_us"] and rows["host_GPU", "4_spread"]["time_us"]
    assert "failed: transfers: bus" in capsys.readouterr().err


def test_without_a_gpu_the_bench_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "present", lambda need_nvcc=True: False)
    with pytest.raises(UserError, match="GPU and nvcc"):
        bench_solutions.main(bench_solutions.build_parser().parse_args([]))


def test_a_hidden_gpu_is_not_used(monkeypatch):
    monkeypatch.setattr(build, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    done = subprocess.CompletedProcess([], 0, "GPU 0: NVIDIA H200\n", "")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: done)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu.present()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not gpu.present()

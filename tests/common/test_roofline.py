"""Ceilings: bytes and operations counted right, kept for a day and no longer, and held against figures."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import cli, machine, results, roofline
from common import roofline_measure as on
from common.errors import CheckFailed, UserError
from common.roofline import Ceilings

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SOME = Ceilings("a card", "cuda", 4000.0, 4500.0, 50 << 20, {"float32": {"burst": 60.0, "sustained": 50.0}})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def faked(monkeypatch):
    """Measuring replaced by figures that count how often they were asked for."""
    asked = {"memory": 0, "float32": 0, "bfloat16": 0}

    def memory(device, *, quick):
        asked["memory"] += 1
        return [("copy", "a", 10.0), ("copy", "b", 12.0), ("read", "c", 20.0), ("read", "d", 15.0)]

    def products(device, dtype, *, quick):
        asked[dtype] += 1
        yield "square 64", (64, 64, 64), 1.0
        yield "linear 128", (128, 128, 128), 3.0
        yield "square 256", (256, 256, 256), 2.0

    def sustained(device, dtype, name, shape, *, quick):
        assert (name, shape) == ("linear 128", (128, 128, 128)), "the best product is the one that is sustained"
        return 2.5

    monkeypatch.setattr(on, "memory", memory)
    monkeypatch.setattr(on, "products", products)
    monkeypatch.setattr(on, "sustained_product", sustained)
    return asked


# --- what is kept ----------------------------------------------------------------------------------------------------
def test_ceilings_are_the_best_of_each_kind_and_are_measured_once(faked):
    found = roofline.ceilings("cpu", torch.float32)
    assert (found.copy_gb_per_s, found.read_gb_per_s, found.device_type) == (12.0, 20.0, "cpu")
    assert found.tflops == {"float32": {"burst": 3.0, "sustained": 2.5}}
    first = dict(faked)
    assert roofline.ceilings(CPU, "float32") == found and faked == first, "reused"
    both = roofline.ceilings("cpu", torch.bfloat16)
    assert set(both.tflops) == {"float32", "bfloat16"}
    assert faked == first | {"bfloat16": 1}, "another dtype measures its products only"
    roofline.ceilings("cpu", "float32", fresh=True)
    assert faked["float32"] == first["float32"] + 1


def stored() -> Path:
    (path,) = (Path(os.environ["TLAB_CACHE"])).glob("ceilings-cpu-*.json")
    return path


@pytest.mark.parametrize(("age_s", "reused"), [(3600, True), (23.9 * 3600, True), (24.1 * 3600, False), (-60, False)])
def test_kept_for_a_day(faked, age_s, reused):
    roofline.ceilings("cpu", "float32")
    record = json.loads(stored().read_text())
    stored().write_text(json.dumps(record | {"unix_time": time.time() - age_s}))
    roofline.ceilings("cpu", "float32")
    assert faked["float32"] == (1 if reused else 2)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"unix_time": 1e99}', '{"unix_time": "x"}', "nonsense", "wrong"])
def test_a_damaged_cache_is_measured_again(faked, content):
    found = roofline.ceilings("cpu", "float32")
    if content == "nonsense":
        content = json.dumps(json.loads(stored().read_text()) | {"read_gb_per_s": -1})
    elif content == "wrong":
        content = json.dumps(json.loads(stored().read_text()) | {"tflops": {"float32": 3}})
    stored().write_text(content)
    again = roofline.ceilings("cpu", "float32")
    assert again == replace(found, utc_time=again.utc_time) and faked["float32"] == 2


def test_another_number_of_threads_is_another_machine(faked):
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            roofline.ceilings("cpu", "float32")
    finally:
        torch.set_num_threads(threads)
    assert faked["float32"] == 2 and len(list(Path(os.environ["TLAB_CACHE"]).iterdir())) == 2


def test_a_cache_folder_that_cannot_be_written_only_costs_time(faked, monkeypatch):
    monkeypatch.setenv("TLAB_CACHE", "/proc/nowhere")
    assert roofline.ceilings("cpu", "float32") and roofline.ceilings("cpu", "float32")
    assert faked["float32"] == 2


def test_a_missing_card_is_the_users_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device is visible"):
        roofline.ceilings("cuda", "float32")


# --- what they are used for ------------------------------------------------------------------------------------------
def test_which_ceiling_holds_for_which_work():
    assert SOME.memory_gb_per_s("read") == 4500 and SOME.memory_gb_per_s("copy") == 4000
    cpu = replace(SOME, device_type="cpu", copy_gb_per_s=30.0, read_gb_per_s=20.0)
    assert cpu.memory_gb_per_s("read") == cpu.memory_gb_per_s("copy") == 30.0
    assert SOME.peak_tflops(torch.float32) == 60 and SOME.peak_tflops("float32", "sustained") == 50
    assert SOME.fits_in_cache(50 << 20) and not SOME.fits_in_cache((50 << 20) + 1)
    with pytest.raises(ValueError, match="neither"):
        SOME.memory_gb_per_s("write")


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ([104.0], (104.0, False)),  # within 5 %: not measured again
        ([120.0, 104.0], (104.0, False)),  # a glitch
        ([120.0, 118.0], (118.0, False)),  # the ceiling had been too low: fresh says 115
        ([130.0, 125.0], (125.0, True)),
    ],
)
def test_gate(monkeypatch, figures, expected):
    known, fresh = replace(SOME, read_gb_per_s=100.0), replace(SOME, read_gb_per_s=115.0, copy_gb_per_s=1.0)
    asked = []

    def ceilings(device, dtype, *, fresh):
        asked.append(fresh)
        return fresh_ceilings

    fresh_ceilings = fresh
    monkeypatch.setattr(roofline, "ceilings", ceilings)
    left = list(figures)
    value, after, suspect = roofline.gate(
        left.pop(0), lambda: left.pop(0), lambda c: c.read_gb_per_s, known, "cuda", "float32"
    )
    assert (value, suspect) == expected and left == []
    assert asked == [True] * (len(figures) - 1)
    if asked:
        assert (after.read_gb_per_s, after.copy_gb_per_s) == (115.0, 4000.0), "the higher of both measurements"


def test_suspect_rows_fail_the_script_on_a_gpu_and_are_noted_on_a_cpu(capsys):
    rows = [{"suspect": None}, {"suspect": 1}, {}]
    with pytest.raises(CheckFailed, match="1 of 3 points"):
        roofline.report_suspects(rows, "cuda")
    roofline.report_suspects(rows, "cpu")
    assert capsys.readouterr().out.startswith("note: 1 of 3 points")
    roofline.report_suspects([rows[0], rows[2]], "cuda")
    assert capsys.readouterr().out == ""


# --- what is counted -------------------------------------------------------------------------------------------------
def test_memory_rates_count_the_bytes_that_move(monkeypatch):
    """With every call 'taking' one second, the rate is the bytes moved."""
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(on, "MIN_CPU_BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(on, "_best_cpu_seconds", lambda fn, budget: (fn(), 1.0)[1])
    size = 4 << 20  # four times the cache
    for kind, name, rate in on.memory(CPU, quick=True):
        assert rate * 1e9 == (2 * size if kind == "copy" else size), name


def test_buffers_are_four_times_the_cache(monkeypatch):
    made = []
    ones = torch.ones
    monkeypatch.setattr(on.torch, "ones", lambda *a, **k: made.append(ones(*a, **k)) or made[-1])
    monkeypatch.setattr(on, "_best_cpu_seconds", lambda fn, budget: 1.0)
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 40 << 20)
    on.memory(CPU, quick=True)
    assert max(tensor.nbytes for tensor in made) == 160 << 20


def test_product_rates_count_two_operations_a_multiply_add(monkeypatch):
    monkeypatch.setattr(on, "_best_cpu_seconds", lambda fn, budget: 0.01)
    rates = {(name, shape): rate for name, shape, rate in on.products(CPU, "float32", quick=True)}
    assert len(rates) == 6
    for (_, (m, n, k)), rate in rates.items():
        assert rate * 1e12 == pytest.approx(2 * m * n * k / 0.01)


def test_a_dtype_without_fast_products_does_not_hang(monkeypatch):
    monkeypatch.setattr(on, "_best_cpu_seconds", lambda fn, budget: 60.0)
    assert [name for name, _, _ in on.products(CPU, "float16", quick=True)] == ["linear 512", "square 512"]


def test_sustained_rate_leaves_the_heating_out(monkeypatch):
    runs = []

    def run_for(fn, device, seconds):
        runs.append(seconds)
        return (1000, 1.0) if len(runs) == 1 else (10, 2.0)

    monkeypatch.setattr(on, "_run_for", run_for)
    rate = on.sustained_product(CPU, "float32", "linear 8", (8, 8, 8), quick=False)
    assert rate == pytest.approx(2 * 8**3 * 10 / 2.0 / 1e12) and sum(runs) >= 1.0


@pytest.mark.parametrize("transposed", [True, False])
def test_the_product_that_is_timed_is_a_product(transposed):
    multiply = on._product(CPU, "float64", (3, 5, 7), transposed)
    random = torch.Generator().manual_seed(0)
    a = torch.randn(3, 7, generator=random).double()
    b = torch.randn(*((5, 7) if transposed else (7, 5)), generator=random).double()
    expected = torch.einsum("mk,nk->mn" if transposed else "mk,kn->mn", a, b)
    torch.testing.assert_close(multiply(), expected)


def test_measuring_leaves_a_scripts_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(on, "CPU_SIZES", (32,))
    monkeypatch.setattr(on, "MIN_CPU_BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 1 << 14)
    before = torch.get_rng_state()
    found = roofline.ceilings("cpu", "float32")
    assert torch.equal(torch.get_rng_state(), before)
    assert found.read_gb_per_s > 0 and found.tflops["float32"]["burst"] >= found.tflops["float32"]["sustained"] > 0


# --- the script ------------------------------------------------------------------------------------------------------
def run_script(*typed: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run(roofline.main, cli.build_parser(roofline.__doc__, model=False), list(typed))
    return caught.value.code


def test_the_script_writes_rows_provenance_and_a_picture_of_them(faked, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_script("--device", "cpu", "--dtype", "bfloat16", "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "copy 12 GB/s, read 20 GB/s, bfloat16 3 TFLOP/s in a burst and 2.5 sustained" in said
    assert "fewer than 125 operations" in said  # 2.5e12 / 20e9
    rows = results.read_rows(out / "roofline.csv", roofline.COLUMNS)
    assert [(r["name"], r["n"], r["tflops"]) for r in rows if r["kind"] == "product"][1] == ("linear 128", 128, 3)
    record = json.loads((out / "roofline.json").read_text())
    assert record["ceilings"]["read_gb_per_s"] == 20 and record["dtype"] == "bfloat16"
    picture = (out / "roofline.png").read_bytes()
    text = (out / "roofline.csv").read_text()
    (out / "roofline.csv").write_text(text.replace("256,256,256,,2.0", "256,256,256,,1.5"))
    roofline.draw(out / "roofline.csv")
    assert (out / "roofline.png").read_bytes() != picture, "drawn from the CSV alone"
    faked.clear()  # a script's ceilings reuse what this run measured: any measuring would be a KeyError now
    assert roofline.ceilings("cpu", "bfloat16").read_gb_per_s == 20


def test_interrupted_it_keeps_its_rows(faked, tmp_path, monkeypatch, capsys):
    def products(device, dtype, *, quick):
        yield "square 64", (64, 64, 64), 1.0
        raise KeyboardInterrupt

    monkeypatch.setattr(on, "products", products)
    assert run_script("--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "out")) == 130
    assert len(results.read_rows(tmp_path / "out" / "roofline.csv", roofline.COLUMNS)) == 5


@pytest.mark.slow
def test_a_real_measurement_of_this_machine(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "common.roofline", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"TLAB_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "roofline.json").read_text())["ceilings"]
    assert 0.5 < found["read_gb_per_s"] < 5000 and 1e-4 < found["tflops"]["float32"]["burst"] < 100
    assert (tmp_path / "roofline.png").stat().st_size > 10_000

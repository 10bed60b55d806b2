"""Both scripts as a learner runs them: files, columns, refusals, pictures that follow the CSV."""

import csv
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import results
from common.attention_bench import plots as attention_plots

ROOT = Path(__file__).resolve().parents[3]
PREFILL = ROOT / "assignment3/section2/flashattention_single_layer.py"
DECODE = ROOT / "assignment3/section2/flashattention_decode.py"
TINY = ["--device", "cpu", "--preset", "quick", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
HEADERS = {
    "attention_performance_seq": "config,backend,seq_len,batch,time_us,tflops,percent_of_peak",
    "attention_performance_batch": "config,backend,seq_len,batch,time_us,tflops,percent_of_peak",
    "decode_performance_seq": "config,backend,kv_len,batch,page_size,time_us,gb_per_s,percent_of_peak",
    "decode_performance_batch": "config,backend,kv_len,batch,page_size,time_us,gb_per_s,percent_of_peak",
    "decode_performance_pagesize": "config,backend,kv_len,batch,page_size,time_us,gb_per_s,percent_of_peak",
}


def run(script, *arguments, cwd=None):
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder that both scripts wrote into, and what they printed; the other runs here use their cache too."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        prefill = run(PREFILL, *TINY, "--out", out, cwd=out)
        decode = run(DECODE, *TINY, "--out", out, cwd=out)
        assert (prefill.returncode, decode.returncode) == (0, 0), prefill.stderr + decode.stderr
        yield out, prefill.stdout, decode.stdout


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_files_have_the_agreed_columns_and_provenance(made):
    out, *_ = made
    for name, header in HEADERS.items():
        first = (out / f"{name}.csv").read_text().splitlines()[0]
        assert first.startswith(header + ","), name
        assert (out / f"{name}.png").stat().st_size > 10_000
        record = json.loads((out / f"{name}.json").read_text())
        assert record["dtype"] == "float32" and record["ceilings"]["device_type"] == "cpu"
        assert record["sizes"] == {"heads-4-2-16": [4, 2, 16]}
        assert "pip install flashinfer-python" in str(record["missing"]) or "needs a CUDA" in str(record["missing"])
    assert (out / "attention_roofline.png").exists()


def test_rows_are_right_and_rates_follow_from_times(made):
    out, *_ = made
    rows = table(out / "attention_performance_seq.csv")
    assert {row["backend"] for row in rows} == {"torch-flash", "torch-math"}
    for row in rows:
        assert row["status"] == "ok" and float(row["error"]) < 1e-4
        flops = 4 * int(row["batch"]) * int(row["seq_len"]) ** 2 * 4 * 16 / 2
        assert float(row["tflops"]) == pytest.approx(flops / float(row["time_us"]) / 1e6)
    for row in table(out / "decode_performance_batch.csv"):
        batch, kv_len = int(row["batch"]), int(row["kv_len"])
        num_bytes = 4 * (2 * batch * kv_len * 2 * 16 + 2 * batch * 4 * 16)
        assert float(row["gb_per_s"]) == pytest.approx(num_bytes / float(row["time_us"]) / 1e3)
        assert row["page_size"] == ("16" if row["backend"] == "torch-gather" else ""), "no pages, no page size"


def test_a_size_that_a_backend_cannot_do_stays_as_unsupported(made):
    out, _, decode = made
    rows = table(out / "decode_performance_pagesize.csv")
    assert {r["status"] for r in rows if r["backend"] == "torch-gather"} == {"ok"}
    flash = [row for row in rows if row["backend"] == "torch-flash"]
    assert [(row["page_size"], row["status"], row["time_us"]) for row in flash] == [
        ("1", "unsupported", ""),
        ("16", "unsupported", ""),
    ]
    assert "torch-flash, torch-math unsupported" in decode


def test_what_is_printed_says_who_is_missing_and_who_wins(made):
    _, prefill, decode = made
    assert "without flashinfer-fa2: " in prefill and "without flash-attn-2: " in decode
    assert "heads-4-2-16: fastest: torch-" in prefill and "times torch-" in prefill
    assert "attention_roofline.png" in prefill and "decode_performance_pagesize.png" in decode


def test_the_picture_follows_the_csv(made, tmp_path):
    out, *_ = made
    name = "attention_performance_seq"
    for suffix in (".csv", ".json"):
        shutil.copy(out / f"{name}{suffix}", tmp_path)
    path = tmp_path / f"{name}.csv"
    first = attention_plots.draw_sweep(path, "seq_len", "tflops", "t", "x").read_bytes()
    again = attention_plots.draw_sweep(path, "seq_len", "tflops", "t", "x").read_bytes()
    rows = results.read_rows(path, ("tflops",))
    old = f",{rows[0]['tflops']!r},"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, f",{rows[0]['tflops'] * 2!r},"))
    assert attention_plots.draw_sweep(path, "seq_len", "tflops", "t", "x").read_bytes() != first == again


def test_the_roofline_shows_every_point(made, tmp_path, monkeypatch):
    """Decode without grouped heads in float32 does half an operation a byte, far to the left of 1."""
    out, *_ = made
    for name in HEADERS:
        shutil.copy(out / f"{name}.json", tmp_path)
        rows = table(out / f"{name}.csv")
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(row | ({"flop_per_byte": 0.49} if "decode" in name else {}) for row in rows)
    saved = []
    monkeypatch.setattr(attention_plots.plots, "save", lambda fig, path, footer: saved.append(fig))
    attention_plots.draw_roofline(tmp_path)
    (ax,) = saved[0].axes
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    rows = [row for name in HEADERS for row in table(tmp_path / f"{name}.csv") if row["status"] == "ok"]
    points = [(float(row["flop_per_byte"]), float(row["tflops"])) for row in rows]
    assert all(left < x < right and bottom < y < top for x, y in points) and min(points)[0] == 0.49


def test_missing_backends_are_skipped_by_name_with_exit_0(tmp_path, made):
    names = "torch-cudnn,torch-math"
    done = run(PREFILL, *TINY, "--seq-lens", 16, "--batch-sizes", 1, "--backends", names, "--out", tmp_path)
    assert done.returncode == 0 and "without torch-cudnn: needs a CUDA device" in done.stdout
    assert {row["backend"] for row in table(tmp_path / "attention_performance_seq.csv")} == {"torch-math"}
    done = run(DECODE, *TINY, "--backends", "torch-cudnn", "--out", tmp_path / "none")
    assert done.returncode == 0 and "nothing was written" in done.stdout, done.stderr
    assert not list(tmp_path.glob("none/*"))


def test_ragged_counts_the_real_tokens_and_resume_measures_only_the_rest(tmp_path, made):
    sys.path.insert(0, str(DECODE.parent))
    try:
        from flashattention_decode import lengths
    finally:
        sys.path.pop(0)
    drawn = lengths(64, 3, True, 0)
    assert drawn == lengths(64, 3, True, 0) != lengths(64, 3, True, 1) and len(set(drawn)) > 1
    assert all(32 <= n <= 96 for n in drawn) and lengths(64, 3, False, 0) == (64, 64, 64)
    command = [*TINY, "--ragged", "--kv-lens", 64, "--page-sizes", 16, "--backends", "torch-flash", "--out", tmp_path]
    assert run(DECODE, *command, "--batch-sizes", "3").returncode == 0
    (row,) = table(tmp_path / "decode_performance_batch.csv")
    num_bytes = 4 * (2 * sum(drawn) * 2 * 16 + 2 * 3 * 4 * 16)
    assert float(row["gb_per_s"]) == pytest.approx(num_bytes / float(row["time_us"]) / 1e3)
    done = run(DECODE, *command, "--batch-sizes", "1,3", "--resume")
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "decode_performance_batch.csv")
    assert [r["batch"] for r in rows] == ["3", "1"] and rows[0] == row


BAD = [
    (["--heads", "32", "--kv-heads", "5"], "--kv-heads 5"),
    (["--heads", "0"], "--heads 0"),
    (["--head-dim", "64"], "--heads"),
    (["--config", "llama3-8b", "--heads", "8"], "--config"),
    (["--config", "gpt-9"], "gpt-9"),
    (["--backends", "flash-attn-9"], "flash-attn-9"),
    (["--heads", "4", "--head-dim", "512", "--backends", "triton"], "512"),
    (["--heads", "4", "--head-dim", "12", "--backends", "flash-attn-2"], "12"),
    (["--batch-sizes", "2^38"], "--batch-sizes"),
    (["--device", "tpu"], "tpu"),
]
BAD_DECODE = [
    (["--page-sizes", "0"], "0"),
    (["--page-size", "0"], "0"),
    (["--kv-lens", "2^40"], "--kv-lens"),
    (["--backends", "flashinfer-fa3"], "does no decode"),
]
CASES = [(script, *bad) for script in (PREFILL, DECODE) for bad in BAD]
CASES += [(PREFILL, ["--seq-lens", "2^40"], "--seq-lens"), *((DECODE, *bad) for bad in BAD_DECODE)]


@pytest.mark.parametrize("script, arguments, names", CASES, ids=lambda value: getattr(value, "stem", str(value)))
def test_bad_input_is_one_line_and_exit_2(script, arguments, names, tmp_path, made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name, "--preset", "quick", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and names in lines[0], lines
    assert not list(tmp_path.iterdir())


def test_help_needs_no_torch():
    for script in (PREFILL, DECODE):
        code = (
            f"import runpy, sys\nsys.argv = ['x', '--help']\ntry: runpy.run_path({str(script)!r}, run_name='__main__')"
        )
        code += "\nexcept SystemExit as e: assert e.code == 0\nassert 'torch' not in sys.modules"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

"""The two scripts as a learner runs them: from another directory, in a process, with good and bad input."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from common.results import read_rows

SECTION = Path(__file__).resolve().parents[2] / "assignment4" / "Section1"
FILES = {
    "continous": ["comparison.png"],
    "chunked": ["iterations.png", "budgets.png", "budgets.csv"],
}


def run(name, *options, cwd, code=0):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SECTION / f"{name}_main.py"), *map(str, options)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def simulate(name, tmp_path, *options, code=0):
    options = ["--simulate", "h200:llama3-8b", "--preset", "quick", "--out", tmp_path / "out", *options]
    return run(name, *options, cwd=tmp_path, code=code)


def columns(path):
    return path.read_text().split("\n")[0].split(",")


@pytest.mark.parametrize("name", FILES)
def test_simulated_run_writes_its_files(name, tmp_path):
    out = tmp_path / "out"
    done = simulate(name, tmp_path)
    for kind in ("requests", "iterations", "slots", "summary"):
        assert (out / f"{name}_{kind}_simulated.csv").exists()
        assert f"{name}_{kind}_simulated.csv" in done.stdout
        assert json.loads((out / f"{name}_{kind}_simulated.json").read_text())["backend"] == "simulated"
    for file in FILES[name]:
        stem, suffix = file.split(".")
        assert (out / f"{name}_{stem}_simulated.{suffix}").exists()
    assert [path for path in tmp_path.iterdir()] == [out]
    leading = "policy,request,arrival_s,prompt_tokens,output_tokens,ttft_s,tpot_s,max_itl_s,latency_s,preemptions"
    assert columns(out / f"{name}_requests_simulated.csv")[:11] == [*leading.split(","), "finish_reason"]
    leading = "policy,iteration,start_s,time_us,kind,prefill_tokens,decode_tokens,running,waiting,pages_used"
    assert columns(out / f"{name}_iterations_simulated.csv")[:10] == leading.split(",")
    leading = "policy,token_budget,requests,output_tokens,time,tokens_per_s"
    assert columns(out / f"{name}_summary_simulated.csv")[:6] == leading.split(",")


def test_rows_agree_with_one_another(tmp_path):
    """The summary, recomputed from the request and iteration rows of the same run."""
    simulate("chunked", tmp_path, "--slo-ttft", "0.03", "--slo-tpot", "0.005")
    files = {kind: read_rows(tmp_path / "out" / f"chunked_{kind}_simulated.csv", ()) for kind in
             ("requests", "iterations", "slots", "summary")}  # fmt: skip
    for row in files["summary"]:
        mine = [r for r in files["requests"] if r["policy"] == row["policy"]]
        steps = [r for r in files["iterations"] if r["policy"] == row["policy"]]
        assert row["requests"] == len(mine) and row["output_tokens"] == sum(r["output_tokens"] for r in mine)
        time = max(r["arrival_s"] + r["latency_s"] for r in mine)
        assert row["time"] == pytest.approx(time) and row["tokens_per_s"] == pytest.approx(row["output_tokens"] / time)
        good = [r for r in mine if r["ttft_s"] <= 0.03 and (r["tpot_s"] is None or r["tpot_s"] <= 0.005)]
        assert row["good_requests"] == len(good) and row["goodput"] == pytest.approx(len(good) / time)
        assert 0 < len(good) < len(mine)
        assert sum(s["sampled_tokens"] for s in steps) == row["output_tokens"]
        assert sum(s["prefill_tokens"] for s in steps) == sum(r["prompt_tokens"] for r in mine)
        assert row["max_itl_s"] == pytest.approx(max(r["max_itl_s"] for r in mine if r["max_itl_s"] is not None))
        assert row["pages_peak"] == max(s["pages_used"] for s in steps)
        assert row["tokens_per_s"] < row["ceiling_tokens_per_s"]


@pytest.mark.parametrize("name", FILES)
def test_latency_at_a_share_of_the_measured_throughput(name, tmp_path):
    """The same requests again, arriving at 80 % of what was served when all came at once."""
    done = simulate(name, tmp_path, "--load", "0.8", "--no-plot")
    rows = read_rows(tmp_path / "out" / f"{name}_summary_simulated.csv", ())
    policy = {"continous": "continuous", "chunked": "chunked"}[name]
    full, loaded = (next(r for r in rows if r["policy"] == p) for p in (policy, f"{policy} at 80% load"))
    requests = read_rows(tmp_path / "out" / f"{name}_requests_simulated.csv", ())
    arrivals = [r["arrival_s"] for r in requests if r["policy"] == f"{policy} at 80% load"]
    assert len(arrivals) == full["requests"] == loaded["requests"] and min(arrivals) > 0
    assert full["rate"] is None and loaded["rate"] == pytest.approx(len(arrivals) / max(arrivals))
    draw = random.Random(0)
    gaps = [draw.expovariate(0.8 * full["requests"] / full["time"]) for _ in arrivals]
    assert sorted(arrivals) == pytest.approx(list(itertools.accumulate(gaps)))
    assert f"{policy} at 80% load" in done.stdout and "p99 TTFT" in done.stdout and "p99 ITL" in done.stdout


def test_scale_and_trace_of_a_real_run(tmp_path):
    options = [
        "--model",
        "random:tiny",
        "--device",
        "cpu",
        "--preset",
        "quick",
        "--kv-pages",
        200,
        "--out",
        tmp_path / "out",
    ]
    options += ["--scale", "--trace", tmp_path / "t.json", "--budgets", 8, "--compare", "hf", "--hf-batch-size", 2]
    done = run("chunked", *options, cwd=tmp_path)
    assert "of the middle 80% of the run" in done.stdout and "operators of the main thread" in done.stdout
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    steps = [e for e in events if e.get("cat") == "step"]
    # Both on one clock, so each step holds its own look-up of embeddings: one a forward pass, soon after its start.
    lookups = [e for e in events if e.get("cat") == "host" and e["name"] == "aten::embedding"]
    assert len(lookups) == len(steps) > 1
    for step, lookup in zip(steps, lookups):
        assert step["ts"] < lookup["ts"] and lookup["ts"] + lookup["dur"] < step["ts"] + step["dur"]
    rows = read_rows(tmp_path / "out" / "chunked_scale.csv", ())
    assert len(rows) == 5 and all(r["simulated_tokens_per_s"] and r["decode_tokens_per_s"] for r in rows)
    assert (tmp_path / "out" / "chunked_scale.png").exists()
    assert "chunked gave" in done.stdout and "of hf, batches of 2" in done.stdout
    summary = read_rows(tmp_path / "out" / "chunked_summary.csv", ())
    assert [r["engine"] for r in summary] == ["ours", "ours", "hf"]


NAMES = {"naive": "naive", "naive-dropped": "naive, rows dropped", "continuous": "continuous"}


@pytest.mark.parametrize(
    "typed, compared",
    [
        ("naive", []),
        ("naive-dropped", []),
        ("continuous", []),
        ("naive-dropped,naive", ["naive-dropped served"]),
        ("continuous,naive-dropped", ["continuous served"]),
    ],
)
def test_policies_that_are_named_run_and_no_others(typed, compared, tmp_path):
    done = simulate("continous", tmp_path, "--policies", typed)
    names = [NAMES[name] for name in NAMES if name in typed.split(",")]  # in their own order, not in the typed one
    for kind in ("summary", "requests", "slots", "iterations"):
        rows = read_rows(tmp_path / "out" / f"continous_{kind}_simulated.csv", ())
        assert list(dict.fromkeys(row["policy"] for row in rows)) == names, kind
    said = [f"{NAMES[text.split()[0]]} served the 8 requests" for text in compared]
    assert all(text in done.stdout for text in said) and done.stdout.count(" instead of ") == len(said)
    assert ("of the rows that naive computed" in done.stdout) == ("naive" in names)
    assert not [line for line in done.stdout.splitlines() if line.strip() in ("", ".")]
    assert (tmp_path / "out" / "continous_comparison_simulated.png").exists()


def test_policies_of_a_real_run_are_held_against_one_another(tmp_path):
    options = ["--model", "random:tiny", "--device", "cpu", "--preset", "quick", "--kv-pages", 200, "--no-plot"]
    options += ["--out", tmp_path / "out", "--policies"]
    alone = run("continous", *options, "continuous", "--dump-tokens", tmp_path / "alone", cwd=tmp_path)
    both = run("continous", *options, "naive-dropped,continuous", "--dump-tokens", tmp_path / "both", cwd=tmp_path)
    assert "the same tokens" not in alone.stdout and " against " not in alone.stdout
    assert "continuous against naive, rows dropped: the same tokens" in both.stdout
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "both").read_bytes()


def test_resume_adds_the_policies_that_are_missing(tmp_path):
    summary = tmp_path / "out" / "continous_summary_simulated.csv"
    simulate("continous", tmp_path, "--policies", "continuous", "--no-plot")
    first = summary.read_bytes()
    done = simulate("continous", tmp_path, "--resume", "--policies", "naive,continuous")
    assert [row["policy"] for row in read_rows(summary, ())] == ["continuous", "naive"]
    assert summary.read_bytes().startswith(first) and "continuous served the 8 requests" in done.stdout


@pytest.mark.parametrize(
    "options, named",
    [
        (
            ["--policies", "naive,contiguous"],
            "'contiguous' is no policy; take some of naive, naive-dropped, continuous",
        ),
        (["--policies", ""], "no policy is named"),
        (["--policies", "naive,"], "'' is no policy"),
        (["--policies", "naive,continuous,naive"], "'naive' is named twice"),
        (["--policies", "naive", "--load", "0.8"], "--load"),
    ],
)
def test_bad_policies_are_one_line_before_a_model_is_loaded(options, named, tmp_path):
    done = run("continous", "--model", "absent", *options, "--out", tmp_path / "out", cwd=tmp_path, code=2)
    assert named in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout and not (tmp_path / "out").exists()


def test_mix_is_served_whole(tmp_path):
    done = simulate("chunked", tmp_path, "--requests", "mix", "--req-batch-size", 64, "--budgets", "512", "--no-plot")
    assert "mix, 256 of them, 142,827 tokens in, 133,966 out" in done.stdout
    summary = read_rows(tmp_path / "out" / "chunked_summary_simulated.csv", ())
    assert [row["output_tokens"] for row in summary] == [133_966, 133_966]


def test_a_long_set_is_swept_in_part(tmp_path):
    """10,001 requests of one token are served whole by both policies; the sweep, which is many runs, takes fewer."""
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", *["2023-11-16 18:15:46,1,1"] * 10_001]
    (tmp_path / "trace.csv").write_text("\n".join(lines) + "\n")
    many = ["--requests", "trace.csv", "--budgets", "512", "--no-plot", "--req-batch-size", "1"]
    done = simulate("chunked", tmp_path, *many)
    assert "the sweep over budgets takes the first 10,000 requests" in done.stdout
    rows = {name: read_rows(tmp_path / "out" / f"chunked_{name}_simulated.csv", ()) for name in ("summary", "budgets")}
    assert {row["requests"] for row in rows["summary"]} == {10_001}
    assert {row["requests"] for row in rows["budgets"]} == {10_000}


def test_replicas_resume_and_earlier_files(tmp_path):
    out = tmp_path / "out"
    simulate("continous", tmp_path, "--replicas", 3, "--no-plot")
    first = (out / "continous_summary_simulated.csv").read_bytes()
    assert {row["replica"] for row in read_rows(out / "continous_slots_simulated.csv", ())} == {0, 1, 2}
    simulate("continous", tmp_path, "--replicas", 3, "--no-plot", "--resume")
    assert (out / "continous_summary_simulated.csv").read_bytes() == first  # nothing was measured again
    error = simulate("continous", tmp_path, "--replicas", 2, "--no-plot", "--resume", code=2).stderr
    assert "--replicas" in error
    simulate("continous", tmp_path, "--no-plot")
    assert (out / "continous_summary_simulated.prev.csv").read_bytes() == first


def test_real_run_gives_the_same_tokens_under_both_policies(tmp_path):
    file = tmp_path / "set.jsonl"
    prompts = [{"prompt": "word " * n, "output_tokens": n % 7 + 14} for n in range(1, 12)]
    file.write_text("\n".join(map(json.dumps, prompts)))
    options = [
        "--model",
        "random:tiny",
        "--device",
        "cpu",
        "--preset",
        "quick",
        "--requests",
        file,
        "--out",
        tmp_path / "out",
    ]
    done = run(
        "chunked",
        *options,
        "--dump-tokens",
        tmp_path / "tokens.jsonl",
        "--kv-pages",
        20,
        "--page-size",
        4,
        cwd=tmp_path,
    )
    assert "chunked, budget 16 against continuous: the same tokens" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert [len(r["output_token_ids"]) for r in rows] == [p["output_tokens"] for p in prompts]
    assert [r["finish_reason"] for r in rows] == ["length"] * 11
    assert [len(r["prompt_token_ids"]) for r in rows] == [5 * n for n in range(1, 12)]  # bytes
    assert sum(r["preemptions"] for r in read_rows(tmp_path / "out" / "chunked_requests.csv", ())) > 0


def test_requests_that_never_fit_are_named_and_the_others_served(tmp_path):
    done = simulate("continous", tmp_path, "--requests", "mix", "--num-requests", 9, "--kv-pages", 90, "--no-plot")
    rows = read_rows(tmp_path / "out" / "continous_requests_simulated.csv", ())
    refused = [r for r in rows if r["finish_reason"] == "refused"]
    assert 0 < len(refused) < len(rows)
    assert f"request {refused[0]['request']} refused: " in done.stdout
    error = simulate("continous", tmp_path, "--requests", "mix", "--kv-pages", 5, code=2).stderr
    assert "no request can be served" in error and "--kv-pages" in error


@pytest.mark.parametrize(
    "options, named",
    [
        (["--req-batch-size", "0"], "--req-batch-size"),
        (["--token-batch-size", "-1"], "--token-batch-size"),
        (["--budgets", "0,4"], "--budgets"),
        (["--rate", "0"], "--rate"),
        (["--slo-ttft", "nan"], "--slo-ttft"),
        (["--requests", "nothing"], "handout, lognormal, mix"),
        (["--simulate", "abacus"], "--simulate abacus"),
        (["--replicas", "0"], "--replicas"),
        (["--replicas", "100000"], "--replicas 100000: 6,067,300,000 pages in all"),
        (["--kv-pages", "100000000000"], "pages in all, 20,000,000 can be simulated"),
        (["--page-size", "100000"], "--page-size 100000: use 1 to 256"),
        (["--kv-pages", "0"], "--kv-pages"),
        (["--kv-memory", "1.5"], "--kv-memory"),
        (["--load", "1.5"], "--load"),
        (["--load", "0.5", "--rate", "3"], "--load"),
        (["--trace", "t.json"], "--trace"),
        (["--trace", "absent/t.json"], "--trace"),
        (["--scale", "--replicas", "2"], "--scale"),
        (["--scale", "--kv-lens", "64,9000"], "--kv-lens: 9000 is above"),
        (["--scale", "--kv-lens", "4"], "--kv-lens: 4 tokens hold no prompt"),
        (["--scale", "--batch-sizes", "2^30"], "--batch-sizes: 2^30 is above"),
        (["--kv-lens", "64"], "--kv-lens: a size of --scale"),
        (["--batch-sizes", "4"], "--batch-sizes: a size of --scale"),
        (["--hf-batch-size", "4"], "--hf-batch-size: a size of --compare hf"),
        (["--requests", ""], "--requests: is empty"),
        (["--simulate", ""], "--simulate: is empty"),
        (["--dump-tokens", ""], "--dump-tokens: is empty"),
        (["--dump-tokens", "t.jsonl"], "--dump-tokens: goes with a real model"),
        (["--model", "random:tiny"], "--model: goes with a real model"),
        (["--dtype", "float32"], "--dtype: goes with a real model"),
    ],
)
def test_bad_options_are_one_line(options, named, tmp_path):
    error = simulate("chunked", tmp_path, *options, code=2).stderr
    assert named in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()  # refused before anything was served


def test_a_set_that_is_not_there_is_refused_before_a_model_is_loaded(tmp_path):
    done = run("continous", "--model", "absent", "--requests", "a.jsonl", "--out", "out", cwd=tmp_path, code=2)
    assert "--requests a.jsonl: neither a file nor one of handout" in done.stderr and not done.stdout


def test_a_malformed_set_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": 2}\n')
    done = run("chunked", "--model", "absent", "--requests", "a.jsonl", "--out", "out", cwd=tmp_path, code=2)
    assert "a.jsonl" in done.stderr and "line 2" in done.stderr and "model" not in done.stderr + done.stdout


def test_replicas_need_the_simulator(tmp_path):
    assert "--simulate" in run("chunked", "--replicas", 2, "--out", tmp_path, cwd=tmp_path, code=2).stderr


def test_bad_files_are_named_with_their_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "output_tokens": 0}\n')
    assert "a.jsonl, line 2" in simulate("chunked", tmp_path, "--requests", "a.jsonl", code=2).stderr
    (tmp_path / "a.csv").write_text("TIMESTAMP,Tokens\n1,2\n")
    assert "no column ContextTokens" in simulate("chunked", tmp_path, "--requests", "a.csv", code=2).stderr
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "word " * 50_000}) + "\n")
    assert "request 0 has" in simulate("chunked", tmp_path, "--requests", "b.jsonl", code=2).stderr


def test_help_is_quick_because_it_loads_nothing(tmp_path):
    """Counted by modules, not by a clock."""
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(SECTION / 'chunked_main.py')!r}, run_name='__main__')\n"
        f"except SystemExit as end: assert end.code == 0\n"
        f"assert not {{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 0

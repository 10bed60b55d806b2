"""Runs after runs, runs that are cut, and where the scripts run.

Catches: rows measured again or mixed by --resume, rows lost by Ctrl-C, torch imported for --help, a clone that runs
another clone's code, results in the working directory.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from assignment2_scripts import (
    FILES,
    FOLDER,
    HEADERS,
    LENGTH_HEADER,
    MEASURING,
    PICTURES,
    ROOT,
    TINY,
    command,
    rows_of,
    run,
)


# --- runs after runs -------------------------------------------------------------------------------------------------
def test_a_second_run_moves_the_first_aside(in_process, tmp_path):
    for _ in range(2):
        assert in_process("no_kv", *TINY, "--out", tmp_path)[0] == 0
    first, second = ((tmp_path / f"no_kv_times{infix}.csv").read_text() for infix in (".prev", ""))
    assert first != second and first.splitlines()[0] == second.splitlines()[0] == LENGTH_HEADER
    assert json.loads((tmp_path / "no_kv_times.prev.json").read_text())["output_token_ids"]


@pytest.mark.parametrize("name", MEASURING)
def test_resume_measures_what_is_missing_and_nothing_else(measured, tmp_path, in_process, name):
    for file in measured[0].glob(f"{FILES[name]}.*"):
        shutil.copy(file, tmp_path)
    path = tmp_path / f"{FILES[name]}.csv"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join([whole[0], *whole[2:]]))  # the first point is missing
    code, out, err = in_process(name, *TINY, "--resume", "--out", tmp_path)
    assert code == 0, err
    lines = path.read_text().splitlines(keepends=True)
    assert lines[:3] == [whole[0], *whole[2:]] and len(lines) == 4
    assert lines[3].split(",")[0] == whole[1].split(",")[0]
    # What is said is about the smallest and the largest point, wherever they stand in the file.
    assert "2 tokens" not in out if name == "single_batch" else True
    if "prefill" in name:
        assert "a batch of 4 gave" in out and "times a batch of 1," in out
    elif name == "no_kv":
        assert "without a cache, 8 tokens" in out and "4 times the tokens of the shortest" in out
    else:
        assert "with the cache, 8 tokens" in out
    before = path.read_bytes()
    code, out, err = in_process(name, *TINY, "--resume", "--out", tmp_path)
    assert code == 0 and path.read_bytes() == before  # nothing left to do
    more = ["--batch-sizes", "1,2,4,8"] if "prefill" in name else ["--output-lengths", "2,4,8,16"]
    code, out, err = in_process(name, *TINY, *more, "--resume", "--out", tmp_path)
    assert code == 0, err
    assert path.read_text().startswith(before.decode()) and len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "name, changed, field",
    [
        ("no_kv", ["--input-length", 17], "input"),
        ("single_batch", ["--seed", 3], "seed"),
        ("uniform_prefill", ["--output-lengths", 5], "output"),
        ("different_prefill", ["--dtype", "bfloat16"], "dtype"),
        ("different_prefill", ["--repeats", 2], "repeats"),
        ("uniform_prefill", ["--model", "random:tiny:uniform"], "model"),
    ],
)
def test_resume_refuses_rows_measured_differently(measured, tmp_path, in_process, name, changed, field):
    for file in measured[0].glob(f"{FILES[name]}.*"):
        shutil.copy(file, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code, _, err = in_process(name, *TINY, *changed, "--resume", "--out", tmp_path)
    last = err.splitlines()[-1]  # before it, perhaps, that the machine's ceilings are being measured
    assert code == 2 and "--resume" in last and field in last and len(err.splitlines()) <= 2, err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------
def interrupt(args: list[str], when) -> tuple[int, str, str]:
    """Start a script, send it Ctrl-C once `when()` is true, and wait for its end."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    for _ in range(1200):
        if when() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "name, endless",
    [
        ("no_kv", ["--separate", "--output-lengths", "2,4,8000", "--context", 9000]),
        ("uniform_prefill", ["--batch-sizes", "1,2,4", "--output-lengths", 6000, "--context", 9000]),
    ],
)
def test_control_c_keeps_the_rows_draws_them_and_exits_130(tmp_path, name, endless):
    path = tmp_path / f"{FILES[name]}.csv"
    args = command(name, *TINY, *endless, "--out", tmp_path)
    if name == "uniform_prefill":
        args[args.index(6000 if 6000 in args else "6000")] = "40"
        args += ["--repeats", "60"]
    wanted = 3 if name == "no_kv" else 2
    code, out, err = interrupt(args, lambda: path.exists() and path.read_text().count("\n") >= wanted)
    assert code == 130 and "interrupted" in err and "Traceback" not in err, err
    assert len(rows_of(path)) >= wanted - 1
    assert (tmp_path / f"{FILES[name]}.json").exists() and (tmp_path / PICTURES[name]).exists()
    assert HEADERS[name].split(",")[0] in out  # the table of what there is


def test_control_c_before_the_first_row_leaves_everything_as_it_was(measured, tmp_path):
    for file in measured[0].glob("no_kv_times.*"):
        shutil.copy(file, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    args = command("no_kv", *TINY, "--output-lengths", 8000, "--context", 9000, "--out", tmp_path)
    start = time.monotonic()
    code, _, err = interrupt(args, lambda: time.monotonic() > start + 6)
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# --- where and how they run ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*MEASURING, "graph1", "graph2"])
def test_help_imports_no_torch(name):
    args = command(name, "--help")
    done = subprocess.run([args[0], "-X", "importtime", *args[1:]], capture_output=True, text=True, timeout=60)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and "common.cli" in imported
    assert not imported & {"torch", "matplotlib", "numpy", "transformers"}
    assert f"python assignment2/{name}.py" in done.stdout  # commands to try
    assert "--out" in done.stdout


@pytest.fixture(scope="module")
def clones(tmp_path_factory):
    """Two copies of the tracked files, told apart by what their `common` prints."""
    folder = tmp_path_factory.mktemp("clones")
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "common", "assignment2"], capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in ("a", "b"):
        for file in filter(None, tracked.stdout.split("\0")):
            if (ROOT / file).exists():
                (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, folder / name / file)
        with open(folder / name / "common" / "errors.py", "a") as file:
            file.write(f'\nprint("this is clone {name}")\n')
    return folder


@pytest.mark.parametrize("own, other", ["ab", "ba"])
def test_each_clone_uses_its_own_common(clones, own, other):
    """Run from the other clone's root, with the other clone on PYTHONPATH."""
    env = {"PYTHONPATH": str(clones / other)}
    done = run("no_kv", "--help", folder=clones / own / "assignment2", cwd=clones / other, env=env)
    assert done.stdout.startswith(f"this is clone {own}\n") and f"this is clone {other}" not in done.stdout


def test_from_another_folder_into_results_beside_the_script(clones, tmp_path):
    done = run("no_kv", *TINY, folder=clones / "a" / "assignment2", cwd=tmp_path)
    results = clones / "a" / "assignment2" / "results"
    assert sorted(p.name for p in results.iterdir()) == ["no_kv_times.csv", "no_kv_times.json", "time_comparison.png"]
    assert not list(tmp_path.iterdir())
    assert "assignment2/results/no_kv_times.csv" in done.stdout
    done = run("no_kv", *TINY, "--out", "here/there", folder=clones / "a" / "assignment2", cwd=tmp_path)
    assert (tmp_path / "here" / "there" / "no_kv_times.csv").exists() and "wrote here/there/" in done.stdout
    assert json.loads((results / "no_kv_times.json").read_text())["git_commit"] is None  # a copy is no clone


def test_control_c_in_the_demo_lets_the_script_keep_its_rows(tmp_path):
    """A terminal sends Ctrl-C to both. The demo must wait for the script, and end as it ended."""
    code = (
        "import sys, time; from common import demo, cli\n"
        "demo.MEASURING = ('no_kv',); demo.DRAWING = ()\n"
        f"demo.options = lambda args: {[*TINY, '--separate', '--output-lengths', '2,8000', '--context', '9000']!r}\n"
        f"cli.run(demo.main, demo.build_parser(), ['--out', {str(tmp_path)!r}])\n"
    )
    args = [command("x")[0], "-c", code]
    process = subprocess.Popen(args, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    path = tmp_path / "no_kv_times.csv"
    for _ in range(1200):
        if (path.exists() and path.read_text().count("\n") >= 2) or process.poll() is not None:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "keeping the rows" in err and "Traceback" not in err, err
    assert (tmp_path / "time_comparison.png").exists() and len(rows_of(path)) >= 1


def test_the_demo_ends_with_the_code_of_the_script_that_failed(tmp_path):
    (tmp_path / "file").write_text("")
    args = [command("x")[0], "-m", "common.demo", "--out", str(tmp_path / "file")]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--out" in done.stderr


@pytest.mark.slow
def test_the_demo_runs_all_six_and_sums_up(tmp_path):
    """As `make demo` does it, at quick sizes, on the real model."""
    args = [command("x")[0], "-m", "common.demo", "--preset", "quick", "--out", str(tmp_path)]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [*(f"{FILES[n]}.{s}" for n in MEASURING for s in ("csv", "json")), *set(PICTURES.values())]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    summary = done.stdout[done.stdout.index("== What this machine showed") :]
    assert "KV cache" in summary and "times faster" in summary and summary.count("Batching 4 prompts") == 2
    for file in (name for name in names if not name.endswith("json")):
        assert file in summary
    assert "the same tokens" in done.stdout
    assert FOLDER.name in done.stdout

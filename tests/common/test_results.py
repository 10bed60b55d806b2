"""Result files: what is written is read back, an earlier run is never lost, and a kill at any byte costs one row."""

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import results
from common.errors import UserError
from common.results import ResultFile, read_rows

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("backend", "n", "time")
FACTS = {"model": "tiny", "dtype": "float32", "versions": {"torch": "2.13"}, "options": {"repeats": 5}}


def file_in(folder, *, resume=False, facts=FACTS, columns=COLUMNS, name="speeds") -> ResultFile:
    return ResultFile(folder, name, columns, facts, key=["backend", "n"], resume=resume)


def write(folder, rows, **kw) -> None:
    with file_in(folder, **kw) as file:
        for backend, n, seconds in rows:
            file.append(backend=backend, n=n, time=seconds)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- rows ------------------------------------------------------------------------------------------------------------
# Text that does not look like a number; what does is read back as one, which is what a CSV means.
names = st.text(st.characters(exclude_categories=["C"]), min_size=1).filter(lambda t: not any(c.isdigit() for c in t))
names = names.filter(lambda t: t not in ("nan", "inf", "-inf") and not t.startswith("\ufeff"))
numbers = st.one_of(st.integers(-(2**63), 2**63), st.floats(allow_nan=False))
points = st.lists(st.tuples(names, st.integers(0, 10**6), st.none() | numbers), min_size=1, max_size=6)


@settings(deadline=None)
@given(points)
def test_rows_are_read_back_exactly(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    with file_in(folder) as file:
        for backend, n, seconds in rows:
            file.append(backend=backend, n=n, time=seconds)
            assert file.has(backend=backend, n=n)
        expected = [dict(zip(COLUMNS, row)) for row in rows]
        assert file.rows == expected, "what the script has in memory is what a plot would read"
    read = read_rows(folder / "speeds.csv", COLUMNS)
    assert read == expected
    assert [type(row["time"]) for row in read] == [type(row["time"]) for row in expected]
    with open(folder / "speeds.csv", newline="", encoding="utf-8") as plain:  # any reader of CSV sees the same cells
        assert [row["backend"] for row in csv.DictReader(plain)] == [row[0] for row in rows]


def test_a_row_is_in_the_file_before_append_returns(tmp_path):
    file = file_in(tmp_path)
    file.append(backend="a", n=1, time=0.5)
    assert (tmp_path / "speeds.csv").read_text() == "backend,n,time\na,1,0.5\n"
    assert json.loads((tmp_path / "speeds.json").read_text())["model"] == "tiny", "provenance comes with the first row"
    file.close(ceilings={"read": np.float64(3.5)}, shape=(np.int64(2), 3))
    assert json.loads((tmp_path / "speeds.json").read_text())["ceilings"] == {"read": 3.5}


def test_numbers_of_numpy_and_torch_are_plain_numbers(tmp_path):
    write(tmp_path, [("a", np.int64(3), np.float64(0.1)), ("b", torch.tensor(4), np.float32(0.5))])
    assert (tmp_path / "speeds.csv").read_text() == "backend,n,time\na,3,0.1\nb,4,0.5\n"


@pytest.mark.parametrize("row", [{"backend": "a", "n": 1}, {"backend": "a", "n": 1, "time": 1, "tmie": 2}])
def test_a_row_with_other_columns_is_a_bug_and_writes_nothing(tmp_path, row):
    with pytest.raises(ValueError, match="row lacks"):
        file_in(tmp_path).append(**row)
    with pytest.raises(ValueError, match="line break"):
        file_in(tmp_path).append(backend="a\nb", n=1, time=1)
    with pytest.raises(ValueError, match="key columns"):
        file_in(tmp_path).has(n=1)
    assert contents(tmp_path) == {}


def test_suspect_is_optional_in_a_row(tmp_path):
    with file_in(tmp_path, columns=(*COLUMNS, "suspect")) as file:
        file.append(backend="a", n=1, time=1.0)
        file.append(backend="a", n=2, time=1.0, suspect=True)
        file.append(backend="a", n=3, time=1.0, suspect=False)
    assert [bool(row["suspect"]) for row in read_rows(file.path, ["suspect"])] == [False, True, False]


# --- earlier files ---------------------------------------------------------------------------------------------------
def test_earlier_files_move_aside_when_the_first_row_is_ready_and_not_before(tmp_path):
    write(tmp_path, [("old", 1, 1.0)])
    (tmp_path / "speeds.png").write_bytes(b"old plot")
    before = contents(tmp_path)
    file = file_in(tmp_path)
    file.close()
    assert contents(tmp_path) == before, "a run that measured nothing leaves everything as it was"
    write(tmp_path, [("new", 1, 1.0)])
    after = contents(tmp_path)
    assert {name: after[name.replace(".", ".prev.")] for name in before} == before
    assert sorted(after) == ["speeds.csv", "speeds.json", "speeds.prev.csv", "speeds.prev.json", "speeds.prev.png"]
    write(tmp_path, [("newest", 1, 1.0)])
    last = contents(tmp_path)
    assert last["speeds.prev.csv"] == after["speeds.csv"]
    assert "speeds.prev.png" not in last, "a plot of a still earlier CSV does not stand beside this one"


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_kill_between_the_moves_loses_no_earlier_file(tmp_path, monkeypatch, killed_after):
    write(tmp_path, [("old", 1, 1.0)])
    (tmp_path / "speeds.png").write_bytes(b"old plot")
    before = contents(tmp_path)
    moves, replace = [], os.replace

    def killed(source, target):
        if len(moves) == killed_after:
            raise KeyboardInterrupt
        moves.append(target)
        replace(source, target)

    monkeypatch.setattr(results.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        file_in(tmp_path).append(backend="new", n=1, time=1.0)
    monkeypatch.undo()
    write(tmp_path, [("new", 1, 1.0)])
    after = contents(tmp_path)
    assert {name: after[name.replace(".", ".prev.")] for name in before} == before


# --- resume ----------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(points, st.data())
def test_killed_at_any_byte_then_resumed_gives_the_file_of_an_undisturbed_run(tmp_path_factory, rows, data):
    rows = list({(backend, n): (backend, n, seconds) for backend, n, seconds in rows}.values())
    folder = tmp_path_factory.mktemp("killed")
    write(folder, rows)
    whole = (folder / "speeds.csv").read_bytes()
    cut = data.draw(st.integers(0, len(whole)), label="cut")
    (folder / "speeds.csv").write_bytes(whole[:cut])
    complete = max(whole[:cut].count(b"\n") - 1, 0)
    measured = []
    with file_in(folder, resume=True) as file:
        for backend, n, seconds in rows:
            if not file.has(backend=backend, n=n):
                measured.append((backend, n, seconds))
                file.append(backend=backend, n=n, time=seconds)
    assert measured == rows[complete:], "what was whole is kept, what was cut is measured again"
    assert (folder / "speeds.csv").read_bytes() == whole
    assert file.rows == read_rows(file.path, COLUMNS)


def test_a_real_kill_while_writing(tmp_path):
    """SIGKILL a process that appends as fast as it can; the rows it had reported are all there."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from common.results import ResultFile\n"
        "file = ResultFile(sys.argv[2], 'speeds', ['n', 'square'], {'model': 'tiny'}, key=['n'], resume=True)\n"
        "for n in range(1_000_000):\n"
        "    if not file.has(n=n):\n"
        "        file.append(n=n, square=n * n); print(n, flush=True)\n"
    )
    reported = -1
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script, ROOT, tmp_path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(50):
            reported = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.communicate(timeout=30)[0].split("\n")[:-1]
        reported = int(rest[-1]) if rest else reported
        rows = read_rows(tmp_path / "speeds.csv", ["n", "square"])
        assert [row["square"] for row in rows] == [n * n for n in range(len(rows))] and len(rows) > reported


def test_resume_refuses_what_was_measured_differently_and_touches_nothing(tmp_path):
    write(tmp_path, [("a", 1, 1.0)])
    with open(tmp_path / "speeds.csv", "ab") as file:
        file.write(b"a,2,0.")  # even the cut line stays
    before = contents(tmp_path)
    changed = FACTS | {"dtype": "bfloat16", "versions": {"torch": "2.11"}, "options": {"repeats": 3}}
    with pytest.raises(UserError) as caught:
        file_in(tmp_path, resume=True, facts=changed)
    for part in ('dtype: "float32", now "bfloat16"', 'versions.torch: "2.13", now "2.11"', "--repeats: 5, now 3"):
        assert part in str(caught.value)
    assert "model" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has columns backend,n,time, not backend,n,seconds"):
        file_in(tmp_path, resume=True, columns=("backend", "n", "seconds"))
    assert contents(tmp_path) == before
    (tmp_path / "speeds.json").unlink()
    with pytest.raises(UserError, match=r"no provenance speeds\.json"):
        file_in(tmp_path, resume=True)


def test_what_does_not_change_figures_may_differ():
    options = {"repeats": 5, "batch_sizes": [1, 2], "out": "a", "resume": False, "debug": False, "prompt": None}
    old = FACTS | {"git_commit": "a", "utc_time": "x", "clocks": {"sm": 1}, "ceilings": {"read": 1.0}, "command": "c"}
    old |= {"options": options, "sizes": {"lengths": [1, 2], "input_length": 8}}
    new = old | {"git_commit": "b", "utc_time": "y", "clocks": {"sm": 2}, "ceilings": {"read": 2.0}, "command": "d"}
    new |= {"options": options | {"batch_sizes": [1, 2, 4], "out": "b", "resume": True, "debug": True}}
    new |= {"sizes": {"lengths": [4], "input_length": 8}}
    assert results.differing_fields(old, new) == []
    pool = [
        {"kv_pages": pages, "options": {"kv_pages": typed}} for pages, typed in ((8105, None), (8110, None), (9, 9))
    ]
    assert results.differing_fields(pool[0], pool[1]) == []  # memory that was free at the time
    assert results.differing_fields(pool[0], pool[2]) == ["--kv-pages: null, now 9"]
    assert results.differing_fields(old, new | {"sizes": {"input_length": 9}}) == ["sizes.input_length: 8, now 9"]
    prompted = new | {"options": options | {"prompt": "hi"}}
    assert results.differing_fields(old, prompted) == ['--prompt: null, now "hi"']


def test_a_resumed_file_remembers_its_earlier_runs_and_closing_facts(tmp_path):
    first = FACTS | {"command": "one", "utc_time": "1"}
    with file_in(tmp_path, facts=first) as file:
        file.append(backend="a", n=1, time=1.0)
        file.close(jit_s=3.0)
    before = contents(tmp_path)
    file_in(tmp_path, facts=FACTS | {"command": "two", "utc_time": "2"}, resume=True).close(jit_s=9.0)
    assert contents(tmp_path) == before, "nothing new measured, nothing written"
    write(tmp_path, [("a", 2, 2.0)], facts=FACTS | {"command": "two", "utc_time": "2"}, resume=True)
    record = json.loads((tmp_path / "speeds.json").read_text())
    assert (record["command"], record["jit_s"]) == ("two", 3.0)
    assert record["earlier_runs"] == [{"command": "one", "utc_time": "1"}]
    write(tmp_path, [("a", 3, 2.0)], facts=FACTS | {"command": "three", "utc_time": "3"}, resume=True)
    record = json.loads((tmp_path / "speeds.json").read_text())
    assert [run["command"] for run in record["earlier_runs"]] == ["one", "two"]
    assert [row["n"] for row in read_rows(tmp_path / "speeds.csv", COLUMNS)] == [1, 2, 3]
    assert not list(tmp_path.glob("*.prev.*"))


# --- reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"a,b\n1,2\n", "no column time; it has a, b"),
        (b"n,time\n1\n", "line 2: 1 cells under 2 columns"),
        (b"n,time\n\xff,1\n", "not UTF-8"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, content, said):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_rows(tmp_path / "x.csv", ["time"])
    assert "x.csv" in str(caught.value)


def test_missing_file_is_refused():
    with pytest.raises(UserError, match=r"/nonexistent\.csv: No such file"):
        read_rows("/nonexistent.csv", [])


def test_a_file_that_a_spreadsheet_saved_is_read(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'\xef\xbb\xbfn,time,who\r\n1,0.50,"a, b"\r\n2,1e-3,007\r\n\r\n')
    rows = read_rows(tmp_path / "x.csv", ["n", "time"])
    assert rows == [{"n": 1, "time": 0.5, "who": "a, b"}, {"n": 2, "time": 0.001, "who": "007"}]


def test_a_cut_last_line_is_left_out_and_said(tmp_path, capsys):
    (tmp_path / "x.csv").write_bytes(b"n,time\n1,2\n2,12")
    assert read_rows(tmp_path / "x.csv", []) == [{"n": 1, "time": 2}]
    assert "no newline" in capsys.readouterr().err


# --- provenance ------------------------------------------------------------------------------------------------------
def test_provenance_says_how_and_on_what(monkeypatch):
    args = argparse.Namespace(seed=3, repeats=2, warmup=1, preset="quick", device="cpu", out=Path("x"), lengths=[1])
    record = results.provenance(args, model="tiny", dtype=torch.float32, shapes={"q": (2, math.inf)})
    assert json.loads(json.dumps(record, allow_nan=False)) == record, "plain JSON"
    assert (record["seed"], record["repeats"], record["preset"], record["model"]) == (3, 2, "quick", "tiny")
    assert record["dtype"] == "float32" and record["shapes"] == {"q": [2, None]}
    # The package's version: where that does not say how it was built, torch's own may ("2.13.0+cu130").
    release, _, build = record["versions"]["torch"].partition("+")
    assert release == torch.__version__.partition("+")[0] and build in ("", torch.__version__.partition("+")[2])
    assert record["threads"] == torch.get_num_threads()
    assert record["options"]["lengths"] == [1] and record["cpu_cores"] >= 1 and record["device_name"]
    stamp = time.strptime(record["utc_time"], "%Y-%m-%dT%H:%M:%SZ")
    assert abs(time.mktime(stamp) - time.mktime(time.gmtime())) < 60


def test_provenance_outside_git_and_without_nvidia_smi(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    record = results.provenance(argparse.Namespace(device="cuda"), device="cuda:0")
    assert record["git_commit"] is None and "driver" not in record


def test_gpu_facts_are_what_nvidia_smi_prints(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\necho "NVIDIA H200, 570.1, 1980, 3201, 1980, [N/A], 700.00"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    record = results.provenance(argparse.Namespace(), device="cuda:0")
    assert (record["device_name"], record["driver"], record["power_limit_w"]) == ("NVIDIA H200", "570.1", 700.0)
    assert record["clocks"] == {"sm_mhz": 1980, "mem_mhz": 3201, "max_sm_mhz": 1980, "max_mem_mhz": None}


def test_a_script_is_named_from_the_clones_root():
    """Results are committed: the folder of somebody's clone must not be in them."""
    root = Path(results.__file__).resolve().parents[1]
    assert results._quoted(str(root / "assignment2" / "no_kv.py")) == "assignment2/no_kv.py"
    assert results._quoted("/elsewhere/no_kv.py") == "/elsewhere/no_kv.py"

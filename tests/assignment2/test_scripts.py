"""What the scripts write and print, and what their options do.

Catches: a CSV whose header changed, provenance that is missing, a plot that is not drawn from its CSV, tokens that
differ between the scripts, an option that is taken and ignored.
"""

from __future__ import annotations

import json
import shutil

import pytest
from assignment2_scripts import (
    FILES,
    FOLDER,
    HEADERS,
    MEASURING,
    PICTURES,
    TINY,
    lines_of,
    rows_of,
    run,
)
from matplotlib.image import imread


# --- what is written -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MEASURING)
def test_csv_provenance_and_picture(measured, name):
    out, done = measured
    text = (out / f"{FILES[name]}.csv").read_text()
    assert text.splitlines()[0] == HEADERS[name]
    rows = rows_of(out / f"{FILES[name]}.csv")
    first = "output_length" if "batch" not in HEADERS[name].split(",")[0] else "batch_size"
    assert [int(row[first]) for row in rows] == ([2, 4, 8] if first == "output_length" else [1, 2, 4])
    for row in rows:
        values = {column: float(value) for column, value in row.items()}
        assert 0 < values["time_p10"] <= values["time"] <= values["time_p90"]
        tokens = values.get("output_tokens", values.get("output_length"))
        assert values["tokens_per_s"] == pytest.approx(tokens / values["time"])
        assert 0 < values.get("prefill_time", 1e-9) < values["time"]
        if "decode_time" in values:
            assert values["output_tokens"] == 4 * values["batch_size"]
            assert values["prefill_time"] + values["decode_time"] == pytest.approx(values["time"], rel=0.3)
    record = json.loads((out / f"{FILES[name]}.json").read_text())
    assert record["command"].startswith("python ") and f"{name}.py" in record["command"]
    assert (record["preset"], record["seed"], record["repeats"], record["dtype"]) == ("quick", 0, 1, "float32")
    assert record["model"].startswith("random:tiny") and record["shapes"]["hidden_size"] == 64
    assert record["device"] == "cpu" and record["ignore_eos"] is True
    assert record["ceilings"]["read_gb_per_s"] > 0 and record["ceilings"]["tflops"]["float32"]
    for field in ("device_name", "cpu_cores", "versions", "git_commit", "utc_time", "python", "options"):
        assert record[field], field
    assert imread(out / PICTURES[name]).shape == (696, 1680, 4)  # two panels of 7 x 5.8 inches at 120 dpi
    for written in (f"{FILES[name]}.csv", f"{FILES[name]}.json", PICTURES[name]):
        assert f"{written}\n" in done[name].stdout and "wrote " in done[name].stdout


@pytest.mark.parametrize("name", MEASURING)
def test_stdout_is_for_people(measured, name):
    out = measured[1][name].stdout
    lines = out.splitlines()
    assert lines[0].startswith("preset quick: ") and lines[1].startswith("model: random:tiny (")
    assert ", because " in lines[1]
    assert sum(set(line) == {"-", " "} for line in lines) == 1  # the rule under one table
    assert len([line for line in lines if line.endswith(".") and not line.startswith("wrote")]) >= 1  # a sentence
    assert measured[1][name].stderr == ""


def test_unequal_prompts_are_unequal_and_equal_ones_equal(measured):
    out, _ = measured
    equal = [int(row["prompt_tokens"]) for row in rows_of(out / "uniform_prefill.csv")]
    assert equal == [16, 32, 64]
    lengths = [len(line["prompt_token_ids"]) for line in lines_of(out / "different_prefill.tokens.jsonl")]
    assert len(lengths) == 4 and len(set(lengths)) > 1 and all(8 <= n <= 24 for n in lengths)
    sums = [sum(lengths[:n]) for n in (1, 2, 4)]
    assert [int(row["prompt_tokens"]) for row in rows_of(out / "different_prefill.csv")] == sums


def test_tokens_are_dumped_and_the_same_without_and_with_the_cache(measured):
    out, done = measured
    (without,), (cached,) = (lines_of(out / f"{name}.tokens.jsonl") for name in ("no_kv", "single_batch"))
    assert list(without) == ["request", "prompt_token_ids", "output_token_ids", "finish_reason"]
    assert without == cached
    assert len(cached["prompt_token_ids"]) == 16 and len(cached["output_token_ids"]) == 8
    assert cached["finish_reason"] == "length"
    assert "8 tokens against no_kv.py: the same tokens" in done["single_batch"].stdout
    uniform = lines_of(out / "uniform_prefill.tokens.jsonl")
    assert [line["request"] for line in uniform] == [0, 1, 2, 3]
    assert uniform[0]["prompt_token_ids"] == cached["prompt_token_ids"]  # row 0 has single_batch's prompt
    assert uniform[0]["output_token_ids"] == cached["output_token_ids"][:4]


def test_tokens_that_differ_end_with_exit_code_1(measured, tmp_path):
    for file in measured[0].glob("no_kv_times.*"):
        shutil.copy(file, tmp_path)
    record = json.loads((tmp_path / "no_kv_times.json").read_text())
    record["output_token_ids"][5] = (record["output_token_ids"][5] + 1) % 512
    (tmp_path / "no_kv_times.json").write_text(json.dumps(record))
    done = run("single_batch", *TINY, "--out", tmp_path, code=1)
    assert done.stderr.count("\n") == 1 and "check failed" in done.stderr and "output token 5" in done.stderr
    other = run("single_batch", *TINY, "--seed", 1, "--out", tmp_path)  # other weights are not compared at all
    assert "not compared: its model was another" in other.stdout


# --- pictures --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "graph, csv_name",
    [
        ("graph1", "no_kv_times"),
        ("graph1", "single_batch_times"),
        ("graph2", "uniform_prefill"),
        ("graph2", "different_prefill"),
    ],
)
def test_a_picture_is_drawn_from_the_csv(measured, tmp_path, in_process, graph, csv_name):
    for file in measured[0].glob("*.[cj]s*"):
        shutil.copy(file, tmp_path)
    picture = tmp_path / ("time_comparison.png" if graph == "graph1" else "prefill_comparison.png")
    code, out, err = in_process(graph, "--out", tmp_path)
    assert (code, err) == (0, "") and out.startswith("wrote ") and out.count("\n") == 1
    before = imread(picture)
    assert in_process(graph, "--out", tmp_path)[0] == 0
    assert (imread(picture) == before).all()  # the same CSV, the same picture
    lines = (tmp_path / f"{csv_name}.csv").read_text().splitlines()
    cells = lines[2].split(",")
    cells[1] = cells[2] = cells[3] = str(float(cells[1]) * 3)
    (tmp_path / f"{csv_name}.csv").write_text("\n".join([*lines[:2], ",".join(cells), *lines[3:]]) + "\n")
    assert in_process(graph, "--out", tmp_path)[0] == 0
    after = imread(picture)
    assert after.shape == before.shape and (after != before).any()


@pytest.mark.parametrize(
    "graph, present, missing",
    [
        ("graph1", "no_kv_times", "single_batch_times"),
        ("graph1", "single_batch_times", "no_kv_times"),
        ("graph2", "different_prefill", "uniform_prefill"),
    ],
)
def test_one_csv_is_enough(measured, tmp_path, in_process, graph, present, missing):
    for suffix in (".csv", ".json"):
        shutil.copy(measured[0] / f"{present}{suffix}", tmp_path)
    assert in_process(graph, "--out", tmp_path)[0] == 0
    (tmp_path / f"{present}.json").unlink()  # without provenance there is no floor, but a picture
    assert in_process(graph, "--out", tmp_path)[0] == 0


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("model", "another", "the model was another"),
        ("prompt_token_ids", [1, 2], "the prompt was another"),
        (None, None, None),
    ],
)
def test_a_speed_up_is_of_the_same_model_and_prompt(measured, tmp_path, monkeypatch, field, value, said):
    monkeypatch.syspath_prepend(FOLDER)
    from graph1 import why_no_ratio

    for file in measured[0].glob("*_times.*"):
        shutil.copy(file, tmp_path)
    record = json.loads((tmp_path / "no_kv_times.json").read_text())
    (tmp_path / "no_kv_times.json").write_text(json.dumps(record | ({field: value} if field else {})))
    both = {"no cache": {8: 2.0}, "KV cache": {8: 1.0}}
    reason = why_no_ratio(tmp_path, both, [8])
    assert reason is None if said is None else said in reason
    assert "needs single_batch.py" in why_no_ratio(tmp_path, {"no cache": {8: 2.0}}, [])
    assert "no length" in why_no_ratio(tmp_path, {"no cache": {8: 2.0}, "KV cache": {4: 1.0}}, [])


@pytest.mark.parametrize("graph", ["graph1", "graph2"])
def test_csvs_that_cannot_be_drawn_are_named(measured, tmp_path, in_process, graph):
    code, _, err = in_process(graph, "--out", tmp_path)
    assert code == 2 and err.count("\n") == 1
    assert all(f"{name}.py" in err for name in (MEASURING[:2] if graph == "graph1" else MEASURING[2:]))
    name = "no_kv_times.csv" if graph == "graph1" else "uniform_prefill.csv"
    good = (measured[0] / name).read_text().splitlines()
    bad = {
        "no column time": "\n".join([good[0].replace("time,", "tyme,"), *good[1:]]) + "\n",
        "cells under": "\n".join([*good[:2], good[2] + ",1"]) + "\n",
        "empty": "",
        "not a number": "\n".join([*good[:2], good[2].replace(good[2].split(",")[1], "fast")]) + "\n",
    }
    for said, text in bad.items():
        (tmp_path / name).write_text(text)
        code, _, err = in_process(graph, "--out", tmp_path)
        assert code == 2 and err.count("\n") == 1 and name in err and said in err, (said, err)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_no_plot_writes_no_picture(in_process, tmp_path):
    assert in_process("uniform_prefill", *TINY, "--batch-sizes", 1, "--no-plot", "--out", tmp_path)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["uniform_prefill.csv", "uniform_prefill.json"]


# --- options ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MEASURING[1:])
def test_compare_hf_adds_rows_and_a_last_column(in_process, tmp_path, name):
    code, out, err = in_process(name, *TINY, "--compare", "hf", "--out", tmp_path)
    assert code == 0, err
    rows = rows_of(tmp_path / f"{FILES[name]}.csv")
    assert ",".join(rows[0]) == HEADERS[name] + ",engine"
    first = HEADERS[name].split(",")[0]
    points = [2, 4, 8] if first == "output_length" else [1, 2, 4]
    assert [(int(r[first]), r["engine"]) for r in rows] == [(n, e) for n in points for e in ("ours", "hf")]
    assert all(float(r["time"]) > 0 and float(r["prefill_time"]) > 0 for r in rows)
    assert ("Hugging Face" in out) if name == "single_batch" else ("hf took" in out)
    assert "hf: the same tokens" in out  # its tokens are held against ours


@pytest.mark.parametrize("name", MEASURING[2:])
def test_padded_adds_its_rows(in_process, tmp_path, name):
    code, out, err = in_process(name, *TINY, "--padded", "--out", tmp_path)
    assert code == 0, err
    rows = rows_of(tmp_path / f"{FILES[name]}.csv")
    assert [r["engine"] for r in rows] == ["ours", "padded"] * 3 and list(rows[0])[-1] == "engine"
    assert "padded" in out


def test_separate_times_every_length_on_its_own(in_process, tmp_path):
    assert in_process("single_batch", *TINY, "--separate", "--repeats", 2, "--out", tmp_path)[0] == 0
    together = tmp_path / "together"
    assert in_process("single_batch", *TINY, "--repeats", 2, "--out", together)[0] == 0
    separate, shared = (
        [float(r["prefill_time"]) for r in rows_of(folder / "single_batch_times.csv")]
        for folder in (tmp_path, together)
    )
    assert len(set(separate)) == 3 and len(set(shared)) == 1  # one prefill for all, or one each


def test_stop_at_eos_and_ignore_eos(in_process, tmp_path, monkeypatch):
    """The tiny model's third greedy token is made its EOS: one row of two tokens, and a clear word where none fits."""
    assert in_process("no_kv", *TINY, "--dump-tokens", tmp_path / "t.jsonl", "--out", tmp_path)[0] == 0
    (line,) = lines_of(tmp_path / "t.jsonl")
    eos = line["output_token_ids"][2]
    assert eos not in line["output_token_ids"][:2]
    import dataclasses

    from common.config import SHAPES

    monkeypatch.setitem(SHAPES, "tiny", dataclasses.replace(SHAPES["tiny"], eos_token_ids=(eos,)))
    assert in_process("no_kv", *TINY, "--out", tmp_path / "ignored")[0] == 0
    assert [r["output_length"] for r in rows_of(tmp_path / "ignored" / "no_kv_times.csv")] == ["2", "4", "8"]
    out = tmp_path / "stopped"
    assert in_process("no_kv", *TINY, "--stop-at-eos", "--dump-tokens", tmp_path / "s.jsonl", "--out", out)[0] == 0
    assert [r["output_length"] for r in rows_of(out / "no_kv_times.csv")] == ["2"]
    assert lines_of(tmp_path / "s.jsonl")[0]["finish_reason"] == "stop"
    assert json.loads((out / "no_kv_times.json").read_text())["ignore_eos"] is False
    code, _, err = in_process("no_kv", *TINY, "--stop-at-eos", "--output-lengths", "4,8", "--out", tmp_path / "none")
    assert code == 2 and "--stop-at-eos" in err and "3 tokens" in err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", MEASURING)
def test_prompts_are_answered(in_process, tmp_path, name):
    dump = tmp_path / "tokens.jsonl"
    out = tmp_path / "out"
    code, stdout, err = in_process(name, *TINY, "--prompt", "Hi, é!", "--dump-tokens", dump, "--out", out)
    assert code == 0, err
    assert "> Hi, é!" in stdout and "tokens/s" in stdout and not out.exists()
    (line,) = lines_of(dump)
    assert line["prompt_token_ids"] == [b + 3 for b in "Hi, é!".encode()]  # the byte tokenizer has no template
    file = tmp_path / "prompts.jsonl"
    file.write_text('"one"\n{"prompt": "twenty-two"}\n"abc"\n')
    code, stdout, err = in_process(name, *TINY, "--prompts", file, "--dump-tokens", dump, "--output-lengths", 3)
    assert code == 0, err
    assert [len(line["prompt_token_ids"]) for line in lines_of(dump)] == [3, 10, 3]
    assert all(len(line["output_token_ids"]) <= 3 for line in lines_of(dump))
    assert stdout.index("> one") < stdout.index("> twenty-two") < stdout.index("> abc")


def test_every_script_answers_alike(in_process, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("What is it?\nOne\nA longer prompt than the others\nTwo\n")
    answers = []
    for name in MEASURING:
        dump = tmp_path / f"{name}.jsonl"
        assert in_process(name, *TINY, "--prompts", file, "--output-lengths", 6, "--dump-tokens", dump)[0] == 0
        answers.append(dump.read_text())
    assert len(set(answers)) == 1


def test_raw_leaves_the_template_out(in_process, tmp_path):
    """On the real model: the template is there, or it is not."""
    ids = {}
    for raw in ([], ["--raw"]):
        dump = tmp_path / "t.jsonl"
        args = ["--model", "embedded", "--device", "cpu", "--preset", "quick", "--prompt", "12 and", *raw]
        assert in_process("single_batch", *args, "--output-lengths", 1, "--dump-tokens", dump)[0] == 0
        ids[bool(raw)] = lines_of(dump)[0]["prompt_token_ids"]
    assert len(ids[True]) == 3  # "1", "2", " and": digits one by one
    assert len(ids[False]) > 10 and any(ids[False][i : i + len(ids[True])] == ids[True] for i in range(len(ids[False])))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_dtypes_run_on_a_cpu(in_process, tmp_path, dtype):
    code, out, err = in_process("different_prefill", *TINY, "--dtype", dtype, "--out", tmp_path)
    assert code == 0, err
    assert json.loads((tmp_path / "different_prefill.json").read_text())["dtype"] == dtype

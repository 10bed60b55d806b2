"""The command line: sweeps against an oracle of their own, one-line errors, exit codes of a real process."""

import argparse
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import cli
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARED = (
    "--model --device --dtype --preset --out --seed --repeats --warmup --resume --no-plot --debug --context "
    "--batch-sizes --prompt --prompts --raw --dump-tokens --ignore-eos --stop-at-eos --compare"
)


# --- sweeps ----------------------------------------------------------------------------------------------------------
@st.composite
def items(draw):
    """(text, the values it stands for), each computed without the code under test."""
    kind = draw(st.sampled_from(["number", "power", "range", "powers"]))
    if kind == "number":
        value = draw(st.integers(1, 5000))
        return str(value), [value]
    if kind == "power":
        exponent = draw(st.integers(0, 40))
        return f"2^{exponent}", [2**exponent]
    if kind == "range":
        start, step, count = draw(st.integers(1, 3000)), draw(st.integers(1, 500)), draw(st.integers(1, 20))
        slack = draw(st.integers(0, step - 1))  # the end is included only where a step lands on it
        return f"{start}:{start + (count - 1) * step + slack}:{step}", [start + i * step for i in range(count)]
    low = draw(st.integers(0, 30))
    high = draw(st.integers(low, 40))
    return f"2^{low}..2^{high}", [2**e for e in range(low, high + 1)]


@settings(deadline=None)
@given(st.lists(items(), min_size=1, max_size=4))
def test_a_sweep_is_what_its_items_say_or_refused_for_its_order(parts):
    text = ",".join(part for part, _ in parts)
    values = [value for _, some in parts for value in some]
    if all(a < b for a, b in zip(values, values[1:])):
        assert cli.parse_sweep(text) == values
    else:
        with pytest.raises(UserError, match="ascending"):
            cli.parse_sweep(text)


@settings(deadline=None)
@given(
    st.one_of(st.text(), st.text(alphabet="0123456789^.:,- 2x²٣"), st.from_regex(r"[0-9^:.,]{1,30}", fullmatch=True))
)
def test_any_text_is_a_sound_sweep_or_a_user_error(text):
    try:
        values = cli.parse_sweep(text)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert values and all(1 <= value <= 2**40 for value in values)
    assert all(a < b for a, b in zip(values, values[1:])) and len(values) <= 10_000


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "empty"),
        ("1,,2", "empty"),
        ("4,2", "2 comes after 4"),
        ("2,2", "2 comes after 2"),
        ("8:4:1", "descending"),
        ("2^6..2^0", "descending"),
        ("3..8", "powers of two"),
        ("1:5", "START:STOP:STEP"),
        ("0,1", "'0' is outside"),
        ("2^41", "'2^41' is outside"),
        ("-1", "'-1' is not"),
        ("1.5", "'1.5' is not"),
        ("1_000", "'1_000' is not"),
        ("1:2^40:1", "more than 10,000"),  # and without making a list of 2^40
        ("1:8:0", "'0' is outside"),
        ("9" * 5000, "is not a positive"),
    ],
)
def test_bad_sweeps_are_refused_by_name(text, named):
    with pytest.raises(UserError) as caught:
        cli.parse_sweep(text)
    assert named in str(caught.value) and len(str(caught.value)) < 250


def test_clip_sweep(capsys):
    assert cli.clip_sweep([2**12, 2**13, 2**14], 8192, typed=False, what="context") == [2**12, 2**13]
    assert capsys.readouterr().out == "2^14 left out: context 8192\n"
    assert cli.clip_sweep([100, 8192], 8192, typed=True, what="context") == [100, 8192]
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="2\\^14 is above context 8192"):
        cli.clip_sweep([2**14], 8192, typed=True, what="context")
    with pytest.raises(UserError, match="no size of this preset fits"):
        cli.clip_sweep([100], 64, typed=False, what="context")
    assert cli.clip_sweep([1, 2], 1, typed=False, what="pages", option="--batch-sizes") == [1]
    assert capsys.readouterr().out == "--batch-sizes: 2 left out: pages 1\n", "one of several sweeps is named"


# --- options ---------------------------------------------------------------------------------------------------------
def full_parser() -> argparse.ArgumentParser:
    sweeps = {"--batch-sizes": "sizes, at 105 % of what fits", "--input-length": "tokens of a prompt"}
    return cli.build_parser("A question?\n\n    a command", sweeps=sweeps, text=True, compare=("hf", "vllm"))


def test_every_shared_option_is_in_the_help_and_nothing_else_is_needed():
    parser = full_parser()
    assert [name for name in SHARED.split() if name not in parser.format_help()] == []
    assert "    a command" in parser.format_help(), "the docstring keeps its lines"
    args = parser.parse_args([])
    assert (args.model, args.device, args.dtype, args.preset, args.seed) == (None, "auto", "auto", "auto", 0)
    assert args.repeats is args.warmup is args.ignore_eos is args.batch_sizes is args.input_length is None
    assert args.compare == () and not (args.resume or args.no_plot or args.debug or args.raw)


def test_values_are_parsed():
    typed = "--batch-sizes 2^0..2^2 --input-length 2^10 --compare hf,vllm,hf --stop-at-eos --device cuda:1 --warmup 0"
    args = full_parser().parse_args(typed.split())
    assert (args.batch_sizes, args.input_length, args.compare) == ([1, 2, 4], 1024, ("hf", "vllm"))
    assert args.ignore_eos is False and args.device == "cuda:1" and args.warmup == 0
    assert full_parser().parse_args(["--ignore-eos"]).ignore_eos is True


@pytest.mark.parametrize(
    "typed",
    [
        "--preset huge",
        "--batch-sizes 4,2",
        "--input-length 1,2",
        "--repeats 0",
        "--seed -1",
        "--seed x",
        "--device tpu",
        "--dtype int8",
        "--compare hf,ours",
        "--prompt a --prompts b",
        "--ignore-eos --stop-at-eos",
        "--context 0",
        "--batch 4",  # no abbreviations: they would change meaning when an option is added
        "--nonsense",
    ],
)
def test_a_bad_option_is_one_line_that_names_it_and_exits_2(typed, capsys):
    with pytest.raises(SystemExit) as caught:
        full_parser().parse_args(typed.split())
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.count("\n") == 1 and ": error: " in err and typed.split()[-2 if len(typed.split()) > 1 else 0] in err


def test_presets_fill_what_was_not_typed(capsys):
    presets = {"laptop": {"batch_sizes": (1, 2), "repeats": 3}, "course": {"batch_sizes": range(1, 4)}, "quick": {}}
    args = full_parser().parse_args(["--warmup", "0"])
    assert cli.apply_preset(args, presets, "cpu") == {"warmup"}
    assert (args.preset, args.batch_sizes, args.repeats, args.warmup) == ("laptop", [1, 2], 3, 0)
    assert capsys.readouterr().out == "preset laptop: batch-sizes 1,2; repeats 3; warmup 0\n"
    args = full_parser().parse_args(["--batch-sizes", "7"])
    assert cli.apply_preset(args, presets, "cuda") == {"batch_sizes"}
    assert (args.preset, args.batch_sizes, args.repeats, args.warmup) == ("course", [7], 5, 1)
    args = full_parser().parse_args(["--preset", "quick"])
    assert cli.preset_name(args, "cuda") == "quick"


# --- files -----------------------------------------------------------------------------------------------------------
def test_output_dir(tmp_path):
    args = argparse.Namespace(out=None)
    assert cli.output_dir(args, str(tmp_path / "script.py")) == tmp_path / "results"
    assert list((tmp_path / "results").iterdir()) == [], "the trial file is gone"
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(UserError, match="--out"):
            cli.output_dir(argparse.Namespace(out=str(bad)), "script.py")


@pytest.mark.parametrize("option", ["--out", "--prompts", "--dump-tokens"])
def test_a_home_folder_that_the_shell_left_as_it_was_typed(option, monkeypatch):
    monkeypatch.setenv("HOME", "/home/learner")
    for typed, meant in (("~/run", "/home/learner/run"), ("~nobody-of-that-name/x", "~nobody-of-that-name/x")):
        args = cli.build_parser("", text=True).parse_args([f"{option}={typed}"])
        assert getattr(args, option[2:].replace("-", "_")) == meant


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    cli.check_output_file(str(tmp_path / "tokens.jsonl"), "--dump-tokens")
    assert list(tmp_path.iterdir()) == [], "the trial file is gone"
    (tmp_path / "file").write_text("")
    for bad in (tmp_path, tmp_path / "none" / "x", tmp_path / "file" / "x", "/proc/x"):
        with pytest.raises(UserError, match="--dump-tokens"):
            cli.check_output_file(str(bad), "--dump-tokens")


prompt_texts = st.lists(
    st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1).filter(str.strip), min_size=1, max_size=5
)


@settings(deadline=None)
@given(prompt_texts)
def test_prompt_files_give_back_what_was_written(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "p.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    assert cli.read_prompts(folder / "p.txt") == texts
    (folder / "p.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
    assert cli.read_prompts(folder / "p.txt") == texts
    lines = [json.dumps(text if index % 2 else {"prompt": text}) for index, text in enumerate(texts)]
    (folder / "p.jsonl").write_text("\n".join(lines))
    assert cli.read_prompts(folder / "p.jsonl") == texts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", b'"a"\n\n{"prompt": 1}\n', "line 3: no prompt"),
        ("p.jsonl", b'"a"\n{"prompt"\n', "line 2: not JSON"),
        ("p.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("p.jsonl", b'{"prompt": "a", "max_tokens": 3}', "unknown key 'max_tokens'"),
        ("p.txt", b"good\n\xff\xfe\n", "line 2: not UTF-8"),
        ("p.txt", b"\n \n", "holds no prompt"),
    ],
)
def test_bad_prompt_files_name_the_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        cli.read_prompts(tmp_path / name)


def test_missing_prompt_file():
    with pytest.raises(UserError, match="--prompts: cannot read /nonexistent"):
        cli.read_prompts("/nonexistent")


# --- table -----------------------------------------------------------------------------------------------------------
def test_table_is_aligned(capsys):
    rows = [{"n": 8, "time": 0.0123456, "who": "hf"}, {"n": 1024, "time": 12345.678, "who": "ours"}, {"n": 1}]
    cli.print_table(rows, ["n", "time", "who"])
    assert capsys.readouterr().out.split("\n") == [
        "   n     time  who",
        "----  -------  ----",
        "   8  0.01235  hf",
        "1024    12346  ours",
        "   1",
        "",
    ]


# --- processes -------------------------------------------------------------------------------------------------------
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from common import cli
from common.errors import CheckFailed, UserError

class OutOfMemoryError(RuntimeError):  # named as torch's
    pass

def main(args):
    assert "torch" not in sys.modules and "matplotlib" not in sys.modules
{body}

cli.run(main, cli.build_parser("doc"))
"""


def script(tmp_path, body: str) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT), body=textwrap.indent(textwrap.dedent(body), "    ")))
    return [sys.executable, str(path)]


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("print('fine')", 0, ""),
        ("raise UserError('--out: no\\nsuch place')", 2, "script.py: error: --out: no such place"),
        ("raise CheckFailed('tokens differ')", 1, "script.py: check failed: tokens differ"),
        ("raise KeyboardInterrupt", 130, "script.py: interrupted"),
        ("raise MemoryError", 2, "script.py: error: out of memory"),
        ("raise OutOfMemoryError('tried 3 GiB\\nmore')", 2, "script.py: error: out of memory: tried 3 GiB"),
        ("raise RuntimeError('[..] DefaultCPUAllocator: not enough memory')", 2, "script.py: error: out of memory"),
        ("raise OSError(28, 'No space left on device', 'x.csv')", 2, "script.py: error: x.csv: No space left"),
        ("raise ZeroDivisionError('a\\nb')", 1, "script.py: internal error: ZeroDivisionError: a; --debug shows"),
        ("raise BrokenPipeError(32, 'of a subprocess')", 1, "script.py: internal error: BrokenPipeError"),
        ("sys.exit(5)", 5, ""),
    ],
)
def test_exit_codes(tmp_path, body, code, line):
    done = subprocess.run(script(tmp_path, body), capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(line) and done.stderr.count("\n") == (1 if line else 0)


def test_debug_shows_the_traceback(tmp_path):
    done = subprocess.run(
        [*script(tmp_path, "raise UserError('no')"), "--debug"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "Traceback" in done.stderr and done.stderr.endswith("script.py: error: no\n")


def test_control_c_keeps_what_there_is_then_exits_130(tmp_path):
    body = """
    import time
    rows = []
    with cli.keep_partial(args):
        rows.append(1)
        print("measuring", flush=True)
        time.sleep(60)
        rows.append(2)
    print("drawn", rows)
    raise CheckFailed("half a sweep")  # must not hide that it was interrupted
    """
    process = subprocess.Popen(script(tmp_path, body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "measuring\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == "drawn [1]\n"
    assert "interrupted" in err and "Traceback" not in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("typed", ["", "--help"])
def test_a_closed_pipe_ends_quietly(tmp_path, typed, unbuffered):
    command = script(tmp_path, "for i in range(200_000):\n    print('row', i)") + typed.split()
    read_end, write_end = os.pipe()
    os.close(read_end)  # the reader is gone before the first line
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60, env=environment)
    os.close(write_end)
    assert done.stderr == ""
    # Help is argparse's, which passes over what it cannot write; before Python 3.11 it did not.
    passed_over = typed and not (unbuffered and sys.version_info < (3, 11))
    assert done.returncode == (0 if passed_over else 141)


def test_help_imports_neither_torch_nor_matplotlib():
    probe = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "import runpy\n"
        "try: runpy.run_module('common.roofline', run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'matplotlib', 'numpy', 'triton'} & sys.modules.keys(), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "What does this machine allow?" in done.stdout

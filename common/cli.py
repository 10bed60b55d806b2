"""What every script's command line shares: options, sweeps, presets, exit codes, tables.

Imports no torch and no matplotlib, so that `--help` answers at once. A script is put together like this:

    parser = cli.build_parser(__doc__, sweeps={"--batch-sizes": "requests in one batch"})

    def main(args):
        out = cli.output_dir(args, __file__)                  # refused before anything is measured
        typed = cli.apply_preset(args, PRESETS, "cpu")        # fills args.batch_sizes, repeats, warmup
        with cli.keep_partial(args):                          # Ctrl-C ends the loop, not the script
            for batch_size in args.batch_sizes:
                ...measure, append a row...
        ...draw what there is, print the table...             # then `run` exits 130

    if __name__ == "__main__":
        cli.run(main, parser)
"""

import argparse
import os
import re
import tempfile
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError
from common.exits import EXIT_USER_ERROR, keep_partial, made_folders, one_line, run  # noqa: F401 - scripts use them
from common.prompt_files import read_prompts
from common.sweeps import parse_sweep, shown

PRESETS = ("auto", "quick", "laptop", "course")
DTYPES = ("auto", "float32", "float16", "bfloat16")
DEFAULT_REPEATS, DEFAULT_WARMUP = 5, 1


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line: the usage text above them hides what was wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {one_line(message)}\n")


def build_parser(
    doc: str | None,
    *,
    sweeps: Mapping[str, str] | None = None,
    text: bool = False,
    model: bool = True,
    compare: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """The options of every script. `doc` is the script's docstring and becomes the text of `--help`.

    sweeps:  option name -> help. A plural name (`--batch-sizes`) takes a sweep and gives a list of int; a singular one
             (`--input-length`) takes one number and gives an int. Both are None unless typed.
    text:    adds what scripts that generate text take: `--prompt`, `--prompts`, `--raw`, `--dump-tokens`, EOS handling.
             `args.ignore_eos` is True, False, or None when neither option was typed.
    model:   adds `--model` and `--context`.
    compare: names of the peers that `--compare` accepts; `args.compare` is a tuple, empty unless typed.

    `--repeats` and `--warmup` are None unless typed: `apply_preset` fills them.
    """
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    if model:
        parser.add_argument(
            "--model",
            type=nonempty,
            metavar="SOURCE",
            help="a checkpoint folder, a hub id, 'embedded' (small real weights) or 'random:SHAPE'; "
            "without it: $TLAB_MODEL, a local Llama-3-8B, or embedded",
        )
        parser.add_argument("--context", type=_positive, metavar="N", help="context length of a 'random:' model")
    parser.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="number format of the weights (default: auto)")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="auto",
        help="sizes: quick (at most 10 s), laptop (35 s on two cores), course (the handout's); "
        "auto is course on a GPU and laptop on a CPU",
    )
    _add_sizes(parser, sweeps or {})
    parser.add_argument(
        "--out", type=a_path, metavar="DIR", help="where to write (default: results/ beside the script)"
    )
    parser.add_argument("--seed", type=_natural, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--repeats", type=_positive, metavar="N", help="timed runs a point (default: the preset's)")
    parser.add_argument("--warmup", type=_natural, metavar="N", help="untimed runs before them (default: the preset's)")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that an earlier run wrote, measure the rest"
    )
    parser.add_argument("--no-plot", action="store_true", help="write the CSV only")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if compare:
        parser.add_argument(
            "--compare",
            type=_names_among(tuple(compare)),
            default=(),
            metavar="NAMES",
            help=f"also measure these, comma-separated: {', '.join(compare)}",
        )
    if text:
        _add_text_options(parser)
    return parser


def build_plot_parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of a script that only draws: where the CSVs are and the picture goes, and --debug."""
    parser = build_bare_parser(doc)
    parser.add_argument(
        "--out", type=a_path, metavar="DIR", help="folder of the CSVs (default: results/ beside the script)"
    )
    return parser


def build_bare_parser(doc: str | None) -> argparse.ArgumentParser:
    """What `run` needs and no more: --debug."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_sizes(parser: argparse.ArgumentParser, sweeps: Mapping[str, str]) -> None:
    for name, help_text in sweeps.items():
        help_text = help_text.replace("%", "%%")  # argparse formats help texts
        if name.endswith("s"):
            parser.add_argument(
                name, type=_sweep, metavar="SWEEP", help=f"{help_text}: 1,2,4 or 128:2048:128 or 2^0..2^6"
            )
        else:
            parser.add_argument(name, type=_one_size, metavar="N", help=help_text)


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", type=nonempty, metavar="TEXT", help="answer this prompt")
    source.add_argument("--prompts", type=a_path, metavar="FILE", help="a prompt a line; JSON lines if named .jsonl")
    parser.add_argument("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    parser.add_argument("--dump-tokens", type=a_path, metavar="FILE", help="write the token ids as JSON lines")
    eos = parser.add_mutually_exclusive_group()
    eos.add_argument("--ignore-eos", dest="ignore_eos", action="store_const", const=True, help="go on past end-of-text")
    eos.add_argument("--stop-at-eos", dest="ignore_eos", action="store_const", const=False, help="stop at end-of-text")


# --- values ----------------------------------------------------------------------------------------------------------
def _sweep(text: str) -> list[int]:
    try:
        return parse_sweep(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _one_size(text: str) -> int:
    values = _sweep(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"takes one number, not the sweep {shown(text)}")
    return values[0]


def _natural(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number of 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number of 1 or more")
    return int(text)


def nonempty(text: str) -> str:
    """An argparse type: a text that is not empty, as an unset shell variable would give."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def a_path(text: str) -> str:
    """An argparse type: a file or folder. A shell leaves the `~` of `--out=~/run` as it is, so it is expanded here."""
    return os.path.expanduser(nonempty(text))


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not auto, cpu, cuda or cuda:N")
    return text


def _names_among(choices: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{shown(name)} is not one of {', '.join(choices)}")
        return names

    return parse


# --- presets and sizes -----------------------------------------------------------------------------------------------
def preset_name(args: argparse.Namespace, device_type: str) -> str:
    """The preset in use: what was typed, or for `auto` course on `cuda` and laptop elsewhere."""
    if args.preset != "auto":
        return args.preset
    return "course" if device_type == "cuda" else "laptop"


def apply_preset(args: argparse.Namespace, presets: Mapping[str, Mapping[str, Any]], device_type: str) -> set[str]:
    """Fill the options that were not typed from the preset in use, print the sizes, return the names that were typed.

    `presets` maps quick, laptop and course to {option name as in args: value}; `repeats` and `warmup` may be among
    them (else 5 and 1). `args.preset` becomes the resolved name, so provenance records it. The returned set answers
    `clip_option(args, "seq_lens", ..., typed=typed)`.
    """
    args.preset = preset_name(args, device_type)
    sizes = {"repeats": DEFAULT_REPEATS, "warmup": DEFAULT_WARMUP, **presets[args.preset]}
    typed = {name for name in sizes if getattr(args, name, None) is not None}
    for name, value in sizes.items():
        if name not in typed:
            setattr(args, name, list(value) if isinstance(value, (list, tuple, range)) else value)
    parts = (f"{name.replace('_', '-')} {_sizes_text(getattr(args, name))}" for name in sorted(sizes))
    print(f"preset {args.preset}: {'; '.join(parts)}")
    return typed


def _sizes_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def clip_sweep(values: Sequence[int], limit: int, *, typed: bool, what: str, option: str = "") -> list[int]:
    """The values of at most `limit`. A preset's larger ones are left out with a printed line; a typed one is an error.

    what: what the limit is, as in "context": "2^14 left out: context 8192". option: its name, to begin the line with.
    """
    kept = [value for value in values if value <= limit]
    over = [_size_name(value) for value in values if value > limit]
    named = f"{option}: " if option else ""
    if over and typed:
        raise UserError(f"{named}{over[0]} is above {what} {limit}; give sizes of at most {limit}")
    if not kept:
        raise UserError(f"{named}no size of this preset fits {what} {limit}: the smallest is {min(values, default=0)}")
    if over:
        print(f"{named}{', '.join(over)} left out: {what} {limit}")
    return kept


def clip_option(args: argparse.Namespace, name: str, limit: int, *, typed: Container[str], what: str) -> list[int]:
    """`clip_sweep` of the option `name` (as in args), which its lines name; typed: what `apply_preset` returned."""
    return clip_sweep(getattr(args, name), limit, typed=name in typed, what=what, option=option_name(name))


def option_name(name: str) -> str:
    """kv_lens -> --kv-lens."""
    return f"--{name.replace('_', '-')}"


def _size_name(value: int) -> str:
    return f"2^{value.bit_length() - 1}" if value >= 1024 and value & (value - 1) == 0 else str(value)


# --- files -----------------------------------------------------------------------------------------------------------
def output_dir(args: argparse.Namespace, script_file: str) -> Path:
    """`--out`, or results/ beside the script; created, and tried by writing, so that it is refused before measuring.

    Folders made here are taken away again by `run` where the script ends without having written into them.
    """
    folder = Path(args.out) if args.out else Path(script_file).resolve().parent / "results"
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        made_folders.extend(new)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--out: cannot write into {folder}: {reason}; give a folder with --out DIR") from None
    return folder


def refuse_unused(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """UserError for an option among `names` (as in args) that was typed and would be ignored; `why` ends the line.

    To be asked before `apply_preset` fills what was not typed.
    """
    for name in names:
        if getattr(args, name) not in (None, False, ()):
            raise UserError(f"{option_name(name)}: {why}")


def typed_prompts(args: argparse.Namespace) -> list[str] | None:
    """What `--prompt` or `--prompts` gave, or None when neither was typed; what it would ignore is refused."""
    if args.prompt is None and args.prompts is None:
        if args.raw:
            raise UserError("--raw: goes with --prompt or --prompts only; a measurement uses no chat template")
        return None
    measuring = [name for name in ("resume", "compare", "padded", "separate") if hasattr(args, name)]
    refuse_unused(args, measuring, "belongs to a measurement, and --prompt answers without one; leave one of them out")
    return [args.prompt] if args.prompt is not None else read_prompts(args.prompts)


def check_output_file(path: str, option: str) -> None:
    """Refuse a file that could not be written, before anything is measured. `option` is named in the error."""
    folder = Path(path).resolve().parent
    if Path(path).is_dir():
        raise UserError(f"{option} {path}: is a folder; give a file's name")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {path}: cannot write into {folder}: {error.strerror}; give a file in a folder you can write"
        ) from None


def print_written(*paths: str | Path) -> None:
    """Say which files the script wrote, relative to the working directory where that is shorter."""
    for path in map(str, paths):
        print(f"wrote {min(path, os.path.relpath(path), key=len)}")


# --- table -----------------------------------------------------------------------------------------------------------
def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """One table on stdout: numbers to four significant digits and right-aligned, text left-aligned, None empty."""
    cells = [[format_value(row.get(column)) for column in columns] for row in rows]
    numeric = [all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    for line in [list(columns), ["-" * width for width in widths], *cells]:
        parts = [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric)]
        print("  ".join(parts).rstrip())


def format_value(value: Any) -> str:
    """A cell of a table: 0.01235, 12.35, 12346 (never 1.235e+04), text as it is, None empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)

"""The command line of each lab's grade.py."""

import argparse
import shutil
import sys
import time
from pathlib import Path

from common.errors import UserError, file_and_reason


def parser(lab_name: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=f"Grade the lab {lab_name}. Exit code: 0 correct, 1 wrong, 2 bad input, 3 not started, 4 blocked."
    )
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--submission", type=Path, metavar="DIR", help="grade the file in DIR (a student's folder or clone)"
    )
    which.add_argument("--solution", type=int, metavar="N", help="grade step N of solutions/")
    p.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        help="only the case called NAME, else those whose names contain NAME; repeatable",
    )
    p.add_argument("--list", action="store_true", help="list the cases and stop")
    p.add_argument(
        "--quick", action="store_true", help="a few cases only; nvcc is asked only where g++ refuses the file"
    )
    p.add_argument("--hint", action="store_true", help="also say what to look at")
    p.add_argument("--watch", action="store_true", help="grade again whenever the file changes; Ctrl-C ends it")
    p.add_argument("--no-gpu", action="store_true", help="use the CPU emulation even where there is a GPU")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    p.add_argument("--gradescope", type=Path, metavar="FILE", help="write Gradescope's results.json")
    p.add_argument("--reset", action="store_true", help="restore the stub; your file is kept with .bak at its end")
    return p


def find_source(lab, args: argparse.Namespace) -> Path:
    """The file to grade: the learner's, a student's (--submission) or a solution."""
    if args.solution is not None:
        steps = lab.solutions()
        matching = [path for path in steps if path.name.startswith(f"{args.solution}_")]
        if not matching:
            have = ", ".join(path.name for path in steps) or "none in this copy"
            raise UserError(f"--solution {args.solution}: no such step of {lab.name}; there are: {have}")
        return matching[0]
    if args.submission is None:
        return lab.folder / lab.source
    for candidate in (args.submission / lab.name / lab.source, args.submission / lab.source):
        if candidate.is_file():
            return candidate
    raise UserError(f"--submission {args.submission}: holds neither {lab.source} nor {lab.name}/{lab.source}")


def stub_of(lab) -> Path:
    """The pristine stub: in common/grading/stubs (a handout; see handout.py) or tests/grading/stubs (a clone)."""
    from common.grading.lab import ROOT

    for folder in ("common/grading/stubs", "tests/grading/stubs"):
        if (path := ROOT / folder / lab.name / lab.source).is_file():
            return path
    raise UserError(f"the pristine {lab.source} is missing from common/grading/stubs and tests/grading/stubs")


def reset(lab) -> None:
    """Puts the stub back; the learner's file becomes FILE.bak (FILE.bak2 ... if that is taken)."""
    target, stub = lab.folder / lab.source, stub_of(lab)
    if target.exists() and target.read_bytes() == stub.read_bytes():
        print(f"{target} is the stub already")
        return
    if target.exists():
        backup = target.with_name(target.name + ".bak")
        number = 2
        while backup.exists():
            backup = target.with_name(f"{target.name}.bak{number}")
            number += 1
        target.rename(backup)
        print(f"your file is kept as {backup}")
    shutil.copyfile(stub, target)
    print(f"restored {target}")


def _grade_once(lab, source: Path, args: argparse.Namespace) -> int:
    from common.grading import scorecard
    from common.grading.grader import Options, grade

    options = Options(cases=tuple(args.case), quick=args.quick, use_gpu=not args.no_gpu)
    report = grade(lab, source, options)
    scorecard.show(report, hint=args.hint)
    for path, write in ((args.json, scorecard.write_json), (args.gradescope, scorecard.write_gradescope)):
        if path:
            try:
                write(report, path)
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror})") from None
            print(f"wrote {path}")
    return report.outcome.exit_code


def _watch(lab, source: Path, args: argparse.Namespace) -> int:
    seen = None
    while True:
        stamp = source.stat().st_mtime_ns if source.exists() else None
        if stamp is not None and stamp != seen:
            seen = stamp
            code = _grade_once(lab, source, args)
            print(f"exit code {code}; watching {source}, Ctrl-C ends")
        time.sleep(0.5)


def main(lab_name: str, argv: list[str] | None = None, after: str = "") -> None:
    """Parses, grades, exits with the outcome's code. `after` is printed behind a scorecard."""
    args = parser(lab_name).parse_args(argv)
    from common.grading.lab import get

    try:
        lab = get(lab_name)
        if args.list:
            for case in lab.cases:
                print(f"{case.name:40} {case.group}")
            sys.exit(0)
        if args.reset:
            reset(lab)
            sys.exit(0)
        source = find_source(lab, args)
        code = _watch(lab, source, args) if args.watch else _grade_once(lab, source, args)
        if after:
            print(after)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:  # a folder or a file that may not be read or written
        print(f"error: {file_and_reason(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)

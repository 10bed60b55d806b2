"""Grades a class: every folder in DIR_OF_DIRS is a student, with files as in the labs or in their folders.

    python -m common.grading.batch submissions --out grades.csv
    python -m common.grading.batch submissions --lab silu/CUDA --out grades.csv

One row a student and lab, written as soon as it is known; whatever happens with one file, the next is graded. A file
that a student did not hand in is `missing`.
"""

import argparse
import csv
import sys
from pathlib import Path

from common.errors import UserError, file_and_reason

COLUMNS = ["student", "lab", "outcome", "earned", "possible", "lesson", "detail"]


def grade_one(student: Path, lab_name: str, options) -> dict:
    """A row. Never raises but for Ctrl-C: an error of ours is the outcome `grader error`."""
    from common.grading.grader import grade
    from common.grading.lab import get

    row = dict.fromkeys(COLUMNS, "") | {"student": student.name, "lab": lab_name}
    try:
        lab = get(lab_name)
        found = [p for p in (student / lab.name / lab.source, student / lab.source) if p.is_file()]
        if not found:
            return row | {"outcome": "missing", "earned": 0, "possible": 80}
        report = grade(lab, found[0], options)
    except Exception as error:  # the class must be graded to its end
        return row | {"outcome": "grader error", "detail": f"{type(error).__name__}: {error}"}
    first = next((case for case in report.cases if not case.passed), None)
    return row | {
        "outcome": report.outcome.value,
        "earned": round(report.earned, 2),
        "possible": round(report.possible, 2),
        "lesson": report.lesson.text if report.lesson else "",
        "detail": f"{first.name}: {first.detail}" if first else "",
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, metavar="DIR_OF_DIRS")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the CSV to write")
    p.add_argument("--lab", action="append", metavar="LAB", help="only this lab; repeatable")
    p.add_argument("--no-gpu", action="store_true")
    p.add_argument("--quick", action="store_true", help="a few cases only")
    args = p.parse_args(argv)
    from common.grading.grader import Options
    from common.grading.lab import LABS, get

    try:
        if not args.folder.is_dir():
            raise UserError(f"{args.folder}: no such folder")
        labs = [get(name).name for name in args.lab or LABS]
        students = sorted(path for path in args.folder.iterdir() if path.is_dir())
        if not students:
            raise UserError(f"{args.folder}: holds no folders; one a student is expected")
        file = args.out.open("w", newline="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {file_and_reason(error)}", file=sys.stderr)
        return 2
    try:
        with file:
            grade_all(students, labs, Options(use_gpu=not args.no_gpu, quick=args.quick), file)
    except KeyboardInterrupt:
        print(f"stopped: {args.out} has the rows so far", file=sys.stderr)
        return 130
    print(f"wrote {args.out}")
    return 0


def grade_all(students: list[Path], labs: list[str], options, file) -> None:
    """A row a student and lab, in `file` as soon as it is known."""
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    for student in students:
        for lab in labs:
            row = grade_one(student, lab, options)
            writer.writerow(row)
            file.flush()
            print(f"{row['student']:24} {lab:16} {row['outcome']:18} {row['earned']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Grades all labs one after another (`make grade`): python -m common.grading.all_labs [--quick]

Exit code: the first that is not 0, so that a script sees whether anything is left to do.
"""

import subprocess
import sys

from common.grading.cli import parser
from common.grading.lab import LABS, ROOT


def main() -> int:
    parser(", ".join(LABS)).parse_args()  # --help and a wrong option are answered once, not five times
    codes = [subprocess.run([sys.executable, str(ROOT / name / "grade.py"), *sys.argv[1:]]).returncode for name in LABS]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the lab's own process has it, too
        sys.exit(130)

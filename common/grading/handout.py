"""Writes the zip that learners get: the tracked files without solutions/ and tests/grading/, every lab at its stub.

python -m common.grading.handout --out transformers-lab-handout.zip
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

from common.errors import UserError, file_and_reason
from common.grading.lab import LABS, ROOT, get

FOLDER = "transformers-lab"
STUBS = "tests/grading/stubs"
FOR_INSTRUCTORS = ", [for instructors](docs/instructors.md)"  # in README.md: the page is not handed out


def chosen_files() -> list[str]:
    """Tracked files that go into the handout, relative to the root; UserError outside a git clone."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{ROOT}: not a git clone, so the handout's files are not known")
    hidden = ("tests/grading/", "docs/instructors.md", "tests/gpu/test_labs_gpu.py")
    keep = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    return [name for name in keep if not name.startswith(hidden) and "/solutions/" not in f"/{name}"]


def write(target: Path) -> int:
    """Writes the zip; returns the number of files. Each lab's file is its pristine stub, whatever the clone's is."""
    stubs = {f"{name}/{get(name).source}": ROOT / STUBS / name / get(name).source for name in LABS}
    names = chosen_files()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(set(names) - {"README.md"} | set(stubs)):
            archive.write(stubs.get(name, ROOT / name), f"{FOLDER}/{name}")
        readme = (ROOT / "README.md").read_text().replace(FOR_INSTRUCTORS, "")
        archive.writestr(f"{FOLDER}/README.md", readme)
        for name, path in stubs.items():  # for grade.py --reset
            archive.write(path, f"{FOLDER}/common/grading/stubs/{name}")
    return len(names)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("transformers-lab-handout.zip"), metavar="FILE")
    args = p.parse_args()
    try:
        count = write(args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {file_and_reason(error)}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {count} files, in the folder {FOLDER}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())

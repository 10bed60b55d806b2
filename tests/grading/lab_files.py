"""Shared by the tests of the labs: where the pristine stubs and the wrong files are, and what each must teach."""

import importlib.util
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from common.grading.lab import LABS

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CUDA_LABS = [name for name in LABS if name != "silu"]

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")


def stub_path(lab_name: str) -> Path:
    return next(p for p in (HERE / "stubs" / lab_name).iterdir() if p.is_file())


def wrong_files(lab_name: str) -> dict[str, dict]:
    folder = HERE / "wrong" / lab_name
    return tomllib.loads((folder / "lessons.toml").read_text())


def all_wrong() -> list:
    found = []
    for lab_name in LABS:
        for i, (name, want) in enumerate(wrong_files(lab_name).items()):
            slow = want["lesson"] == "endless" or (lab_name == "silu" and i >= 5)
            found.append(
                pytest.param(lab_name, name, want, id=f"{lab_name}/{name}", marks=[pytest.mark.slow] if slow else [])
            )
    return found


def anonymous_copy(source: Path) -> Path:
    """The file under a name that says nothing and without its comments: lessons must come from behaviour."""
    text = source.read_text()
    if source.suffix == ".py":
        text = re.sub(r"^#.*\n", "", text, flags=re.M)
    else:
        text = re.sub(r"//[^\n]*", "", text)
    folder = Path(tempfile.mkdtemp(prefix="tlab-test-"))
    copy = folder / f"submitted{source.suffix}"
    copy.write_text(text)
    return copy

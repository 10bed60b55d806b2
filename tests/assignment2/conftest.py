"""Assignment 2's scripts are tested as a user meets them: on the smallest model and the quick preset."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from assignment2_scripts import FOLDER, MEASURING, TINY, run


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """(folder, {script: its finished process}): all four scripts after one another, as the demo runs them."""
    out = tmp_path_factory.mktemp("measured")
    done = {}
    for name in MEASURING:
        more = ["--dump-tokens", out / f"{name}.tokens.jsonl"]
        done[name] = run(name, *TINY, "--out", out, *more)
    return out, done


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Run a script inside this process (torch is loaded already): (exit code, stdout, stderr)."""

    def call(name: str, *args: object):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    # As `run` does with OMP_NUM_THREADS: the number of threads is provenance, and --resume compares it.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield call
    torch.set_num_threads(before)

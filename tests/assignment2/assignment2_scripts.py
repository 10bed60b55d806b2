"""How the tests start assignment 2's scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "assignment2"
MEASURING = ("no_kv", "single_batch", "uniform_prefill", "different_prefill")
TINY = ("--model", "random:tiny", "--device", "cpu", "--preset", "quick")


def command(name: str, *args: object, folder: Path = FOLDER) -> list[str]:
    return [sys.executable, str(folder / f"{name}.py"), *map(str, args)]


def run(name: str, *args: object, folder: Path = FOLDER, code: int = 0, **kw) -> subprocess.CompletedProcess:
    """Run a script to its end and assert its exit code."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | kw.pop("env", {})
    done = subprocess.run(
        command(name, *args, folder=folder), capture_output=True, text=True, timeout=180, env=env, **kw
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done

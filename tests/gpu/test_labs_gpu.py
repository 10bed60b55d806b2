"""Stubs are not started, wrong files never pass, solutions pass all cases built by nvcc, the best are timed."""

import importlib.util
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from filelock import FileLock

torch = pytest.importorskip("torch")

from common.grading import build, gpu  # noqa: E402
from common.grading.grader import Options, grade  # noqa: E402
from common.grading.lab import LABS, ROOT, get  # noqa: E402
from common.grading.outcome import Outcome  # noqa: E402

if not torch.cuda.is_available() or not gpu.present():
    pytest.skip("needs CUDA and nvcc", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("lab_files", ROOT / "tests/grading/lab_files.py")
lab_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab_files)

# A kernel that hangs takes its turns of the GPU for half a minute: no other hangs meanwhile, and nothing is timed.
HANGING = {"endless", "divergent-barrier", "warp-hang"}
GPU_ALONE = FileLock(Path(tempfile.gettempdir()) / "tlab-gpu-alone.lock")
STEPS = [pytest.param(name, step, id=f"{name}/{step.stem}") for name in LABS for step in get(name).solutions()]
# What a GPU may get right by luck or by its nature: a race where no tool looks for it, memory that happens to hold 0, a
# leak, a host or a GPU that may touch the other's memory, a grid that is too large only for a small device.
LENIENT = {
    "race",
    "uninitialised",
    "leak",
    "copy-direction",
    "host-touches-device",
    "cooperative-too-large",
    "warp-hang",
}
LENIENT |= {"divergent-barrier", "out-of-bounds", "state-kept", "device-touches-host", "dynamic-shared", "local-array"}


@pytest.mark.parametrize("lab_name", list(LABS))
def test_stub_is_not_started(lab_name):
    report = grade(get(lab_name), lab_files.stub_path(lab_name), Options(quick=True))
    assert report.outcome is Outcome.NOT_STARTED and report.machine in ("GPU", "")


@pytest.mark.parametrize("lab_name, step", STEPS)
def test_solution_is_correct_on_the_gpu(lab_name, step):
    report = grade(get(lab_name), step, Options(speed=False))
    assert report.outcome is Outcome.CORRECT, report.lesson
    assert report.machine == "GPU" and report.earned == 80


@pytest.mark.parametrize("lab_name, name, want", lab_files.all_wrong())
def test_wrong_file_is_wrong_on_the_gpu(lab_name, name, want):
    source = ROOT / "tests/grading/wrong" / lab_name / (name + Path(get(lab_name).source).suffix)
    with GPU_ALONE if want["lesson"] in HANGING else nullcontext():
        report = grade(get(lab_name), source, Options(speed=False, quick=want["lesson"] == "endless"))
    no_launch_count = want["lesson"] == "no-kernel" and get(lab_name).kind == "cuda"  # the emulation counts launches
    if want["lesson"] not in LENIENT and not no_launch_count:
        assert report.outcome.exit_code == 1, report.outcome
    elif report.outcome is Outcome.CORRECT:
        pytest.skip(f"{want['lesson']} does not show on this GPU")


@pytest.mark.parametrize("lab_name", list(LABS))
def test_best_solution_is_timed_and_not_suspect(lab_name):
    with GPU_ALONE:
        report = grade(get(lab_name), get(lab_name).solutions()[-1])
    assert report.outcome is Outcome.CORRECT, report.lesson
    assert report.speed is not None and report.possible == 100, report.notes
    assert report.speed.form == ("wall" if lab_name == "host_GPU" else "graph")


@pytest.mark.parametrize("lab_name", [name for name in LABS if name != "silu"])
def test_main_runs(lab_name, tmp_path):
    lab = get(lab_name)
    source, program = lab.solutions()[-1], tmp_path / "main"
    command = [*build.gpu_flags(), "-I", str(lab.folder), "-o", str(program), str(lab.folder / "main.cu"), str(source)]
    subprocess.run(command, check=True)
    with GPU_ALONE:
        done = subprocess.run([str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and "correct." in done.stdout, done.stdout + done.stderr

"""The labs on a GPU: solutions pass all cases built by nvcc, and the best are timed and not suspect."""

import shutil

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or shutil.which("nvcc") is None:
    pytest.skip("needs CUDA and nvcc", allow_module_level=True)

from common.grading.grader import Options, grade  # noqa: E402
from common.grading.lab import LABS, get  # noqa: E402
from common.grading.outcome import Outcome  # noqa: E402

STEPS = [pytest.param(name, step, id=f"{name}/{step.stem}") for name in LABS for step in get(name).solutions()]


@pytest.mark.parametrize("lab_name, step", STEPS)
def test_solution_is_correct_on_the_gpu(lab_name, step):
    report = grade(get(lab_name), step, Options(cases=("=",)))
    assert report.outcome is Outcome.CORRECT, report.lesson


@pytest.mark.parametrize("lab_name", list(LABS))
def test_best_solution_is_timed_and_not_suspect(lab_name):
    report = grade(get(lab_name), get(lab_name).solutions()[-1])
    assert report.outcome is Outcome.CORRECT, report.lesson
    assert report.speed is not None and report.possible == 100

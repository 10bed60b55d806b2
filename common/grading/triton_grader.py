"""Grades the Triton lab: the same cases, comparisons and lessons, with triton_worker.py in place of a built program."""

import importlib.util
import sys
import tempfile
from pathlib import Path

from common.grading import gpu, run
from common.grading.check import evaluate
from common.grading.lab import Lab, inputs_of
from common.grading.outcome import Lesson, Outcome, Report

SCHEDULES = (run.FIRST, run.Schedule(fill="large"))


def grade_triton(lab: Lab, source: Path, options) -> Report:
    """Report for `source`; under Triton's interpreter unless there is a GPU."""
    from common.grading import grader

    report = Report(lab.name, source.name, Outcome.CORRECT)
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        text = f"{' and '.join(missing)} cannot be imported here: pip install -r requirements.txt (Triton needs Linux)"
        return grader.stopped(report, lab, Outcome.BLOCKED, Lesson("blocked", text))
    on_gpu = options.use_gpu and gpu.present(need_nvcc=False)
    cases = grader.choose_cases(lab, options, on_gpu=on_gpu)
    inputs = [inputs_of(lab, case) for case in cases]
    command = [sys.executable, Path(__file__).with_name("triton_worker.py"), source.resolve()]
    variables = {} if on_gpu else {"TRITON_INTERPRET": "1"}
    with tempfile.TemporaryDirectory(prefix="tlab-grade-") as folder:
        work = Path(folder)
        run.write_jobs(lab, cases, inputs, work)
        runs = {
            s: run.run_cases(command, cases, s, work, gpu=on_gpu, variables=variables)
            for s in SCHEDULES[: 1 if options.quick else 2]
        }
        evaluations = [
            evaluate(lab, case, inputs[i], {s: r[i] for s, r in runs.items()}) for i, case in enumerate(cases)
        ]
        first = runs[run.FIRST]
        for kind, outcome, lesson in (
            ("import-error", Outcome.DOES_NOT_COMPILE, "does-not-compile"),
            ("not-implemented", Outcome.NOT_STARTED, "not-started"),
        ):
            found = [text for r in first for k, text in r.findings if k == kind]
            if found and (kind == "import-error" or len(found) == len(cases)):
                text = (
                    found[0]
                    if kind == "import-error"
                    else f"`{lab.function}` is still to be written: start with TODO 1"
                )
                return grader.stopped(report, lab, outcome, Lesson(lesson, text))
        report.machine = "GPU" if on_gpu else "Triton's interpreter on the CPU (no GPU here)"
        grader.judge(lab, evaluations, report)
        if on_gpu and options.speed and not options.cases and report.outcome is Outcome.CORRECT:
            gpu.measure_speed(lab, source.resolve(), report, work)
        elif not on_gpu:
            report.notes.append(grader.without_speed(report))
    return report

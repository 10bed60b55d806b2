"""compute-sanitizer's reports become findings at the learner's line; a tool that does not run is a note."""

import pytest

from common.grading import sanitizer
from common.grading.check import evaluate
from common.grading.grader import _sanitize, judge
from common.grading.lab import get, inputs_of
from common.grading.outcome import Outcome, Report
from common.grading.run import FIRST, CaseRun

MEMCHECK = """========= COMPUTE-SANITIZER
case 0
case 3
========= Invalid __global__ write of size 4 bytes
=========     at silu_kernel(const float *, float *, int)+0x90 in /home/ada/silu.cu:12
=========     by thread (33,0,0) in block (0,0,0)
=========     Access at 0x7f3a82a00284 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: main in /tmp/harness.h:190 [0x1234] in gpu
=========
========= Invalid __global__ write of size 4 bytes
=========     at silu_kernel(const float *, float *, int)+0x90 in /home/ada/silu.cu:12
case 4
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
case 7
========= Error: Race reported between Write access at rms_norm_matrix_kernel(const float *, float *)+0x1f0 in /home/ada/rms_norm_matrix.cu:21
=========     and Read access at rms_norm_matrix_kernel(const float *, float *)+0x250 in /home/ada/rms_norm_matrix.cu:24 [512 hazards]
=========
========= Warning: Race reported between Write access at k()+0x10 in /home/ada/a.cu:1
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""  # noqa: E501
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation\n"


def test_reports_are_found_once_a_case_with_their_line():
    ((case, kind, text),) = sanitizer.parse(MEMCHECK)
    assert (case, kind) == (3, "out-of-bounds")
    assert text == "silu.cu:12: compute-sanitizer: Invalid __global__ write of size 4 bytes"


def test_a_race_names_the_line_and_a_warning_is_none():
    ((case, kind, text),) = sanitizer.parse(RACECHECK)
    assert (case, kind) == (7, "race-hazard") and text.startswith("rms_norm_matrix.cu:21: ")


def test_a_tool_that_is_refused_is_not_usable():
    assert sanitizer.usable(MEMCHECK) and sanitizer.usable(RACECHECK) and not sanitizer.usable(REFUSED)
    assert sanitizer.parse(REFUSED) == []


@pytest.mark.parametrize(
    "texts, outcome, note",
    [
        ({"memcheck": MEMCHECK.replace("case 3", "case 1"), "racecheck": "RACECHECK SUMMARY"}, Outcome.CRASHES, ""),
        ({"memcheck": "ERROR SUMMARY", "racecheck": RACECHECK.replace("case 7", "case 1")}, Outcome.RACES, ""),
        ({"memcheck": REFUSED, "racecheck": None}, Outcome.CORRECT, "does not run on this machine"),
    ],
)
def test_findings_spoil_a_case_that_gave_the_right_result(monkeypatch, tmp_path, texts, outcome, note):
    lab = get("silu/CUDA")
    cases = [case for case in lab.cases if case.quick]
    inputs = [inputs_of(lab, case) for case in cases]
    evaluations = []
    for case, arrays in zip(cases, inputs):
        right = lab.expected(case, arrays).astype("float32")
        evaluations.append(evaluate(lab, case, arrays, {FIRST: CaseRun(output=right, ran=True, work=1)}))
    monkeypatch.setattr(sanitizer, "find", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitizer, "run", lambda tool, *rest: texts[tool])
    notes = _sanitize(evaluations, tmp_path / "program", tmp_path)
    report = Report(lab.name, lab.source, Outcome.CORRECT)
    judge(lab, evaluations, report)
    assert report.outcome is outcome and note in " ".join(notes)
    assert (tmp_path / "sanitizer" / "jobs").read_text().count("\n") == len(cases)
    if report.lesson:
        assert ".cu:" in report.lesson.text and not report.cases[0].passed

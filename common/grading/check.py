"""Compares outputs: with the oracle, between orders of execution, between fill patterns."""

from dataclasses import dataclass

import numpy as np

from common.grading.lab import OUTPUT_FILL, Case, Lab
from common.grading.run import FIRST, CaseRun, Schedule


@dataclass
class Evaluation:
    """One case under all schedules."""

    case: Case
    inputs: list[np.ndarray]
    expected: np.ndarray
    tolerance: np.ndarray
    runs: dict[Schedule, CaseRun]

    @property
    def first_failure(self) -> tuple[Schedule, CaseRun] | None:
        """The first schedule under which the case fails."""
        for schedule, run in self.runs.items():
            if not self.passes(run):
                return schedule, run
        return None

    @property
    def passed(self) -> bool:
        return bool(self.runs) and self.first_failure is None

    def passes(self, run: CaseRun) -> bool:
        return run.ran and run.crash is None and not run.findings and self.matches(run.output)

    def matches(self, output: np.ndarray | None) -> bool:
        return output is not None and output.shape == self.expected.shape and not self.wrong(output).any()

    def wrong(self, output: np.ndarray) -> np.ndarray:
        """Which elements differ from the oracle by more than the tolerance."""
        return differs(output, self.expected, self.tolerance)

    def unwritten(self) -> np.ndarray:
        """Which elements hold what their memory was filled with, whatever that was: nobody wrote them."""
        untouched = np.ones(self.expected.shape, dtype=bool)
        looked = False
        for schedule, run in self.runs.items():
            if schedule.order == FIRST.order and run.output is not None and run.output.shape == self.expected.shape:
                untouched &= run.output.view(np.uint32) == OUTPUT_FILL[schedule.fill]
                looked = True
        return untouched & looked

    def describe(self, run: CaseRun) -> str:
        """First differing element, got and expected."""
        if run.crash:
            return run.crash.text
        if run.findings:
            return run.findings[0][1]
        if not run.ran:
            return "not run after earlier crashes"
        bad = self.wrong(run.output)
        i = int(np.argmax(bad))
        got = "never written" if self.unwritten()[i] else f"{run.output[i]:.7g}"
        return (
            f"{int(bad.sum())} of {bad.size} elements differ; first [{i}]: got {got}, expected {self.expected[i]:.7g}"
        )


def differs(a: np.ndarray, b: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """Elementwise: not equal within the tolerance. NaN equals NaN, an infinity equals itself.

    A NaN tolerance accepts anything at that element (where a definition leaves the value open).
    """
    with np.errstate(all="ignore"):
        a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= tolerance) | np.isnan(tolerance)
    return ~same


def evaluate(lab: Lab, case: Case, inputs: list[np.ndarray], runs: dict[Schedule, CaseRun]) -> Evaluation:
    with np.errstate(all="ignore"):
        expected = np.asarray(lab.expected(case, inputs), dtype=np.float64).ravel()
        tolerance = np.asarray(lab.tolerance(case, inputs, expected), dtype=np.float64)
    return Evaluation(case, inputs, expected, np.broadcast_to(tolerance, expected.shape), runs)


SUM_ROUNDING = 2e-5  # relative: what another order of additions may change in a float32 sum


def _same(one: CaseRun, other: CaseRun, tolerance: np.ndarray) -> bool:
    if one.output is None or other.output is None:
        return True  # a crash is a finding of its own
    # A wrong value's rounding has to do with its own size, not with that of the expected one.
    size = np.where(np.isfinite(one.output), np.abs(one.output.astype(np.float64)), 0.0)
    tolerance = np.maximum(tolerance, SUM_ROUNDING * size)  # keeps a NaN: anything goes there
    return not differs(one.output, other.output, tolerance).any()


def races(evaluation: Evaluation) -> str | None:
    """Two orders of execution whose results differ, as a phrase; None if there are none."""
    by_fill: dict[str, list[tuple[Schedule, CaseRun]]] = {}
    for schedule, run in evaluation.runs.items():
        by_fill.setdefault(schedule.fill, []).append((schedule, run))
    for group in by_fill.values():
        for schedule, run in group[1:]:
            if not _same(group[0][1], run, 4 * evaluation.tolerance):
                return "two runs" if schedule.order == "again" else f"{group[0][0].order} and {schedule.order}"
    return None


def follows_fill(evaluation: Evaluation) -> bool:
    """Whether the result depends on what memory held that was never written (beyond untouched output elements)."""
    runs = [(s, r) for s, r in evaluation.runs.items() if s.order == "ascending" and r.output is not None]
    if len(runs) != 2:
        return False
    different = differs(runs[0][1].output, runs[1][1].output, 4 * evaluation.tolerance)
    return bool((different & ~evaluation.unwritten()).any())

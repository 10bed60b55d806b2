"""From behaviour to lesson: which known mistake explains all failing cases, and no passing one.

Nothing here looks at the source. The evidence is crashes and findings of the emulation, results that differ between
orders of execution or fill patterns, and outputs that equal what a known wrong formula gives (`Lab.mistakes`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.grading.check import Evaluation, differs, follows_fill, races
from common.grading.lab import UNWRITTEN, Lab
from common.grading.outcome import Lesson, Outcome
from common.grading.run import FIRST, CaseRun

MOST_COMPARED = 8  # failing cases that a wrong formula is compared with

_HOST_POINTER = "device-touches-host", "a kernel cannot follow a pointer of the host's: copy to memory of cudaMalloc"
# kind of crash or finding -> (lesson, what it means)
FINDINGS = {
    "divergent-barrier": (
        "divergent-barrier",
        "not every thread of the block reaches the same barrier, so the others wait for ever",
    ),
    "warp-hang": (
        "warp-hang",
        "a warp operation waits for lanes that never come: its mask names threads that went another way",
    ),
    "shuffle-mask": ("shuffle-mask", "the mask of a warp operation leaves out the thread that calls it"),
    "grid-sync-without-cooperative-launch": (
        "grid-sync-launch",
        "grid.sync() works only in a kernel launched with cudaLaunchCooperativeKernel",
    ),
    "cooperative-too-large": (
        "cooperative-too-large",
        "a cooperative grid must fit on the device at once: ask cudaOccupancyMaxActiveBlocksPerMultiprocessor",
    ),
    "launch-shape": ("launch-shape", "the launch is refused: a block has at most 1024 threads, and no dimension is 0"),
    "launch-shared-memory": ("launch-shared-memory", "the launch is refused: more shared memory than a block may have"),
    "launch-error": ("launch-error", "a CUDA call failed and nobody looked at its error"),
    "copy-direction": ("copy-direction", "a copy's direction does not fit its pointers"),
    "copy-out-of-bounds": (
        "copy-out-of-bounds",
        "a copy runs over the end of an allocation: sizes and pitches are in bytes",
    ),
    "device-code-on-host": ("device-code-on-host", "device code is called on the host"),
    "asan-out-of-bounds": ("out-of-bounds", "a thread goes past an array: check the index against its length"),
    "asan-stack-buffer-overflow": (
        "local-array",
        "a local array is too short for its use (one of kernel arguments: an address for each parameter)",
    ),
    "asan-global-buffer-overflow": ("out-of-bounds", "a thread goes past a __device__ or static array"),
    "asan-dynamic-shared": (
        "dynamic-shared",
        "`extern __shared__` memory is as long as the launch's third argument says, in bytes",
    ),
    "kernel-arguments": (
        "kernel-arguments",
        "the array of a kernel's arguments holds addresses of variables: &input, and not input",
    ),
    "host-pointer": _HOST_POINTER,
    "unset-pointer": ("local-not-set", "a pointer is followed that nobody has set, or that a failed call has not set"),
    "caller-memory": ("caller-memory", "the buffers belong to the caller: the call must not free them"),
    "copy-pitch": ("copy-pitch", "a row of a copy is wider than a pitch: the width is that of the column, in bytes"),
    "asan-host-touches-device": (
        "host-touches-device",
        "the host cannot follow a device pointer: copy, or use a kernel",
    ),
    "asan-device-touches-host": _HOST_POINTER,
    "misaligned": ("misaligned", "a vector load or store needs an address that is a multiple of its size"),
    "timeout": ("endless", "the call never ends"),
    "out-of-memory": ("out-of-memory", "the call uses too much memory"),
    "input-changed": ("input-changed", "the inputs belong to the caller: the call must not change them"),
    "leak": ("leak", "memory allocated in the call is never freed"),
    "exception": ("exception", "the call raises an exception"),
    "wrong-result": ("wrong-result", "the result is not what the task asks for"),
    "no-kernel": ("no-kernel", "the result comes from no kernel: the task is to write one"),
    "not-new": ("not-new", "the result must be a new tensor, and is the input (or shares its memory)"),
    "out-of-bounds": ("out-of-bounds", "a program goes past a tensor: mask the offsets that do not exist"),
    "race-hazard": (
        "race",
        "the result depends on the order in which threads run: a barrier is missing between one thread's write to"
        " shared memory and another's access",
    ),
    "kernel-trap": (
        "crash",
        "the kernel stops itself: grid.sync() in an ordinary launch, a failed assert, or a broken address",
    ),
    "guard-bytes": ("out-of-bounds", "a thread goes past an array: check the index against its length"),
}
# What ends a call, rather than spoiling its result.
_CRASHES = {
    "divergent-barrier",
    "warp-hang",
    "shuffle-mask",
    "grid-sync-launch",
    "device-code-on-host",
    "out-of-bounds",
    "host-touches-device",
    "device-touches-host",
    "misaligned",
    "endless",
    "out-of-memory",
    "crash",
    "exception",
    "local-array",
    "dynamic-shared",
    "kernel-arguments",
    "local-not-set",
    "caller-memory",
}


def size_of(evaluation: Evaluation) -> int:
    return int(np.prod(list(evaluation.case.sizes.values()), dtype=np.int64))


@dataclass(frozen=True)
class Again:
    """Ways to run a case again, differently, for what its runs so far do not tell."""

    passes_alone: Callable[[Evaluation], bool] = lambda e: False  # as a program's only call
    follows_locals: Callable[[Evaluation], bool] = lambda e: False  # another result, if local variables start as 0


NEVER_AGAIN = Again()


def explain(
    lab: Lab, evaluations: list[Evaluation], again: Again = NEVER_AGAIN
) -> tuple[Outcome, Lesson, Evaluation] | None:
    """Outcome, lesson and the smallest failing case; None when every case passes."""
    failing = sorted((e for e in evaluations if not e.passed), key=lambda e: (e.case.calls, size_of(e)))
    if not failing:
        return None
    passing = [e for e in evaluations if e.passed]
    # Wrong results first: who frees memory after them has learnt little.
    failing = [e for e in failing if not _only_leaks(e)] or failing
    smallest = failing[0]
    # A crash hides what comes after it, so it is named first; then a wrong result that does not depend on the order.
    for evaluation in failing:
        for schedule, run in evaluation.runs.items():
            if (found := _finding(run)) and (found[0] != "leak" or _only_leaks(evaluation)):
                lesson_id, text = found
                outcome = Outcome.CRASHES if lesson_id in _CRASHES else Outcome.WRONG
                outcome = Outcome.RACES if lesson_id == "race" else outcome
                if schedule.order not in (FIRST.order, "again"):
                    text += f" ({schedule.order} order of threads)"
                return outcome, Lesson(lesson_id, text + _contrast(evaluation, passing)), evaluation
    for evaluation in failing:
        if pair := races(evaluation):
            text = (
                f"the result depends on the order in which threads run ({pair} give different results): a barrier or"
                " an atomic is missing between one thread's write and another's read"
            )
            return Outcome.RACES, Lesson("race", text), evaluation
    if not passing and all(e.unwritten().all() for e in failing):
        text = "nothing is ever written to the output: is it what the kernel, or the copy, is given as its target?"
        return Outcome.WRONG, Lesson("nothing-written", text), smallest
    if again.passes_alone(smallest):
        text = "the first call is right and a later one is wrong: something is kept from call to call and not set again"
        return Outcome.WRONG, Lesson("state-kept", text), smallest
    if lesson := _wrong_formula(lab, failing, passing):
        return Outcome.WRONG, lesson, smallest
    for evaluation in failing:
        if follows_fill(evaluation):
            text = "the result depends on memory that was never written: a sum, or an element, has no first value"
            return Outcome.WRONG, Lesson("uninitialised", text), evaluation
    if again.follows_locals(smallest):
        text = "the result depends on a variable that nobody has set: a thread's own variables are not 0 at the start"
        text += ", and what one thread sets no other thread sees"
        return Outcome.WRONG, Lesson("local-not-set", text), smallest
    return Outcome.WRONG, _pattern(failing, passing), smallest


def _only_leaks(evaluation: Evaluation) -> bool:
    runs = evaluation.runs.values()
    kinds = {kind for run in runs for kind, _ in run.findings}
    return kinds == {"leak"} and all(run.crash is None and evaluation.matches(run.output) for run in runs)


def _finding(run: CaseRun) -> tuple[str, str] | None:
    items = [(run.crash.kind, run.crash.text)] if run.crash else []
    # The cause comes before the error that it led to, and a leak after everything.
    last = ("launch-error", "leak")
    items = (
        [f for f in run.findings if f[0] not in last]
        + items
        + [f for kind in last for f in run.findings if f[0] == kind]
    )
    for kind, detail in items:
        if kind == "harness-error":
            continue
        lesson, meaning = FINDINGS.get(kind, ("crash", "the program crashes"))
        return lesson, f"{meaning}. {detail[:1].upper()}{detail[1:]}"
    return None


def _contrast(failing: Evaluation, passing: list[Evaluation]) -> str:
    """The nearest passing case with the same other sizes: "cols=33 fails, cols=32 passes"."""
    best = None
    for other in passing:
        changed = [k for k, v in failing.case.sizes.items() if other.case.sizes.get(k) != v]
        a, b = other.case, failing.case
        if len(changed) == 1 and (a.values, a.epsilon, a.calls) == (b.values, b.epsilon, b.calls):
            key = changed[0]
            distance = abs(other.case.sizes[key] - failing.case.sizes[key])
            if best is None or distance < best[0]:
                best = (distance, key, other)
    if best is None:
        return ""
    _, key, other = best
    return f": {key}={failing.case.sizes[key]} fails, {key}={other.case.sizes[key]} passes"


def _predicted(mistake, evaluation: Evaluation) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(mistake.predict(evaluation.case, evaluation.inputs), dtype=np.float64).ravel()


def _some(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Small and large ones: what tells a block of 256 threads from one of 1024 is not in the smallest."""
    first, last = MOST_COMPARED // 2, MOST_COMPARED - MOST_COMPARED // 2
    return evaluations if len(evaluations) <= MOST_COMPARED else evaluations[:first] + evaluations[-last:]


def _explains(mistake, failing: list[Evaluation], passing: list[Evaluation]) -> bool:
    """Whether the wrong formula gives what was got in the failing cases, and the right result in the passing ones."""
    for evaluation in _some(failing):
        output = evaluation.runs[FIRST].output if FIRST in evaluation.runs else None
        if output is None or output.shape != evaluation.expected.shape:
            return False
        predicted = _predicted(mistake, evaluation)
        got = np.where(evaluation.unwritten(), UNWRITTEN, output.astype(np.float64))
        with np.errstate(all="ignore"):
            slack = np.where(np.isfinite(predicted), np.fmax(evaluation.tolerance, 1e-4 * np.abs(predicted)), 0.0)
        if differs(got, predicted, slack).any():
            return False
    for evaluation in passing[:MOST_COMPARED]:
        if differs(_predicted(mistake, evaluation), evaluation.expected, 3 * evaluation.tolerance).any():
            return False
    return True


def _wrong_formula(lab: Lab, failing: list[Evaluation], passing: list[Evaluation]) -> Lesson | None:
    ordinary = [e for e in failing if e.case.calls == 1] or failing
    for mistake in lab.mistakes:
        if _explains(mistake, ordinary, passing):
            return Lesson(mistake.lesson, mistake.text + _contrast(failing[0], passing))
    return None


def _pattern(failing: list[Evaluation], passing: list[Evaluation]) -> Lesson:
    """No formula fits: say which elements are wrong."""
    evaluation = failing[0]
    run = next((r for r in evaluation.runs.values() if r.output is not None), None)
    if run is None:
        return Lesson("wrong-values", "the output is wrong")
    bad, unwritten = evaluation.wrong(run.output), evaluation.unwritten()
    for e in failing:
        r = e.runs.get(FIRST)
        if r is not None and r.output is not None and e.unwritten().any():
            bad, unwritten, evaluation, run = e.wrong(r.output), e.unwritten(), e, r
            break
    if unwritten.any():
        start = int(np.argmax(unwritten))
        everything_after = bool(unwritten[start:].all())
        which = (
            f"from element {start} on" if everything_after else f"{int(unwritten.sum())} of {unwritten.size} elements"
        )
        text = f"part of the output is never written ({which}): the grid, or the loop, covers too few elements"
        return Lesson("unwritten", text + _contrast(evaluation, passing))
    special = [e for e in failing if e.case.values not in ("normal", "equal")]
    if len(special) == len(failing):
        kinds = sorted({e.case.values for e in failing})
        return Lesson("special-values", f"ordinary values are right, these are not: {', '.join(kinds)}")
    text = "the output is wrong" + (" everywhere" if bad.all() else f" from element {int(np.argmax(bad))} on")
    return Lesson("wrong-values", text + _contrast(evaluation, passing))

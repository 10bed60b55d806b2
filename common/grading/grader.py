"""Grades one file: build, run under every schedule, compare, explain, count points."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.grading import build, gpu, run, sanitizer
from common.grading.check import Evaluation, differs, evaluate
from common.grading.hints import hint_for
from common.grading.lab import Case, Lab, inputs_of
from common.grading.lessons import NEVER_AGAIN, Again, explain
from common.grading.outcome import CaseResult, Lesson, Outcome, Report
from common.grading.rewrite import has_launch_or_copy

CORRECTNESS_POINTS = 80


@dataclass(frozen=True)
class Options:
    """How to grade. `cases`: names, or parts of names, of the cases to run; empty runs all."""

    cases: tuple[str, ...] = ()
    quick: bool = False
    use_gpu: bool = True
    nvcc: bool = True  # compile with nvcc too where it is installed
    speed: bool = True  # measure it where there is a GPU and all cases ran


def choose_cases(lab: Lab, options: Options, *, on_gpu: bool = False) -> list[Case]:
    """The cases to run: of each pattern the case that is called so, else all whose names contain it.

    UserError names a pattern that fits none.
    """
    chosen = [case for case in lab.cases if (case.quick or not options.quick) and (on_gpu or not case.gpu_only)]
    if not options.cases:
        return chosen
    found = set()
    for pattern in options.cases:
        named = [case for case in lab.cases if pattern == case.name] or [c for c in lab.cases if pattern in c.name]
        if not named:
            raise UserError(
                f"--case {pattern}: no case of {lab.name} is called so; try {lab.cases[0].name} (--list shows all)"
            )
        runnable = {case.name for case in named if on_gpu or not case.gpu_only}
        if not runnable:
            raise UserError(f"--case {pattern}: that case needs a GPU")
        found |= runnable
    return [case for case in lab.cases if case.name in found]


def grade(lab: Lab, source: Path, options: Options = Options()) -> Report:
    """Grades `source` as the learner's file of `lab`. UserError when there is no such file."""
    if not source.is_file():
        raise UserError(f"{source}: no such file; `--reset` restores the stub")
    if lab.kind == "triton":
        from common.grading.triton_grader import grade_triton

        report = grade_triton(lab, source, options)
    else:
        with tempfile.TemporaryDirectory(prefix="tlab-grade-") as folder:
            report = _grade_cuda(lab, source.resolve(), options, Path(folder))
    if report.lesson:
        report.hint = hint_for(lab, report.lesson.id)
    return report


def _grade_cuda(lab: Lab, source: Path, options: Options, work: Path) -> Report:
    on_gpu = options.use_gpu and gpu.present()
    cases = choose_cases(lab, options, on_gpu=on_gpu)
    report = Report(lab.name, source.name, Outcome.CORRECT)
    with ThreadPoolExecutor(max_workers=2) as pool:
        try:
            if on_gpu:
                built = build.build_gpu(lab, source, work)
            else:
                ask_nvcc = options.nvcc and build.nvcc() is not None
                built = build.build_emulated(lab, source, work, ask_nvcc=ask_nvcc)
            check = pool.submit(build.check_nvcc, source, lab.folder, work) if _wants_nvcc(options, on_gpu) else None
            evaluations = _run_all(lab, cases, built, work, pool)
            _spin(lab, evaluations, built, work)
            if on_gpu and not options.quick:
                report.notes += _sanitize(evaluations, built.programs["gpu"], work)
            if check:
                check.result()
                report.notes.append("nvcc compiles it for sm_80 and sm_90")
        except build.CompileFailed as error:
            return stopped(report, lab, Outcome.DOES_NOT_COMPILE, Lesson("does-not-compile", str(error)))
        except build.Blocked as error:
            return stopped(report, lab, Outcome.BLOCKED, Lesson("blocked", f"the emulation lacks {error}"))
    report.machine = "GPU" if on_gpu else "CPU emulation of CUDA (no GPU here)"
    again = Again(
        lambda e: _passes_alone(lab, e, built, work),
        lambda e: not on_gpu and _follows_locals(lab, e, source, work),
    )
    # A GPU's runs do not tell a file that does nothing from one whose result goes elsewhere; the file does.
    started = on_gpu and has_launch_or_copy(source.read_text(errors="replace"))
    judge(lab, evaluations, report, again, started=started)
    if _wants_speed(options, on_gpu, report):
        gpu.measure_speed(lab, build.build_for_timing(lab, source, work), report, work)
    elif not on_gpu:
        report.notes.append(without_speed(report))
    return report


def without_speed(report: Report) -> str:
    """What a total without speed is out of."""
    if report.possible < CORRECTNESS_POINTS:
        return f"speed: not measured (no GPU). Some cases were left out: a full run is out of {CORRECTNESS_POINTS}"
    return f"speed: not measured (no GPU), so the total is out of {CORRECTNESS_POINTS}"


def _wants_speed(options: Options, on_gpu: bool, report: Report) -> bool:
    return on_gpu and options.speed and not options.cases and report.outcome is Outcome.CORRECT


def _wants_nvcc(options: Options, on_gpu: bool) -> bool:
    return options.nvcc and not options.quick and not on_gpu and build.nvcc() is not None


def _run_all(
    lab: Lab, cases: Sequence[Case], built: build.Built, work: Path, pool: ThreadPoolExecutor
) -> list[Evaluation]:
    inputs = [inputs_of(lab, case) for case in cases]
    run.write_jobs(lab, cases, inputs, work)
    if "gpu" in built.programs:
        schedules, program = run.GPU_SCHEDULES, dict.fromkeys(("checked", "interleaved"), built.programs["gpu"])
    else:
        schedules, program = run.SCHEDULES, built.programs
    on_gpu = "gpu" in built.programs
    first = run.run_cases([program["checked"]], cases, run.FIRST, work, gpu=on_gpu)
    for r in first:
        if lab.needs_kernel and not on_gpu and r.ran and r.work and not r.launches:
            r.findings.append(("no-kernel", f"{lab.function} launches none"))
    # A case that crashes once has told enough; a large one runs once.
    repeated = [i for i, r in enumerate(first) if r.ran and not cases[i].is_large]
    jobs = {
        s: pool.submit(run.run_cases, [program[s.variant]], cases, s, work, repeated, gpu=on_gpu) for s in schedules[1:]
    }
    runs = {schedule: job.result() for schedule, job in jobs.items()}
    return [
        evaluate(lab, case, inputs[i], {run.FIRST: first[i]} | {s: r[i] for s, r in runs.items() if i in repeated})
        for i, case in enumerate(cases)
    ]


def _sanitize(evaluations: list[Evaluation], program: Path, work: Path) -> list[str]:
    """Adds what compute-sanitizer finds in the small cases to their runs; notes for the report."""
    if sanitizer.find() is None:
        return ["compute-sanitizer is not installed: memory errors and races are found only by their effect"]
    chosen = [i for i, e in enumerate(evaluations) if e.case.quick and e.runs[run.FIRST].ran]
    if not chosen:
        return []
    cases, notes = [e.case for e in evaluations], []
    folder = work / "sanitizer"
    folder.mkdir(exist_ok=True)
    (folder / "jobs").write_text(run.job_lines(cases, chosen, gpu=True))
    environment = run.environment(run.FIRST, folder / "progress") | {"TLAB_ECHO": "1"}
    for tool in sanitizer.TOOLS:
        command = [str(program), str(folder / "jobs"), str(work / "inputs"), str(folder)]
        text = sanitizer.run(tool, command, environment, folder)
        if text is None or not sanitizer.usable(text):
            reason = f"did not end within {sanitizer.LIMIT_S} s" if text is None else "does not run on this machine"
            notes.append(f"compute-sanitizer --tool {tool} {reason}")
            continue
        for number, kind, what in sanitizer.parse(text):
            evaluations[number].runs[run.FIRST].findings.append((kind, what))
    return notes


def _passes_alone(lab: Lab, evaluation: Evaluation, built: build.Built, work: Path) -> bool:
    """Whether the case passes as the only call of a program."""
    program = built.programs.get("gpu") or built.programs["checked"]
    case = replace(evaluation.case, calls=1)
    return evaluation.passes(_run_again(lab, case, evaluation, program, work / "alone", gpu="gpu" in built.programs))


def _run_again(
    lab: Lab,
    case: Case,
    evaluation: Evaluation,
    program: Path,
    folder: Path,
    schedule: run.Schedule = run.FIRST,
    *,
    gpu: bool = False,
) -> run.CaseRun:
    folder.mkdir(exist_ok=True)
    run.write_jobs(lab, [case], [evaluation.inputs], folder)
    (result,) = run.run_cases([program], [case], schedule, folder, gpu=gpu)
    return result


def _follows_locals(lab: Lab, evaluation: Evaluation, source: Path, work: Path) -> bool:
    """Whether the case gives another result where local variables that nobody set are 0."""
    before = evaluation.runs[run.FIRST].output
    program = build.build_zeroed(lab, source, work / "zeroed")
    if program is None or before is None:
        return False
    after = _run_again(lab, evaluation.case, evaluation, program, work / "zeroed").output
    return after is not None and differs(before, after, evaluation.tolerance).any()


def _spin(lab: Lab, evaluations: list[Evaluation], built: build.Built, work: Path) -> None:
    """Blocked, if a case that never ends does so where threads take turns at every memory access.

    On a GPU all resident threads advance, so one may wait in a loop for another's store; here it keeps the CPU.
    """
    late = [e for e in evaluations if (c := e.runs[run.FIRST].crash) and c.kind == "timeout" and not e.case.is_large]
    if not late or "interleaved" not in built.programs:
        return
    smallest = min(late, key=lambda e: max(e.case.sizes.values()))
    result = _run_again(lab, smallest.case, smallest, built.programs["interleaved"], work / "spin", run.SCHEDULES[-1])
    if smallest.passes(result):
        raise build.Blocked("threads that wait for others in a loop of their own (grade on a machine with a GPU)")


def judge(
    lab: Lab, evaluations: list[Evaluation], report: Report, again: Again = NEVER_AGAIN, *, started: bool = False
) -> None:
    """Sets outcome, lesson, cases and points of `report` from what the cases gave.

    started: the file is known to do something, though its runs count no work.
    """
    for e in evaluations:
        detail, order = "", ""
        if failure := e.first_failure:
            detail, order = e.describe(failure[1]), failure[0].name
        report.cases.append(CaseResult(e.case.name, e.case.group, e.passed, e.case.hidden, detail, order))
    report.points = _points(lab, report.cases)
    blocked = [t for e in evaluations for r in e.runs.values() for k, t in r.findings if k == "blocked"]
    if blocked:
        report.outcome, report.lesson = Outcome.BLOCKED, Lesson("blocked", f"the emulation lacks {blocked[0]}")
        report.points = {group: (0.0, of) for group, (_, of) in report.points.items()}
    elif not started and _nothing_done(evaluations):
        report.outcome = Outcome.NOT_STARTED
        report.lesson = Lesson("not-started", f"`{lab.function}` does nothing yet: start with TODO 1 in {lab.source}")
    elif found := explain(lab, evaluations, again):
        report.outcome, report.lesson, smallest = found
        # The smallest failing case stands first among the failed ones.
        report.cases.sort(key=lambda c: (c.passed, c.name != smallest.case.name))


def _nothing_done(evaluations: list[Evaluation]) -> bool:
    runs = [e.runs[run.FIRST] for e in evaluations if run.FIRST in e.runs]
    return bool(runs) and all(
        r.ran and r.work == 0 and not r.findings and r.output is not None and e.unwritten().all()
        for e, r in zip(evaluations, runs)
    )


def _points(lab: Lab, cases: list[CaseResult]) -> dict[str, tuple[float, float]]:
    """Each group's points times the share of its cases that pass; groups without a case in this run are left out."""
    correctness, _ = lab.points()
    points = {}
    for group, of in correctness.items():
        own = [case for case in cases if case.group == group]
        if own:
            points[group] = (of * sum(case.passed for case in own) / len(own), float(of))
    return points


def stopped(report: Report, lab: Lab, outcome: Outcome, lesson: Lesson) -> Report:
    correctness, _ = lab.points()
    report.outcome, report.lesson = outcome, lesson
    report.points = {group: (0.0, float(of)) for group, of in correctness.items()}
    return report

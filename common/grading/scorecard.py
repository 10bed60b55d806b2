"""A report for people (rich), for programs (JSON) and for Gradescope (results.json)."""

import json
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from common.grading.outcome import Outcome, Report

_COLOURS = {
    Outcome.CORRECT: "green",
    Outcome.CORRECT_BUT_SLOW: "yellow",
    Outcome.NOT_STARTED: "cyan",
    Outcome.BLOCKED: "magenta",
}
MOST_FAILED_CASES = 5


def show(report: Report, *, hint: bool = False, console: Console | None = None) -> None:
    """Prints the scorecard."""
    console = console or Console(highlight=False)
    colour = _COLOURS.get(report.outcome, "red")
    title = Text.assemble(
        (f"{report.lab}  ", "bold"), (report.file, "dim"), "  ", (report.outcome.value, f"bold {colour}")
    )
    console.print(Panel(title, expand=False, border_style=colour))
    if report.lesson:
        console.print(Text(report.lesson.text, style="bold" if report.outcome is not Outcome.NOT_STARTED else ""))
    if report.outcome not in (Outcome.NOT_STARTED, Outcome.BLOCKED):
        _show_failures(report, console)
    if report.points:
        console.print(_points_table(report))
    if report.speed:
        _show_speed(report, console)
    for note in report.notes:
        console.print(Text(note, style="dim"))
    if hint and report.hint:
        console.print(Text(f"Hint: {report.hint}"))
    elif report.hint and report.outcome.exit_code:
        console.print(Text("--hint says what to look at", style="dim"))


def _show_failures(report: Report, console: Console) -> None:
    failed = [case for case in report.cases if not case.passed]
    for i, case in enumerate(failed[:MOST_FAILED_CASES]):
        label = "smallest failing case" if i == 0 else "also fails"
        order = f" [{case.order} order]" if case.order and case.order != "ascending" else ""
        console.print(Text(f"  {label}: {case.name}{order}: {case.detail}"))
    if len(failed) > MOST_FAILED_CASES:
        console.print(Text(f"  and {len(failed) - MOST_FAILED_CASES} more of {len(report.cases)} cases", style="dim"))


def _points_table(report: Report) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("points for")
    table.add_column("cases", justify="right")
    table.add_column("earned", justify="right")
    table.add_column("of", justify="right")
    for group, (earned, of) in report.points.items():
        own = [case for case in report.cases if case.group == group]
        count = f"{sum(case.passed for case in own)}/{len(own)}" if own else ""
        table.add_row(group, count, f"{earned:.1f}", f"{of:g}")
    table.add_section()
    table.add_row("total", "", f"{report.earned:.1f}", f"{report.possible:g}", style="bold")
    return table


def _show_speed(report: Report, console: Console) -> None:
    speed = report.speed
    how = {"graph": "in a CUDA graph", "events": "call after call", "wall": "wall time of the call"}[speed.form]
    line = f"{speed.time_us:.1f} us {how}"
    if speed.copy_gb_per_s:
        line += f", {speed.gb_per_s:,.0f} GB/s: {speed.share:.0%} of a copy of the same bytes"
        line += f" ({speed.copy_gb_per_s:,.0f} GB/s); a single launch {speed.single_launch_us:.1f} us"
    console.print(Text(f"{line}; on {speed.device}"))
    for name, value in speed.peers.items():
        console.print(Text(f"  {name}: {value:,.0f} GB/s", style="dim"))
    for name, why in speed.left_out.items():
        console.print(Text(f"  {name}: not timed, {why}", style="dim"))


def write_json(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report.as_dict(), indent=2) + "\n")


def gradescope(report: Report) -> dict:
    """Gradescope's results.json: one test a case, points of a group spread over its cases; hidden cases stay hidden."""
    tests = []
    for group, (_, of) in report.points.items():
        own = [case for case in report.cases if case.group == group]
        if not own:
            tests.append(
                {
                    "name": group,
                    "score": round(report.points[group][0], 4),
                    "max_score": of,
                    "output": "",
                    "visibility": "visible",
                }
            )
        for case in own:
            worth = of / len(own)
            passed = case.passed and report.outcome is not Outcome.BLOCKED
            tests.append(
                {
                    "name": f"{report.lab} {group}: {case.name}",
                    "score": round(worth, 4) if passed else 0.0,
                    "max_score": round(worth, 4),
                    "output": case.detail,
                    "visibility": "hidden" if case.hidden else "visible",
                }
            )
    lesson = report.lesson.text if report.lesson else ""
    return {
        "score": round(report.earned, 2),
        "output": f"{report.outcome.value}. {lesson}".strip(),
        "visibility": "visible",
        "tests": tests,
    }


def write_gradescope(report: Report, path: Path) -> None:
    path.write_text(json.dumps(gradescope(report), indent=2) + "\n")

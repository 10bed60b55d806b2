"""How fast is each step of each lab's ladder on this GPU, beside a copy of the same bytes and the peers?

Builds every solution with nvcc, checks it on the quick cases and, at the timed size, against float64; times all
solutions of a lab in one process, in turn with the peers and two copies, of which the faster is the ceiling; measures
copies between host and device. Goes on after a failure and exits 1 at the end.

Writes solutions.csv (with its provenance, solutions.json), solutions.png, transfer.csv, transfer.json and transfer.png.
Needs a GPU and nvcc.

    python -m common.grading.bench_solutions --out results
    python -m common.grading.bench_solutions --lab rms_norm/vector --lab host_GPU --out results
"""

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import cli, results
from common.errors import CheckFailed, UserError
from common.grading import build, gpu
from common.grading.grader import Options, grade
from common.grading.lab import LABS, ROOT, Lab, get

COLUMNS = ("lab", "name", "kind", "outcome", "time_us", "time_us_p10", "time_us_p90", "single_launch_us", "gb_per_s")
COLUMNS += ("percent_of_copy", "form", "suspect", "note")
SHOWN = ("lab", "name", "outcome", "time_us", "single_launch_us", "gb_per_s", "percent_of_copy", "form")
TRANSFER_LIMIT_S = 180


@dataclass(frozen=True)
class Mark:
    """What the best step of a ladder should reach on one H100 or H200, and what the course asks for."""

    column: str
    value: float
    course: str

    @property
    def text(self) -> str:
        unit = {"percent_of_copy": "% of the copy", "gb_per_s": "GB/s", "time_us": "us"}[self.column]
        return f"{'at most' if self.column == 'time_us' else 'at least'} {self.value:g} {unit}"

    def best(self, rows: list[dict]) -> dict:
        return (min if self.column == "time_us" else max)(rows, key=lambda row: row[self.column])

    def met(self, row: dict) -> bool:
        return row[self.column] <= self.value if self.column == "time_us" else row[self.column] >= self.value


MARKS = {
    "rms_norm/matrix": Mark("percent_of_copy", 95, "300 GB/s"),
    "rms_norm/vector": Mark("gb_per_s", 1000, "200 GB/s"),
    "silu/CUDA": Mark("percent_of_copy", 95, "500 GB/s"),
    "silu": Mark("percent_of_copy", 95, "500 GB/s"),
    "host_GPU": Mark("time_us", 60, "150 us"),
}


@dataclass
class Step:
    """One solution: what its cases gave, and what is timed."""

    lab: Lab
    path: Path
    outcome: str = "grader error"
    note: str = ""
    artefact: Path | None = None


def prepare(step: Step, folder: Path) -> Step:
    """Checks and builds one solution; whatever goes wrong is its outcome."""
    try:
        report = grade(step.lab, step.path, Options(quick=True, speed=False))
        step.outcome, step.note = report.outcome.value, report.lesson.text if report.lesson else ""
        if report.outcome.exit_code == 0:
            folder.mkdir(parents=True, exist_ok=True)
            is_triton = step.lab.kind == "triton"
            step.artefact = step.path if is_triton else build.build_for_timing(step.lab, step.path, folder)
    except Exception as error:  # the other solutions are still to be measured
        step.outcome, step.note = "grader error", f"{type(error).__name__}: {error}"
    return step


def time_lab(lab: Lab, steps: list[Step], work: Path) -> list[dict]:
    """The rows of one lab: its solutions, the copy, the peers, and who was left out."""
    files = {s.path.stem: s.artefact for s in steps if s.artefact}
    rows = [_row(lab, s.path.stem, "solution", s.outcome, note=s.note) for s in steps if not s.artefact]
    try:
        return rows + (_rows(lab, gpu.run_worker(lab, files, work)) if files else [])
    except UserError as error:
        together = str(error)
    for number, (name, path) in enumerate(files.items()):  # one of them ends the process: each in its own
        try:
            measured = gpu.run_worker(lab, {name: path}, work, peers=number == 0)
            rows += [row for row in _rows(lab, measured) if row["name"] not in {r["name"] for r in rows}]
        except UserError as error:
            rows.append(_row(lab, name, "solution", "not timed", note=f"{error}; together: {together}"))
    return rows


def _row(lab: Lab, name: str, kind: str, outcome: str, **more) -> dict:
    return dict.fromkeys(COLUMNS) | {"lab": lab.name, "name": name, "kind": kind, "outcome": outcome} | more


def _rows(lab: Lab, measured: dict) -> list[dict]:
    stems = {path.stem for path in lab.solutions()}
    copy_us = measured["rows"].get("copy", {}).get("time_us")
    rows = []
    for name, figures in measured["rows"].items():
        kind = "copy" if name == "copy" else "solution" if name in stems else "peer"
        share = 100 * copy_us / figures["time_us"] if copy_us else None
        suspect = kind == "solution" and share is not None and share > 100 * gpu.SUSPECT_ABOVE
        figures = {key: value if isinstance(value, str) else round(value, 3) for key, value in figures.items()}
        figures["gb_per_s"] = round(measured["bytes"] / figures["time_us"] * 1e-3, 2)
        figures["percent_of_copy"] = None if share is None else round(share, 2)
        outcome = "suspect" if suspect else "correct" if kind == "solution" else ""
        rows.append(_row(lab, name, kind, outcome, suspect=suspect, **figures))
    rows += [_row(lab, name, "solution", "wrong", note=why) for name, why in measured["wrong"].items()]
    return rows + [_row(lab, name, "peer", "left out", note=why) for name, why in measured["left_out"].items()]


def measure_transfers(out: Path, work: Path) -> None:
    """transfer.csv, .json and .png by host_GPU/main.cu. UserError with its last line where it fails."""
    folder, program = ROOT / "host_GPU", work / "transfer"
    solution = get("host_GPU").solutions()[-1]
    commands = (
        ([*build.gpu_flags(), "-I", str(folder), "-o", str(program), str(folder / "main.cu"), str(solution)], work),
        ([str(program)], out),
        ([sys.executable, str(folder / "plot_transfer.py"), "--csv", str(out / "transfer.csv")], out),
    )
    for command, cwd in commands:
        try:
            done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TRANSFER_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"{Path(command[0]).name} did not end within {TRANSFER_LIMIT_S} s") from None
        print(done.stdout, end="", flush=True)
        if done.returncode:
            raise UserError(f"{Path(command[0]).name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def draw(rows: list[dict], path: Path, footer: str) -> Path:
    """A panel a lab: solutions and peers with their figures, the copy and the mark as lines."""
    from common import plots

    labs = [name for name in LABS if any(r["lab"] == name and r["time_us"] for r in rows)]
    figure, axes = plots.new_figure("The labs' solutions, beside peers and a copy of the same bytes", panels=len(labs))
    for ax, name in zip([axes] if len(labs) == 1 else axes, labs):
        _draw_lab(ax, name, [r for r in rows if r["lab"] == name and r["time_us"]])
    return plots.save(figure, path, footer)


def _draw_lab(ax, name: str, timed: list[dict]) -> None:
    from common import plots

    column, unit = ("time_us", "µs") if name == "host_GPU" else ("gb_per_s", "GB/s")
    lines = []
    for kind, label, colour in (("solution", "solution", plots.COLOURS[0]), ("peer", "peer", "#999999")):
        bars = [r for r in timed if r["kind"] == kind]
        if bars:
            lines.append(ax.barh([r["name"] for r in bars], [r[column] for r in bars], color=colour, label=label))
    copy = next((r[column] for r in timed if r["kind"] == "copy"), None)
    if copy:
        label = f"copy: {copy:,.0f} {unit}"
        lines.append(ax.axvline(copy, color=plots.CEILING_COLOUR, linestyle="--", label=label))
    mark = MARKS[name]
    value = mark.value if mark.column == column else copy * mark.value / 100 if copy else None
    if value:
        label = f"mark: {mark.value:,g} {unit if mark.column == column else '% of it'}"
        lines.append(ax.axvline(value, color="#000000", linestyle=":", label=label))
    if column == "time_us":
        ax.set_xscale("log")
        ax.set_xlim(left=10)
    _label_bars(ax, timed, column)
    ax.invert_yaxis()
    ax.set_title(name)
    ax.set_xlabel("wall time, µs" if column == "time_us" else "GB/s", loc="right")
    plots.legend_below(ax, columns=2 if copy else 3, handles=lines)


def _label_bars(ax, timed: list[dict], column: str) -> None:
    """The figure at the foot of a bar, where no line crosses it, or behind a bar that is too short to hold it."""
    from common import plots

    ax.autoscale_view()
    for row in timed:
        if row["kind"] == "copy":
            continue
        inside = ax.transAxes.inverted().transform(ax.transData.transform((row[column], 0)))[0] > 0.12
        ax.annotate(
            plots.number(row[column], 3),
            (ax.get_xlim()[0] if inside else row[column], row["name"]),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=11,
            color="white" if inside else "black",
        )


def summarise(rows: list[dict]) -> None:
    """A sentence a lab: the best step against the mark and the course's demand."""
    for name, mark in MARKS.items():
        timed = [r for r in rows if r["lab"] == name and r["kind"] == "solution" and r["outcome"] == "correct"]
        if timed:
            row = mark.best(timed)
            reached = "reaches" if mark.met(row) else "MISSES"
            figure = {"time_us": "us", "gb_per_s": "GB/s", "percent_of_copy": "% of the copy"}[mark.column]
            print(
                f"{name}: {row['name']} is best, {row[mark.column]:,.4g} {figure}: {reached} the mark ({mark.text});"
                f" the course asks for {mark.course}"
            )


def nvcc_version() -> str:
    done = subprocess.run([str(build.nvcc()), "--version"], capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


def main(args: argparse.Namespace) -> None:
    if not gpu.present():
        raise UserError("the labs are timed with a GPU and nvcc: one of them is missing here")
    out = cli.output_dir(args, __file__)
    labs, failures = [get(name) for name in args.lab or LABS], []
    record = results.provenance(args, device="cuda", nvcc=nvcc_version(), nvcc_flags=build.gpu_flags()[1:])
    with (
        tempfile.TemporaryDirectory(prefix="tlab-bench-") as folder,
        results.ResultFile(out, "solutions", COLUMNS, record, key=["lab", "name"]) as file,
        cli.keep_partial(args),
    ):
        work = Path(folder)
        steps = [Step(lab, path) for lab in labs for path in lab.solutions()]
        with ThreadPoolExecutor(max_workers=4) as pool:  # nothing is timed yet
            list(pool.map(lambda step: prepare(step, work / step.lab.name), steps))
        for lab in labs:
            rows = time_lab(lab, [step for step in steps if step.lab is lab], work)
            file.extend(rows)
            cli.print_table(rows, SHOWN)
            print("", flush=True)
            bad = [r for r in rows if r["kind"] == "solution" and r["outcome"] not in ("correct", "correct but slow")]
            failures += [f"{r['lab']}/{r['name']}: {r['outcome']} {r['note'] or ''}".strip() for r in bad]
        if any(lab.name == "host_GPU" for lab in labs):
            try:
                measure_transfers(out, work)
            except UserError as error:
                failures.append(f"transfers: {error}")
    if any(row["time_us"] for row in file.rows):
        from common import plots

        cli.print_written(file.path, file.json_path)
        if not args.no_plot:
            cli.print_written(draw(file.rows, out / "solutions.png", plots.footer(file.path)))
        summarise(file.rows)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if failures:
        raise CheckFailed(f"{len(failures)} of the measurements failed; the first: {failures[0]}")


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lab", action="append", choices=list(LABS), help="only this lab; repeatable")
    p.add_argument("--out", metavar="DIR", help="default: results/ beside this file")
    p.add_argument("--no-plot", action="store_true", help="leave solutions.png out")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


if __name__ == "__main__":
    cli.run(main, build_parser())

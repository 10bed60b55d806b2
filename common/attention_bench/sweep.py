"""The sweeps of an attention benchmark: measured point by point into CSVs, then a table, sentences and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import cli, results, roofline
from common.attention_bench import plots as attention_plots
from common.attention_bench import report as attention_report
from common.attention_bench.backends.base import Backend, Case
from common.attention_bench.measure import (
    DETAILS,
    FAILED,
    UNSUPPORTED,
    WRONG,
    Bench,
    blank_row,
    check_memory,
    measure_case,
)
from common.attention_bench.options import Heads
from common.errors import CheckFailed, UserError

MAX_BATCH = 1 << 16  # sequences; every one has its own length, so their number is bounded before they are listed


@dataclass(frozen=True)
class Sweep:
    """One CSV and its picture. points: {column: value} for every key column beside config and backend."""

    name: str
    axis: str  # the column that varies
    points: Sequence[Mapping[str, int]]
    option: str  # by which the user types its sizes
    title: str
    xlabel: str


def run(
    bench: Bench,
    sweeps: Sequence[Sweep],
    columns: Sequence[str],
    make_case: Callable[[Heads, Mapping[str, int]], Case],
    y: str,
) -> None:
    """Measure all sweeps, write their CSVs, print and draw what they say. Raises CheckFailed after all is written.

    columns: the CSV's first columns; config, backend and the names of the points are its key. y: the rate that is
    drawn, "tflops" or "gb_per_s".
    """
    if bench.typed & {*sweeps[0].points[0], "batch_size", *(s.option.strip("-").replace("-", "_") for s in sweeps)}:
        for sweep in sweeps:
            largest = max(point["batch"] for point in sweep.points)
            if largest > MAX_BATCH:
                raise UserError(f"--batch-sizes, --batch-size: {largest} sequences; give at most {MAX_BATCH}")
            cases = [make_case(heads, point) for heads in bench.configs.values() for point in sweep.points]
            check_memory(bench, cases, sweep.option)
    files: dict[str, results.ResultFile] = {}
    key = ("config", "backend", *sweeps[0].points[0])
    all_columns = (*columns, *(name for name in DETAILS if name not in columns))
    with cli.keep_partial(bench.args):
        for sweep in sweeps:
            record = bench.provenance()
            file = results.ResultFile(bench.out, sweep.name, all_columns, record, key=key, resume=bench.args.resume)
            files[sweep.name] = file
            try:
                _measure(bench, file, sweep, make_case)
            finally:
                file.close(missing=bench.missing, ceilings=bench.ceilings)
    _tell(bench, [(sweep, files[sweep.name]) for sweep in sweeps if sweep.name in files], columns, y)
    _verdict(bench, [row for file in files.values() for row in file.rows])


def _measure(
    bench: Bench, file: results.ResultFile, sweep: Sweep, make_case: Callable[[Heads, Mapping[str, int]], Case]
) -> None:
    from tqdm import tqdm

    todo = [(config, heads, point) for config, heads in bench.configs.items() for point in sweep.points]
    for config, heads, point in tqdm(todo, desc=sweep.name, disable=None, leave=False):
        keys = {b.name: {"config": config, "backend": b.name, **_columns_of(b, point, sweep)} for b in bench.backends}
        backends = [b for b in bench.backends if not file.has(**keys[b.name])]
        pageless = [b for b in backends if sweep.axis == "page_size" and not b.paged]
        rows = {
            b.name: {"status": UNSUPPORTED, "note": "keeps a sequence in one piece, not in pages"} for b in pageless
        }
        rows |= measure_case(bench, make_case(heads, point), [b for b in backends if b not in pageless])
        file.extend({**blank_row(), **rows[b.name], **keys[b.name]} for b in backends)


def _columns_of(backend: Backend, point: Mapping[str, int], sweep: Sweep) -> dict[str, int | None]:
    """The point's columns; a backend without pages has no page size."""
    without = "page_size" in point and not backend.paged and sweep.axis != "page_size"
    return {**point, "page_size": None} if without else dict(point)


def _tell(bench: Bench, parts: Sequence[tuple[Sweep, results.ResultFile]], columns: Sequence[str], y: str) -> None:
    """A table a sweep, who wins where, what has no figure, and the files."""
    parts = [(sweep, file) for sweep, file in parts if file.rows]
    shown = [*columns, "launch_us", "error", "status"]
    unit = {"tflops": "TFLOP/s", "gb_per_s": "GB/s"}[y]
    for sweep, file in parts:
        print(f"\n{sweep.title}")
        cli.print_table(file.rows, shown)
        told = attention_report.conclusion(file.rows, sweep.axis, y, unit)
        print(*(f"  {line}" for line in [*told, *attention_report.notes(file.rows, sweep.axis, {})]), sep="\n")
    compiled = attention_report.compile_times([row for _, file in parts for row in file.rows])
    if compiled:
        print(compiled)
    for sweep, file in parts:
        cli.print_written(file.path, file.json_path)
        if not bench.args.no_plot:
            cli.print_written(attention_plots.draw_sweep(file.path, sweep.axis, y, sweep.title, sweep.xlabel))
    roof = None if bench.args.no_plot else attention_plots.draw_roofline(bench.out)
    if roof is not None:
        cli.print_written(roof)
    if not parts:
        print("no backend to measure with: nothing was written")


def _verdict(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> None:
    """CheckFailed for a wrong output, an error in our own kernels, or (on CUDA) a figure above its ceiling."""
    for status in (WRONG, FAILED):
        bad = [row for row in rows if row["status"] == status]
        if bad:
            where = ", ".join(dict.fromkeys(row["backend"] for row in bad))
            raise CheckFailed(f"{len(bad)} of {len(rows)} points {status}: {where} ({bad[0]['note']})")
    roofline.report_suspects(rows, bench.device.type)

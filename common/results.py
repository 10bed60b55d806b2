"""Measured rows and where they came from: one CSV, written row by row, and a JSON of provenance beside it.

    record = results.provenance(args, model=source, dtype="float32", device="cpu", shapes=..., backend=...)
    with results.ResultFile(out, "no_kv_times", COLUMNS, record, key=["output_length"], resume=args.resume) as file:
        for length in args.output_lengths:
            if not file.has(output_length=length):
                file.append(output_length=length, time=...)      # on the disk before the next point starts
    rows = results.read_rows(file.path, COLUMNS)                 # a plot is drawn from the CSV alone

A kill at any moment costs at most the row that was being written: `resume=True` drops a line that was cut and goes on.
"""

import csv
import dataclasses
import datetime
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.machine import git_commit, library_versions, machine_facts

SUSPECT = "suspect"  # the optional column of points that stayed above 105 % of their ceiling

# Options that do not change what a row means: where it goes, how it is shown, and which peers are measured beside it.
# Swept sizes are lists and are left out too: which points exist is what the rows themselves say.
_NEUTRAL_OPTIONS = {"out", "resume", "no_plot", "debug", "compare", "dump_tokens", "interrupted", "preset"}
# Fields that are recorded but may differ between two runs whose rows still belong in one file. kv_pages: what the free
# memory of the moment gave; where it was typed, the option has to agree.
_MAY_DIFFER = {
    *("command", "utc_time", "git_commit", "clocks", "power_limit_w", "ceilings", "python", "options", "kv_pages"),
}
_HISTORY, _AT_CLOSE = "earlier_runs", "added_at_close"


# --- provenance ------------------------------------------------------------------------------------------------------
def provenance(args: Any, **facts: Any) -> dict[str, Any]:
    """What is known about a run before it measures, as plain JSON values.

    args:  the parsed options; `device` (as a fact, or else the option) decides whether the GPU is asked for its state.
    facts: what the script knows: model, model_source, shapes, dtype, device, backend, ceilings, ... A fact must agree
           for `--resume`, unless it is one of those that may differ (clocks, ceilings, times, commit).
    """
    options = {name: _plain(value) for name, value in sorted(vars(args).items()) if name != "interrupted"}
    device = str(facts.get("device") or options.get("device") or "cpu")
    record = {
        "command": " ".join(["python", *map(_quoted, sys.orig_argv[1:])]),
        "preset": options.get("preset"),
        "seed": options.get("seed"),
        "repeats": options.get("repeats"),
        "warmup": options.get("warmup"),
        "options": options,
        **machine_facts(device),
        "python": sys.version.split()[0],
        "versions": library_versions(),
        "git_commit": git_commit(),
        "utc_time": _utc_now(),
    }
    return record | {name: _plain(value) for name, value in facts.items()}


def _quoted(argument: str) -> str:
    # Seen from the clone's root: where the clone lies says nothing about the figures.
    argument = argument.removeprefix(f"{Path(__file__).resolve().parents[1]}{os.sep}")
    return argument if re.fullmatch(r"[\w./:=,^@%+-]+", argument) else json.dumps(argument, ensure_ascii=False)


def _utc_now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: dataclasses become objects, paths and other things text, NaN and infinity null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if hasattr(value, "tolist"):  # an array, a tensor or a scalar of either
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value).removeprefix("torch.")


def _scalar(value: Any) -> Any:
    """A numpy or torch scalar as the Python number it holds."""
    return value.item() if hasattr(value, "item") else value


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields whose difference means that rows of both runs do not belong in one file, as "field: old, now new"."""

    def flat(record: Mapping[str, Any]) -> dict[str, Any]:
        skipped = _MAY_DIFFER | {_HISTORY, _AT_CLOSE} | set(record.get(_AT_CLOSE, ()))
        fields = {name: value for name, value in record.items() if name not in skipped}
        for group in ("versions", "sizes"):
            inside = fields.pop(group, None) or {}
            fields |= {f"{group}.{name}": value for name, value in inside.items() if not isinstance(value, list)}
        for name, value in (record.get("options") or {}).items():
            if name not in _NEUTRAL_OPTIONS and not isinstance(value, list) and name not in fields:
                fields[f"--{name.replace('_', '-')}"] = value
        return fields

    def shown(text: str) -> str:
        return text if len(text) <= 60 else text[:57] + "..."

    was, now = flat(old), flat(new)
    differing = []
    for name in sorted(was.keys() | now.keys()):
        before, after = (json.dumps(record.get(name), sort_keys=True) for record in (was, now))
        if before != after:
            differing.append(f"{name}: {shown(before)}, now {shown(after)}")
    return differing


# --- the file --------------------------------------------------------------------------------------------------------
class ResultFile:
    """One CSV and its JSON, written as rows are measured.

    directory, name: the files are directory/name.csv and directory/name.json.
    columns:    of the CSV, in order. A column `suspect` may be among them; a row need not give it.
    provenance: from `provenance(...)`; written with the first row and again at `close`.
    key:        the columns that tell one point from another, for `has`.
    resume:     keep the rows of an earlier run. UserError, with the differing fields, where its provenance disagrees.

    Without `resume` an earlier name.{csv,json,png} becomes name.prev.* when the first new row is ready, so a run that
    fails before it leaves everything as it was. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        directory: str | Path,
        name: str,
        columns: Sequence[str],
        provenance: Mapping[str, Any],
        *,
        key: Sequence[str],
        resume: bool = False,
    ):
        unknown = [column for column in key if column not in columns]
        if unknown or len(set(columns)) != len(columns) or not key:
            raise ValueError(f"{name}: key {list(key)} must be among the distinct columns {list(columns)}")
        self.path = Path(directory) / f"{name}.csv"
        self.columns, self.key = tuple(columns), tuple(key)
        self.rows: list[dict[str, Any]] = []
        self._provenance = _plain(provenance)
        self._measured: set[tuple] = set()
        self._csv: io.BufferedWriter | None = None
        self._resumed = resume and self._load_earlier()

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def json_path(self) -> Path:
        return self.path.with_suffix(".json")

    def has(self, **key: Any) -> bool:
        """Whether the point is in the file: from the run that is resumed, or from this one."""
        if set(key) != set(self.key):
            raise ValueError(f"{self.path.name}: give exactly the key columns {list(self.key)}, not {list(key)}")
        return tuple(_parse(_format(key[column])) for column in self.key) in self._measured

    def append(self, **row: Any) -> None:
        """Write one row through to the disk. Every column must be given (None is empty), except `suspect`."""
        self.extend([row])

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows that were measured together, as by `append` but through to the disk once for all of them."""
        lines = [self._cells(row) for row in rows]
        if not lines:
            return
        if self._csv is None:
            self._start()
        assert self._csv is not None
        self._csv.write(b"".join(map(_csv_line, lines)))
        self._csv.flush()
        os.fsync(self._csv.fileno())
        for cells in lines:
            self._keep(cells)

    def _cells(self, row: Mapping[str, Any]) -> list[str]:
        missing = [column for column in self.columns if column not in row and column != SUSPECT]
        unknown = [column for column in row if column not in self.columns]
        if missing or unknown:
            raise ValueError(f"{self.path.name}: row lacks {missing}, has unknown {unknown}")
        return [_format(row.get(column)) for column in self.columns]

    def close(self, **more_provenance: Any) -> None:
        """Write the provenance again, with what is only known at the end. Without a new row nothing is touched."""
        if self._csv is None:
            return
        self._csv.close()
        self._csv = None
        if more_provenance:
            added = {*self._provenance.get(_AT_CLOSE, ()), *more_provenance}
            self._provenance |= _plain(more_provenance) | {_AT_CLOSE: sorted(added)}
        write_json(self.json_path, self._provenance)

    def _keep(self, cells: Sequence[str]) -> None:
        row = {column: _parse(cell) for column, cell in zip(self.columns, cells)}
        self.rows.append(row)
        self._measured.add(tuple(row[column] for column in self.key))

    def _start(self) -> None:
        """Open the CSV for the first new row. JSON before CSV: a CSV never stands without its provenance."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._resumed:
            rotate(self.path)
            write_json(self.json_path, self._provenance)
            write_atomic(self.path, _csv_line(self.columns))
        else:
            write_json(self.json_path, self._provenance)
        self._csv = open(self.path, "ab")  # noqa: SIM115 (closed by `close`)

    def _load_earlier(self) -> bool:
        """Take over the rows of an earlier run; False when there are none to resume."""
        if not self.path.exists():
            return False
        data = _read_bytes(self.path)
        whole = data[: data.rfind(b"\n") + 1]  # a line without its newline was cut by a kill: "12" may have been "123"
        if not whole:
            return False
        earlier = read_json(self.json_path)
        if earlier is None:
            raise UserError(f"--resume: {self.path} has no provenance {self.json_path.name}; run without --resume")
        differing = differing_fields(earlier, self._provenance)
        if differing:
            raise UserError(f"--resume: {self.path} was measured differently: {'; '.join(differing)}; drop --resume")
        header, rows = _split(whole, self.path)
        if tuple(header) != self.columns:
            raise UserError(f"--resume: {self.path} has columns {','.join(header)}, not {','.join(self.columns)}")
        for cells in rows:
            self._keep(cells)
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        self._take_over(earlier)
        return True

    def _take_over(self, earlier: Mapping[str, Any]) -> None:
        """Keep the earlier run's identity and its closing facts in the provenance of the joined file."""
        run = {name: earlier[name] for name in ("command", "utc_time", "git_commit", "ceilings") if name in earlier}
        at_close = earlier.get(_AT_CLOSE, [])
        self._provenance = {name: earlier[name] for name in at_close if name in earlier} | self._provenance
        self._provenance |= {_HISTORY: [*earlier.get(_HISTORY, []), run]}
        if at_close:
            self._provenance[_AT_CLOSE] = at_close


def read_rows(path: str | Path, required: Sequence[str], *, numbers: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a CSV with numbers parsed and empty cells None. UserError names the file and what is wrong with it.

    required: columns that must be there. numbers: those of them whose cells must all be finite numbers.
    A last line without its newline was cut by a kill; it is left out, and stderr says so.
    """
    path = Path(path)
    data = _read_bytes(path)
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        print(f"{path}: the last line has no newline (cut while it was written): left out", file=sys.stderr)
    header, rows = _split(whole, path)
    missing = [column for column in required if column not in header]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; it has {', '.join(header) or 'none'}")
    parsed = [{column: _parse(cell) for column, cell in zip(header, cells)} for cells in rows]
    for row in parsed:
        for column in numbers:
            if not isinstance(row[column], (int, float)) or not math.isfinite(row[column]):
                raise UserError(f"{path}: {column} is {row[column]!r} in one row, not a number; measure again")
    return parsed


def rotate(path: Path) -> None:
    """Earlier name.{csv,json,png} become name.prev.*, as a set.

    The CSV goes first: killed after it, the next call finds no CSV and moves the rest to where the CSV already is.
    """
    as_a_set = path.exists()
    for suffix in (".csv", ".json", ".png"):
        current, previous = path.with_suffix(suffix), path.with_suffix(f".prev{suffix}")
        if current.exists():
            os.replace(current, previous)
        elif as_a_set:
            previous.unlink(missing_ok=True)  # it belongs to a still earlier CSV


# --- text of the files -----------------------------------------------------------------------------------------------
def _format(value: Any) -> str:
    value = _scalar(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    text = repr(value) if isinstance(value, float) else str(value)
    if "\n" in text or "\r" in text:
        raise ValueError(
            f"a CSV cell may not hold a line break: {text!r}"
        )  # a line is a row: that is what repairs rely on
    return text


def _parse(text: str) -> Any:
    """A cell as int, float, None (empty) or the text it is. Only plain decimal forms are numbers."""
    if text == "":
        return None
    if re.fullmatch(r"-?(0|[1-9][0-9]*)", text):
        return int(text) if len(text) < 4000 else text
    if text in ("nan", "inf", "-inf"):
        return float(text)
    if re.fullmatch(r"-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?", text) and math.isfinite(float(text)):
        return text if re.match(r"-?0[0-9]", text) else float(text)  # 007 is a name
    return text


def _csv_line(cells: Sequence[str]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode()


def _split(data: bytes, path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; measure again, or restore the file") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")[:-1]]
    try:
        table = [next(csv.reader([line]), []) for line in lines]
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV ({error}); measure again, or restore the file") from None
    if not table:
        raise UserError(f"{path}: empty; measure again")
    header = table[0]
    for number, cells in enumerate(table[1:], start=2):
        if cells and len(cells) != len(header):
            raise UserError(f"{path} line {number}: {len(cells)} cells under {len(header)} columns")
    return header, [cells for cells in table[1:] if cells]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; measure it first") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_atomic(path: Path, data: bytes) -> None:
    """The whole of `data` under `path`, or what was there before: never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

"""The first column of a host matrix, on the device."""

from collections.abc import Callable

import numpy as np

from common.grading.lab import OUTPUT_FILL, UNWRITTEN, Case, Lab, Mistake
from common.grading.labs.values import draw


def _case(group: str, rows: int, cols: int, **more) -> Case:
    return Case(group, {"rows": rows, "cols": cols}, **more)


CASES = (
    _case("shapes", 1, 1, quick=True),
    _case("shapes", 31, 3),
    _case("shapes", 32, 32, quick=True),
    _case("shapes", 33, 5, quick=True),
    _case("shapes", 64, 1),
    _case("shapes", 1, 64, quick=True),
    _case("shapes", 3, 100),
    _case("shapes", 1023, 7),
    _case("shapes", 1025, 2, quick=True),
    _case("shapes", 257, 33, quick=True),
    _case("shapes", 7, 1025),
    _case("shapes", 1031, 97, hidden=True),
    _case("shapes", 511, 513, hidden=True),
    _case("huge", 70001, 3, heavy=True),
    _case("huge", 2, 300_007, heavy=True),
    _case("huge", 4096, 8192, gpu_only=True),
    _case("values", 100, 9, values="a NaN"),
    _case("values", 99, 9, values="an infinity"),
    _case("values", 100, 9, values="zeros"),
    _case("values", 100, 9, values="mixed magnitudes"),
    _case("repeated calls", 130, 17, calls=3, quick=True),
)


def make_inputs(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    rows, cols = case.sizes["rows"], case.sizes["cols"]
    a = draw(case.values, rows * cols, rng)
    if case.values in ("a NaN", "an infinity"):
        a[rows // 2 * cols] = a[rows * cols // 2]  # in the first column, where it must arrive
    return [a]


def matrix(case: Case, inputs) -> np.ndarray:
    return inputs[0].reshape(case.sizes["rows"], case.sizes["cols"])


def _picked(index: Callable[[np.ndarray, int, int], np.ndarray]) -> Callable:
    """Element r of the output is element `index(r, rows, cols)` of the flat matrix, or unwritten if out of range."""

    def predict(case: Case, inputs) -> np.ndarray:
        rows, cols = case.sizes["rows"], case.sizes["cols"]
        at = index(np.arange(rows, dtype=np.int64), rows, cols)
        inside = (at >= 0) & (at < rows * cols)
        return np.where(inside, inputs[0].astype(np.float64)[np.where(inside, at, 0)], UNWRITTEN)

    return predict


def _first_rows(count: int) -> Callable:
    return _picked(lambda r, rows, cols: np.where(r < count, r * cols, -1))


def _whole_blocks(block: int) -> Callable:
    return _picked(lambda r, rows, cols: np.where(r < rows // block * block, r * cols, -1))


def _bytes(to_pitch: int, from_pitch: Callable[[int], int], width: int) -> Callable:
    """cudaMemcpy2D with these numbers taken as bytes, on an output that holds the harness's NaNs."""

    def predict(case: Case, inputs) -> np.ndarray:
        rows, cols = case.sizes["rows"], case.sizes["cols"]
        source = np.frombuffer(inputs[0].tobytes(), dtype=np.uint8)
        target = np.full(rows, OUTPUT_FILL["nan"], dtype=np.uint32).view(np.uint8)
        for r in range(rows):
            piece = source[r * from_pitch(cols) :][:width]
            target[r * to_pitch : r * to_pitch + len(piece)] = piece[: max(0, target.size - r * to_pitch)]
        untouched = target.view(np.uint32) == OUTPUT_FILL["nan"]
        return np.where(untouched, UNWRITTEN, target.view(np.float32).astype(np.float64))

    return predict


def _bytes_of_column(case: Case, inputs) -> np.ndarray:
    """The column in one copy, whose size is its number of elements taken as bytes."""
    rows = case.sizes["rows"]
    column = np.ascontiguousarray(matrix(case, inputs)[:, 0])
    target = np.full(rows, OUTPUT_FILL["nan"], dtype=np.uint32).view(np.uint8)
    target[:rows] = column.view(np.uint8)[:rows]
    untouched = target.view(np.uint32) == OUTPUT_FILL["nan"]
    return np.where(untouched, UNWRITTEN, target.view(np.float32).astype(np.float64))


_PITCH = "sizes, widths and pitches of copies are in bytes: elements were given"

LAB = Lab(
    name="host_GPU",
    source="copy_first_column.cu",
    function="copy_first_column",
    signature="void copy_first_column(float *h_A, float *d_A, int rows, int cols)",
    harness="copy_first_column.cpp",
    cases=CASES,
    make_inputs=make_inputs,
    expected=lambda case, inputs: matrix(case, inputs)[:, 0].astype(np.float64),
    tolerance=lambda case, inputs, result: np.zeros(1),
    needs_kernel=False,
    mistakes=(
        Mistake("first-row", "that is the first row: column elements lie cols apart", _picked(lambda r, rows, cols: r)),
        Mistake("last-column", "that is the last column", _picked(lambda r, rows, cols: r * cols + cols - 1)),
        Mistake("second-column", "that is the second column", _picked(lambda r, rows, cols: r * cols + 1)),
        Mistake(
            "diagonal", "the step is cols + 1: that is the diagonal", _picked(lambda r, rows, cols: r * (cols + 1))
        ),
        Mistake(
            "stride-of-rows", "the step between elements is cols, not rows", _picked(lambda r, rows, cols: r * rows)
        ),
        Mistake(
            "stride-short",
            "the step is cols - 1: the pitch is a whole row",
            _picked(lambda r, rows, cols: r * (cols - 1)),
        ),
        Mistake("reversed", "the rows arrive in reverse", _picked(lambda r, rows, cols: (rows - 1 - r) * cols)),
        Mistake("bytes-not-elements", _PITCH, _bytes(4, lambda cols: cols, 4)),
        Mistake("bytes-not-elements", _PITCH, _bytes(1, lambda cols: cols, 1)),
        Mistake("bytes-not-elements", _PITCH, _bytes(4, lambda cols: 4 * cols, 1)),
        Mistake("bytes-not-elements", _PITCH, _bytes_of_column),
        Mistake(
            "first-element", "every row gets the first row's element", _picked(lambda r, rows, cols: np.zeros_like(r))
        ),
        *(
            Mistake("tail-unwritten", f"the last rows are missing when rows is not a multiple of {b}", _whole_blocks(b))
            for b in (1024, 512, 256, 128, 64, 32)
        ),
        *(
            Mistake("rows-missing", f"only the first {'row arrives' if n == 1 else f'{n} rows arrive'}", _first_rows(n))
            for n in (1, 32, 64, 128, 256, 512, 1024, 65535)
        ),
    ),
    hints={
        "tail-unwritten": "rows / block rounds down: (rows + block - 1) / block, and a guard `if (row < rows)`.",
        "first-row": "A plain cudaMemcpy takes what lies together. What takes a width, a height and two pitches?",
        "bytes-not-elements": "A plain copy of a column: rows * sizeof(float). cudaMemcpy2D: source pitch"
        " cols * sizeof(float), target pitch and width sizeof(float), height rows.",
        "rows-missing": "How many rows does the copy, or the grid, cover? One block ends at 1024 threads.",
    },
)

"""RMSNorm over the rows of a matrix."""

import numpy as np

from common.grading.lab import UNWRITTEN, Case, Lab, Mistake
from common.grading.labs import rms_norm


def _case(group: str, rows: int, cols: int, **more) -> Case:
    return Case(group, {"rows": rows, "cols": cols}, **more)


CASES = (
    _case("shapes", 1, 1, quick=True),
    _case("shapes", 1, 31),
    _case("shapes", 1, 32, quick=True),
    _case("shapes", 1, 33, quick=True),
    _case("shapes", 4, 64, quick=True),
    _case("shapes", 3, 257, quick=True),
    _case("shapes", 2, 1023),
    _case("shapes", 3, 1024),
    _case("shapes", 2, 1025, quick=True),
    _case("shapes", 2, 512),  # these two tell blocks of 256 threads from those of 512 and 1024
    _case("shapes", 3, 768),
    _case("shapes", 5, 127),
    _case("shapes", 37, 7),
    _case("shapes", 300, 3),
    _case("shapes", 6, 2048),
    _case("shapes", 2, 8191),
    _case("shapes", 129, 96, hidden=True),
    _case("shapes", 7, 4099, hidden=True),
    _case("huge", 3001, 1, heavy=True),
    _case("huge", 2, 100003, heavy=True),
    _case("huge", 1, 16384, heavy=True),
    _case("huge", 70001, 1, gpu_only=True),  # more rows than gridDim.y may count
    _case("huge", 8192, 8192, gpu_only=True),
    _case("values", 3, 100, values="equal", quick=True),
    _case("values", 3, 100, values="zeros"),
    _case("values", 3, 100, values="tiny"),
    _case("values", 3, 100, values="large"),
    _case("values", 3, 100, values="mixed magnitudes"),
    _case("values", 3, 101, values="an infinity"),
    _case("values", 3, 101, values="a minus infinity"),
    _case("values", 3, 101, values="a NaN"),
    _case("epsilon", 3, 100, epsilon=0.5, quick=True),
    _case("epsilon", 3, 100, epsilon=1e-5, values="tiny"),
    _case("epsilon", 2, 1500, epsilon=2.0),
    _case("repeated calls", 3, 130, calls=3, quick=True),
    _case("repeated calls", 9, 1025, calls=2),
)


def _row_scale_of_first(case: Case, inputs) -> np.ndarray:
    x, weight = rms_norm.arrays(case, inputs)
    return x / np.sqrt((x[:1] ** 2).mean(axis=1, keepdims=True) + case.epsilon) * weight


def _weight_by_row(case: Case, inputs) -> np.ndarray:
    x, weight = rms_norm.arrays(case, inputs)
    picked = weight[np.minimum(np.arange(x.shape[0]), len(weight) - 1)][:, None]
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + case.epsilon) * picked


def _mean_over_rows(case: Case, inputs) -> np.ndarray:
    x, weight = rms_norm.arrays(case, inputs)
    return x / np.sqrt((x * x).sum(axis=1, keepdims=True) / x.shape[0] + case.epsilon) * weight


def _whole_matrix(case: Case, inputs) -> np.ndarray:
    x, weight = rms_norm.arrays(case, inputs)
    return x / np.sqrt((x * x).mean() + case.epsilon) * weight


def _by_columns(case: Case, inputs) -> np.ndarray:
    x, weight = rms_norm.arrays(case, inputs)
    x = x.reshape(x.shape[::-1]).T
    result = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + case.epsilon) * weight
    return result.T.ravel()


def _first_rows(count: int):
    def predict(case: Case, inputs) -> np.ndarray:
        result = rms_norm.expected(case, inputs)
        result[count:] = UNWRITTEN
        return result

    return predict


LAB = Lab(
    name="rms_norm/matrix",
    source="rms_norm_matrix.cu",
    function="rms_norm_matrix",
    signature="void rms_norm_matrix(float *input, float *weight, float *output, int rows, int cols, float epsilon)",
    harness="rms_norm_matrix.cpp",
    cases=CASES,
    make_inputs=rms_norm.make_inputs,
    expected=rms_norm.expected,
    tolerance=rms_norm.tolerance,
    mistakes=(
        *rms_norm.formulas(),
        Mistake("first-rows-scale", "every row is divided by the RMS of row 0", _row_scale_of_first),
        Mistake("weight-by-row", "the weight is indexed by the row: it has one element a column", _weight_by_row),
        Mistake("divided-by-rows", "a row's sum is divided by rows: it has cols elements", _mean_over_rows),
        Mistake("column-major", "the matrix is row-major: its element [r][c] is at r * cols + c", _by_columns),
        Mistake("whole-matrix", "the mean is taken over the whole matrix, not over each row", _whole_matrix),
        *(
            Mistake(
                "rows-missing",
                f"only the first {'row is' if n == 1 else f'{n} rows are'} written: the grid covers too few rows",
                _first_rows(n),
            )
            for n in (1, 2, 32, 64, 128, 256, 512, 1024, 65535)
        ),
        *rms_norm.reductions(),
    ),
    hints={},
)

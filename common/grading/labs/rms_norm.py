"""What both RMSNorm labs share: the oracle, the tolerance, and the formulas of plausible mistakes.

y = x / sqrt(mean(x^2) + epsilon) * weight, the mean over a row (Zhang and Sennrich, 2019, arXiv:1910.07467).
"""

from collections.abc import Callable

import numpy as np

from common.grading.lab import UNWRITTEN, Case, Mistake
from common.grading.labs.values import EPS32, draw

BLOCKS = (1024, 512, 256, 128, 64, 32)  # block sizes that a learner may have chosen


def shape_of(case: Case) -> tuple[int, int]:
    return case.sizes.get("rows", 1), case.sizes["cols"]


def make_inputs(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    rows, cols = shape_of(case)
    x = draw(case.values, rows * cols, rng)
    if case.values == "normal":  # rows of different size, so that one row's norm does not serve another
        x = (x.reshape(rows, cols) * (1 + np.arange(rows, dtype=np.float32)[:, None] % 7)).ravel()
    weight = (1 + 0.5 * rng.standard_normal(cols)).astype(np.float32)
    return [x, weight]


def arrays(case: Case, inputs) -> tuple[np.ndarray, np.ndarray]:
    """x [rows, cols] and weight [cols] in float64."""
    return inputs[0].reshape(shape_of(case)).astype(np.float64), inputs[1].astype(np.float64)


def expected(case: Case, inputs) -> np.ndarray:
    x, weight = arrays(case, inputs)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + case.epsilon) * weight


def tolerance(case: Case, inputs, result: np.ndarray) -> np.ndarray:
    """Rounding of a float32 sum of `cols` squares: its relative error grows as sqrt(cols), a chain's in the worst case
    faster; 4 sqrt(cols) + 16 units leave room for any sensible order and for the approximate rsqrtf."""
    return EPS32 * (16 + 4 * np.sqrt(case.sizes["cols"])) * np.abs(result) + 1e-37


def by_sum_of_squares(squares: Callable[[Case, np.ndarray], np.ndarray]) -> Callable:
    """A prediction whose mean of squares is `squares(case, x) / cols`, one number a row."""

    def predict(case: Case, inputs) -> np.ndarray:
        x, weight = arrays(case, inputs)
        mean = squares(case, x).reshape(-1, 1) / x.shape[1]
        return x / np.sqrt(mean + case.epsilon) * weight

    return predict


def _formula(function: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> Callable:
    return lambda case, inputs: function(*arrays(case, inputs), case.epsilon)


def _mean(x: np.ndarray) -> np.ndarray:
    return (x * x).mean(axis=1, keepdims=True)


def _variance_form(x, weight, epsilon):
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt(_mean(centred) + epsilon) * weight


def _writing_only(covered: Callable[[int], int]) -> Callable:
    """The right values in the first `covered(cols)` columns, nothing after them."""

    def predict(case: Case, inputs) -> np.ndarray:
        result = expected(case, inputs)
        result[:, covered(result.shape[1]) :] = UNWRITTEN
        return result

    return predict


def formulas() -> tuple[Mistake, ...]:
    """Mistakes in the formula itself."""
    return (
        Mistake(
            "eps-ignored",
            "epsilon is never added: rows of small values come out wrong",
            _formula(lambda x, w, e: x / np.sqrt(_mean(x)) * w),
        ),
        Mistake(
            "eps-outside-sqrt",
            "epsilon is added outside the square root: x / (sqrt(mean) + epsilon)",
            _formula(lambda x, w, e: x / (np.sqrt(_mean(x)) + e) * w),
        ),
        Mistake(
            "eps-added-to-sum",
            "epsilon is added to the sum, before it is divided by cols",
            _formula(lambda x, w, e: x / np.sqrt(((x * x).sum(axis=1, keepdims=True) + e) / x.shape[1]) * w),
        ),
        Mistake(
            "mean-not-divided",
            "the sum of squares is not divided by cols",
            _formula(lambda x, w, e: x / np.sqrt((x * x).sum(axis=1, keepdims=True) + e) * w),
        ),
        Mistake(
            "weight-missing", "the weight is not applied", _formula(lambda x, w, e: x / np.sqrt(_mean(x) + e) + 0 * w)
        ),
        Mistake(
            "weight-added",
            "the weight is added instead of multiplied",
            _formula(lambda x, w, e: x / np.sqrt(_mean(x) + e) + w),
        ),
        Mistake(
            "sqrt-missing",
            "x is divided by the mean square, without its square root",
            _formula(lambda x, w, e: x / (_mean(x) + e) * w),
        ),
        Mistake(
            "scale-inverted",
            "x is multiplied by the RMS instead of divided",
            _formula(lambda x, w, e: x * np.sqrt(_mean(x) + e) * w),
        ),
        Mistake("mean-subtracted", "that is LayerNorm: RMSNorm does not subtract the mean", _formula(_variance_form)),
        Mistake(
            "squares-missing",
            "values are summed, not their squares",
            _formula(lambda x, w, e: x / np.sqrt(x.mean(axis=1, keepdims=True) + e) * w),
        ),
    )


def reductions() -> tuple[Mistake, ...]:
    """Mistakes in how a row is shared between threads, for the usual block sizes."""
    found = []
    for block in (*BLOCKS, 4):
        text = f"the reduction drops the tail when cols is not a multiple of {block}"
        found.append(
            Mistake(
                "tail-dropped",
                text,
                by_sum_of_squares(lambda c, x, b=block: (x[:, : x.shape[1] // b * b] ** 2).sum(axis=1)),
            )
        )
    for block in BLOCKS:
        text = f"the reduction covers the first {block} columns only: a thread takes one element and does not loop"
        found.append(
            Mistake("one-element-a-thread", text, by_sum_of_squares(lambda c, x, b=block: (x[:, :b] ** 2).sum(axis=1)))
        )

        def first_warp(c, x, b=block):
            return (x[:, np.arange(x.shape[1]) % b < 32] ** 2).sum(axis=1)

        if block > 32:
            text = f"only the first warp's partial sum is used (blocks of {block}): add the sums of all warps"
            found.append(Mistake("one-warp", text, by_sum_of_squares(first_warp)))

        def thread_zero(c, x, b=block):
            return (x[:, ::b] ** 2).sum(axis=1)

        text = f"each thread's own partial sum is never added to the others' (blocks of {block})"
        found.append(Mistake("no-reduction", text, by_sum_of_squares(thread_zero)))
    for block in (*BLOCKS, 4):
        text = f"the last columns are never written when cols is not a multiple of {block}"
        found.append(Mistake("tail-unwritten", text, _writing_only(lambda cols, b=block: cols // b * b)))
        text = f"only the first {block} columns are written: a thread takes one element and does not loop"
        found.append(Mistake("one-element-a-thread", text, _writing_only(lambda cols, b=block: min(cols, b))))
    return tuple(found)

"""What both RMSNorm labs share: the oracle, the tolerance, and the formulas of plausible mistakes.

y = x / sqrt(mean(x^2) + epsilon) * weight, the mean over a row (Zhang and Sennrich, 2019, arXiv:1910.07467).
"""

from collections.abc import Callable

import numpy as np

from common.grading.lab import UNWRITTEN, Case, Mistake
from common.grading.labs.values import EPS32, draw

ODD_BLOCKS = (96, 160, 192, 200, 224, 300, 320, 384, 448, 480, 500, 576, 600, 640, 768, 800, 896, 960, 1000)
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
    faster; 4 sqrt(cols) + 16 units leave room for any sensible order and for the approximate rsqrtf. Where the
    definition gives NaN, only NaN is right: a tolerance that is NaN itself would take anything."""
    allowed = EPS32 * (16 + 4 * np.sqrt(case.sizes["cols"])) * np.abs(result) + 1e-37
    return np.where(np.isfinite(result), allowed, 0.0)


def by_sum_of_squares(squares: Callable[[Case, np.ndarray], np.ndarray]) -> Callable:
    """A prediction whose mean of squares is `squares(case, x) / cols`, one number a row."""

    def predict(case: Case, inputs) -> np.ndarray:
        x, weight = arrays(case, inputs)
        mean = squares(case, x).reshape(-1, 1) / x.shape[1]
        return x / np.sqrt(mean + case.epsilon) * weight

    return predict


def counted(times: int) -> Callable:
    """A prediction in which every square counts so many times."""
    return by_sum_of_squares(lambda case, x: times * (x**2).sum(axis=1))


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
    return (*_epsilon_formulas(), *_scale_formulas(), *_operand_formulas())


def _epsilon_formulas() -> tuple[Mistake, ...]:
    """Epsilon left out, in another place, or another one."""
    return (
        Mistake(
            "eps-ignored",
            "the argument epsilon is never added: rows of small values come out wrong",
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
        *(
            Mistake(
                "eps-constant",
                f"epsilon is always {constant:g}: it is an argument of the call",
                _formula(lambda x, w, e, constant=constant: x / np.sqrt(_mean(x) + constant) * w),
            )
            for constant in (1e-6, 1e-5, 1e-8)
        ),
        Mistake(
            "eps-outside-sqrt",
            "epsilon is added to 1 / sqrt(mean): it belongs under the root",
            _formula(lambda x, w, e: x * (1 / np.sqrt(_mean(x)) + e) * w),
        ),
    )


def _scale_formulas() -> tuple[Mistake, ...]:
    """What a row is divided by, and what the weight does."""
    return (
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
        Mistake(
            "integer-division",
            "1 / cols is 0 for whole numbers: divide the sum, a float, by cols",
            _formula(lambda x, w, e: x / np.sqrt((x * x).sum(axis=1, keepdims=True) * (1 // x.shape[1]) + e) * w),
        ),
        Mistake(
            "divided-twice",
            "the sum is divided by cols twice",
            _formula(lambda x, w, e: x / np.sqrt(_mean(x) / x.shape[1] + e) * w),
        ),
        Mistake(
            "divided-by-less",
            "the sum is divided by cols - 1, as for a variance: the mean is over all cols",
            _formula(lambda x, w, e: x / np.sqrt((x * x).sum(axis=1, keepdims=True) / (x.shape[1] - 1) + e) * w),
        ),
        *(
            Mistake(
                "divided-by-block",
                f"the sum is divided by {block}, the number of threads: the mean is over cols elements",
                _formula(lambda x, w, e, b=block: x / np.sqrt((x * x).sum(axis=1, keepdims=True) / b + e) * w),
            )
            for block in BLOCKS
        ),
    )


def _operand_formulas() -> tuple[Mistake, ...]:
    """What is summed, and what is multiplied with the scale."""
    return (
        Mistake(
            "input-missing",
            "the output is weight / RMS: the input is not multiplied in",
            _formula(lambda x, w, e: 0 * x + w / np.sqrt(_mean(x) + e)),
        ),
        Mistake(
            "weight-divided",
            "the weight is divided by: multiply",
            _formula(lambda x, w, e: x / np.sqrt(_mean(x) + e) / w),
        ),
        Mistake("mean-subtracted", "that is LayerNorm: RMSNorm does not subtract the mean", _formula(_variance_form)),
        Mistake(
            "squares-missing",
            "values are summed, not their squares",
            _formula(lambda x, w, e: x / np.sqrt(x.mean(axis=1, keepdims=True) + e) * w),
        ),
        Mistake(
            "squares-missing",
            "absolute values are summed, not squares",
            _formula(lambda x, w, e: x / np.sqrt(np.abs(x).mean(axis=1, keepdims=True) + e) * w),
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
    return tuple(found) + combining() + covering()


def _by_thread(x: np.ndarray, block: int) -> np.ndarray:
    """[rows, block]: each thread's sum of squares where thread t takes columns t, t + block, ..."""
    whole = np.zeros((x.shape[0], -(-x.shape[1] // block) * block))
    whole[:, : x.shape[1]] = x**2
    return whole.reshape(x.shape[0], -1, block).sum(axis=1)


def _halved(sums: np.ndarray) -> np.ndarray:
    """What thread 0 has after `for (h = block / 2; h > 0; h /= 2) if (t < h) s[t] += s[t + h]`."""
    sums, half = sums.copy(), sums.shape[1] // 2
    while half:
        sums[:, :half] += sums[:, half : 2 * half]
        half //= 2
    return sums[:, 0]


def _lane_of_column(case: Case, inputs) -> np.ndarray:
    """Blocks of one warp in which every lane uses what __shfl_down_sync left it."""
    x, weight = arrays(case, inputs)
    sums = _by_thread(x, 32)
    for step in (16, 8, 4, 2, 1):
        sums = sums + np.where(np.arange(32) + step < 32, np.roll(sums, -step, axis=1), sums)
    mean = sums[:, np.arange(x.shape[1]) % 32] / x.shape[1]
    return x / np.sqrt(mean + case.epsilon) * weight


def combining() -> tuple[Mistake, ...]:
    """Mistakes in how the threads' sums become one."""
    found = [
        Mistake("one-lane", "only lane 0 has the sum after __shfl_down_sync: hand it to the others", _lane_of_column)
    ]

    def lower_lanes(times):
        return lambda c, x: times * (x[:, np.arange(x.shape[1]) % 32 < 16] ** 2).sum(axis=1)

    for times in (1, 2):  # 2: with width 16 a lane without a partner adds its own value
        text = "only lanes 0 to 15 of each warp are added up: the first step of a shuffle is 16, its width 32"
        found.append(Mistake("half-warp", text, by_sum_of_squares(lower_lanes(times))))
    for times, who in ((32, "by every lane of a warp"), *((b, f"by all {b} threads of a block") for b in BLOCKS[:-1])):
        text = f"a sum that all have is added {who}, so it counts {times} times: let one thread add it"
        found.append(Mistake("counted-often", text, counted(times)))
    text = "the last step of the halving is missing (to 1: `> 0`, not `> 1`): the odd threads' sums are lost"
    found.append(Mistake("last-step", text, by_sum_of_squares(lambda c, x: (x[:, ::2] ** 2).sum(axis=1))))
    for block in BLOCKS[:-1]:
        text = (
            f"the sums of the upper half of the threads are lost (blocks of {block}): a tree starts at blockDim.x / 2"
        )
        found.append(
            Mistake(
                "half-block", text, by_sum_of_squares(lambda c, x, b=block: _by_thread(x, b)[:, : b // 2].sum(axis=1))
            )
        )
    for block in ODD_BLOCKS:
        text = f"halving loses sums where the number of threads is no power of two (blocks of {block})"
        found.append(Mistake("odd-halving", text, by_sum_of_squares(lambda c, x, b=block: _halved(_by_thread(x, b)))))
    return tuple(found)


def covering() -> tuple[Mistake, ...]:
    """Mistakes in which columns are written."""
    found = []
    for block in (*BLOCKS, 4):
        text = f"the last columns are never written when cols is not a multiple of {block}"
        found.append(Mistake("tail-unwritten", text, _writing_only(lambda cols, b=block: cols // b * b)))
        text = f"only the first {block} columns are written: a thread takes one element and does not loop"
        found.append(Mistake("one-element-a-thread", text, _writing_only(lambda cols, b=block: min(cols, b))))
    return tuple(found)

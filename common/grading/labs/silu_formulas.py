"""What both SiLU labs share: the oracle, the tolerance, and the formulas of plausible mistakes.

silu(x) = x / (1 + exp(-x)) (Elfwing, Uchibe and Doya, 2017, arXiv:1702.03118; also called swish).
"""

import math
from collections.abc import Callable

import numpy as np

from common.grading.lab import UNWRITTEN, Case, Mistake
from common.grading.labs.values import EPS32


def silu(x: np.ndarray) -> np.ndarray:
    """float64; -inf gives NaN, as the definition does (inf / inf)."""
    x = np.asarray(x, dtype=np.float64)
    return x / (1 + np.exp(-x))


def tolerance(x: np.ndarray, result: np.ndarray, eps: float = EPS32) -> np.ndarray:
    """A fast float32 exp(-x) has a relative error that grows as |x|; where it overflows, the result may round to 0.
    x / 2 (1 + tanh(x / 2)) is SiLU, too: where x is negative the sum cancels, up to a rounding error of x itself.

    NaN (anything goes) at -inf: the definition gives NaN, the limit is 0, and both are in use.
    """
    x = np.asarray(x, dtype=np.float64)
    with np.errstate(all="ignore"):
        allowed = (16 * eps + 4 * EPS32 * np.minimum(np.abs(x), 200)) * np.abs(result) + 2e-36
        allowed += 2 * EPS32 * np.minimum(np.abs(x), 20)  # beyond 20 the sum is 0, and so is SiLU to that precision
    allowed = np.where(np.isfinite(result), allowed, 0.0)
    return np.where(np.isneginf(x), np.nan, allowed)


def _of(function: Callable[[np.ndarray], np.ndarray]) -> Callable:
    return lambda case, inputs: function(inputs[0].astype(np.float64))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _overflowing(case: Case, inputs) -> np.ndarray:
    x = inputs[0]
    grown = np.exp(x)  # float32, as the learner's
    return x * grown / (1 + grown)


def formulas() -> tuple[Mistake, ...]:
    """Mistakes in the formula itself."""
    erf = np.vectorize(math.erf, otypes=[float])
    return (
        Mistake("sigmoid-only", "that is sigmoid(x): SiLU is x times it", _of(_sigmoid)),
        Mistake(
            "wrong-sign",
            "the exponent has the wrong sign: sigmoid(x) = 1 / (1 + exp(-x))",
            _of(lambda x: x / (1 + np.exp(x))),
        ),
        Mistake("overflow", "exp(x) overflows for large x and inf / inf is NaN: use exp(-x)", _overflowing),
        Mistake("one-missing", "the 1 in 1 + exp(-x) is missing", _of(lambda x: x / np.exp(-x))),
        Mistake(
            "parentheses",
            "x / 1 + exp(-x) is (x / 1) + exp(-x): put 1 + exp(-x) in parentheses",
            _of(lambda x: x + np.exp(-x)),
        ),
        Mistake(
            "parentheses",
            "1 / 1 + exp(-x) is (1 / 1) + exp(-x): put 1 + exp(-x) in parentheses",
            _of(lambda x: x * (1 + np.exp(-x))),
        ),
        Mistake("squared", "x is multiplied in twice", _of(lambda x: x * x * _sigmoid(x))),
        Mistake("relu", "that is ReLU", _of(lambda x: np.maximum(x, 0))),
        Mistake("gelu", "that is GELU", _of(lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))))),
        Mistake(
            "gelu",
            "that is GELU (its tanh form)",
            _of(lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ),
        Mistake(
            "quick-gelu", "1.702 is GELU's approximation: SiLU has no factor", _of(lambda x: x * _sigmoid(1.702 * x))
        ),
        Mistake("tanh", "tanh(x) is not sigmoid(x)", _of(lambda x: x * np.tanh(x))),
    )


def _writing_only(count: Callable[[int], int]) -> Callable:
    def predict(case: Case, inputs) -> np.ndarray:
        result = silu(inputs[0])
        result[count(result.size) :] = UNWRITTEN
        return result

    return predict


def _overlapping(block: int, step: Callable[[int], int]) -> Callable:
    """Blocks whose first elements lie `step(blocks)` apart, where they should lie `block` apart."""

    def predict(case: Case, inputs) -> np.ndarray:
        result = silu(inputs[0])
        blocks = -(-result.size // block)
        at = (np.arange(blocks)[:, None] * step(blocks) + np.arange(block)).ravel()
        missed = np.ones(result.size, dtype=bool)
        missed[at[at < result.size]] = False
        result[missed] = UNWRITTEN
        return result

    return predict


def coverage() -> tuple[Mistake, ...]:
    """Grids that miss a part, for the usual block sizes."""
    found = []
    for block in (1024, 512, 256, 128, 64, 32, 4):
        text = f"the last elements are never written when n is not a multiple of {block}"
        found.append(Mistake("tail-unwritten", text, _writing_only(lambda n, b=block: n // b * b)))
    for block in (1024, 512, 256, 128, 64, 32):
        text = f"only the first {block} elements are written: the grid has one block, or all blocks take the same"
        found.append(Mistake("one-block", text, _writing_only(lambda n, b=block: min(n, b))))
        text = f"blocks overlap: the first element of a block is its number times {block}, the elements of a block"
        for step in (lambda blocks: blocks, lambda blocks: 1):
            found.append(Mistake("blocks-overlap", text, _overlapping(block, step)))
    return tuple(found)

"""RMSNorm of one long vector, its sum shared by the whole grid."""

import numpy as np

from common.grading.lab import Case, Lab, Mistake
from common.grading.labs import rms_norm


def _case(group: str, cols: int, **more) -> Case:
    return Case(group, {"cols": cols}, **more)


CASES = (
    *(_case("shapes", cols, quick=cols in (1, 33, 1025)) for cols in (1, 31, 32, 33, 255, 256, 1023, 1025)),
    _case("shapes", 4096, quick=True),
    _case("shapes", 10007, quick=True),
    _case("shapes", 2018, hidden=True),
    _case("shapes", 20011, hidden=True),
    _case("huge", 65537, heavy=True),
    _case("huge", 300007, heavy=True),
    _case("huge", 1 << 20, gpu_only=True),
    _case("huge", 50_000_017, gpu_only=True),
    _case("values", 1000, values="equal", quick=True),
    _case("values", 1000, values="zeros"),
    _case("values", 1000, values="tiny"),
    _case("values", 1000, values="large"),
    _case("values", 1000, values="mixed magnitudes"),
    _case("values", 1001, values="an infinity"),
    _case("values", 1001, values="a minus infinity"),
    _case("values", 1001, values="a NaN"),
    _case("epsilon", 1000, epsilon=0.5, quick=True),
    _case("epsilon", 1000, epsilon=1e-5, values="tiny"),
    _case("epsilon", 5000, epsilon=2.0),
    _case("repeated calls", 1025, calls=3, quick=True),
    _case("repeated calls", 5000, calls=2),
)


def _own_block(block: int, blocks: int):
    """Each block of threads uses its own sum; blocks of `block` threads, `blocks` of them in a grid-stride loop."""

    def predict(case: Case, inputs) -> np.ndarray:
        x, weight = rms_norm.arrays(case, inputs)
        owner = np.arange(x.shape[1]) // block % blocks
        sums = np.bincount(owner, weights=x[0] ** 2)
        return x / np.sqrt(sums[owner] / x.shape[1] + case.epsilon) * weight

    return predict


def _own_chunk_mean(block: int):
    """As above, and the block divides by its own number of elements."""

    def predict(case: Case, inputs) -> np.ndarray:
        x, weight = rms_norm.arrays(case, inputs)
        owner = np.arange(x.shape[1]) // block
        means = np.bincount(owner, weights=x[0] ** 2) / np.bincount(owner)
        return x / np.sqrt(means[owner] + case.epsilon) * weight

    return predict


_MANY = 1 << 30
_OWN = "each block scales by its own partial sum: the blocks' sums must be added before anybody scales"

LAB = Lab(
    name="rms_norm/vector",
    source="rms_norm_vector.cu",
    function="rms_norm_vector",
    signature="void rms_norm_vector(float *input, float *weight, float *output, int cols, float epsilon)",
    harness="rms_norm_vector.cpp",
    cases=CASES,
    make_inputs=rms_norm.make_inputs,
    expected=rms_norm.expected,
    tolerance=rms_norm.tolerance,
    mistakes=(
        *rms_norm.formulas(),
        *rms_norm.reductions(),
        *(Mistake("own-block-sum", _OWN, _own_block(b, n)) for b in rms_norm.BLOCKS for n in (_MANY, 4, 8, 16, 32, 64)),
        *(
            Mistake(
                "counted-often",
                f"each of {n} blocks adds the whole vector's sum: share the vector",
                rms_norm.counted(n),
            )
            for n in (2, 4, 8, 16)
        ),
        *(Mistake("own-block-sum", _OWN, _own_chunk_mean(b)) for b in rms_norm.BLOCKS),
    ),
    hints={
        "counted-often": "threadIdx.x counts within a block; grid.thread_rank() and grid.size() share the vector.",
        "tail-dropped": "cols need not be a multiple of the grid: loop `for (i = rank; i < cols; i += grid.size())`.",
        "race": "Between the last block's addition to the sum and the first thread's use of it stands a grid.sync();"
        " so does one between setting the sum to zero and the first addition.",
        "own-block-sum": "Shared memory is a block's own. The sum that all need must go through device memory.",
    },
)

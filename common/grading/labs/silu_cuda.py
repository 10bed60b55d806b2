"""SiLU in CUDA."""

import numpy as np

from common.grading.lab import Case, Lab
from common.grading.labs import silu_formulas
from common.grading.labs.values import draw


def _case(group: str, n: int, **more) -> Case:
    return Case(group, {"n": n}, **more)


CASES = (
    *(_case("shapes", n, quick=n in (1, 33, 1025)) for n in (1, 2, 31, 32, 33, 255, 256, 257, 1023, 1025)),
    _case("shapes", 4096, quick=True),
    _case("shapes", 10007, quick=True),
    _case("shapes", 4099, hidden=True),
    _case("shapes", 30011, hidden=True),
    _case("huge", 1_000_003, heavy=True),
    _case("huge", 1 << 20, heavy=True),
    _case("huge", 100_000_007, gpu_only=True),
    _case("values", 999, values="wide", quick=True),
    _case("values", 1000, values="zeros"),
    _case("values", 1000, values="tiny"),
    _case("values", 1000, values="large"),
    _case("values", 1001, values="an infinity"),
    _case("values", 1001, values="a minus infinity"),
    _case("values", 1001, values="a NaN"),
    _case("repeated calls", 1025, calls=3, quick=True),
)


def make_inputs(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    x = draw(case.values, case.sizes["n"], rng)
    return [3 * x if case.values == "normal" else x]


LAB = Lab(
    name="silu/CUDA",
    source="silu.cu",
    function="silu",
    signature="void silu(float *input, float *output, int n)",
    harness="silu.cpp",
    cases=CASES,
    make_inputs=make_inputs,
    expected=lambda case, inputs: silu_formulas.silu(inputs[0]),
    tolerance=lambda case, inputs, result: silu_formulas.tolerance(inputs[0], result),
    mistakes=(*silu_formulas.formulas(), *silu_formulas.coverage()),
    hints={
        "overflow": "exp(89) is larger than any float. Divide numerator and denominator by exp(x).",
        "tail-unwritten": "n / block rounds down: launch (n + block - 1) / block blocks, and guard with `if (i < n)`.",
        "blocks-overlap": "int i = blockIdx.x * blockDim.x + threadIdx.x;",
        "one-block": "i = blockIdx.x * blockDim.x + threadIdx.x, in as many blocks as it takes to cover n.",
    },
)

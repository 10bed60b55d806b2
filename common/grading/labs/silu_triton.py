"""SiLU in Triton."""

import numpy as np

from common.grading.lab import UNWRITTEN, Case, Lab, Mistake
from common.grading.labs import silu_formulas
from common.grading.labs.values import EPS32, draw

EPS = {"float32": EPS32, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALLEST = {"float32": 0.0, "float16": 2.0**-24, "bfloat16": 0.0}  # half of a subnormal step, and then some


def _case(group: str, n: int, **more) -> Case:
    return Case(group, {"n": n}, **more)


CASES = (
    *(_case("shapes", n, quick=n in (1, 33, 1025)) for n in (1, 2, 31, 32, 33, 127, 128, 1023, 1024, 1025, 4097)),
    _case("shapes", 10007, quick=True),
    _case("shapes", 5003, hidden=True),
    _case("shapes", 20011, hidden=True),
    _case("shapes", 100_000_007, gpu_only=True),
    _case("layouts", 35 * 48, layout="transposed", quick=True),
    _case("layouts", 1001, layout="every second"),
    _case("layouts", 40 * 30, layout="columns"),
    _case("layouts", 6 * 5 * 7, layout="three dimensions"),
    _case("layouts", 1000, layout="misaligned"),
    _case("layouts", 1200, layout="broadcast"),
    _case("dtypes", 1000, dtype="float16", quick=True),
    _case("dtypes", 1001, dtype="float16", values="wide"),
    _case("dtypes", 1000, dtype="float16", layout="transposed"),
    _case("dtypes", 1000, dtype="bfloat16", gpu_only=True),  # Triton's interpreter does not round to bfloat16
    _case("values", 999, values="wide", quick=True),
    _case("values", 1000, values="zeros"),
    _case("values", 1000, values="tiny"),
    _case("values", 1000, values="large"),
    _case("values", 1001, values="an infinity"),
    _case("values", 1001, values="a minus infinity"),
    _case("values", 1001, values="a NaN"),
)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that the dtype can hold exactly."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return values


def make_inputs(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    x = draw(case.values, case.sizes["n"], rng)
    x = rounded(3 * x if case.values == "normal" else x, case.dtype)
    if case.layout == "broadcast":  # the worker expands the first tenth
        x = np.resize(x[: x.size // 10], x.size)
    return [x]


def tolerance(case: Case, inputs, result: np.ndarray) -> np.ndarray:
    allowed = silu_formulas.tolerance(inputs[0], result)
    if case.dtype != "float32":
        allowed = allowed + np.where(np.isfinite(result), EPS[case.dtype] * np.abs(result) + SMALLEST[case.dtype], 0)
    return allowed


def _half_exp(case: Case, inputs) -> np.ndarray:
    """Computed in the input's own dtype: exp(-x) overflows a float16 for x < -11."""
    if case.dtype != "float16":
        return silu_formulas.silu(inputs[0])
    x = inputs[0].astype(np.float16)
    return (x / (np.float16(1) + np.exp(-x))).astype(np.float64)


def _first_memory(case: Case, inputs) -> np.ndarray:
    """The kernel reads n neighbours in memory, whatever the strides say; the result is shaped like the input."""
    n, x = case.sizes["n"], inputs[0]
    memory = backing(case, x)
    return silu_formulas.silu(memory[:n])


def _written_in_order(case: Case, inputs) -> np.ndarray:
    """The elements in their order, in an output that was made like the input."""
    result = silu_formulas.silu(inputs[0])
    if case.layout == "transposed":
        rows, cols = two_sides(result.size)
        result = result.reshape(cols, rows).T.ravel()
    return result


def backing(case: Case, x: np.ndarray) -> np.ndarray:
    """What lies in memory from the input's first element on, for each layout (the worker lays it out so)."""
    n = x.size
    if case.layout == "transposed":
        return np.ascontiguousarray(x.reshape(two_sides(n)).T).ravel()
    if case.layout == "every second":
        return np.stack([x, np.full(n, 7.0, np.float32)], axis=1).ravel()
    if case.layout == "columns":
        rows, cols = two_sides(n)
        wide = np.full((rows, cols + 3), 7.0, np.float32)
        wide[:, :cols] = x.reshape(rows, cols)
        return wide.ravel()
    if case.layout == "broadcast":
        return np.concatenate([x[: n // 10], np.full(n, UNWRITTEN)])
    return x


def two_sides(n: int) -> tuple[int, int]:
    """The most square factorisation of n."""
    rows = next(r for r in range(int(n**0.5), 0, -1) if n % r == 0)
    return rows, n // rows


LAB = Lab(
    name="silu",
    source="silu_triton_kernel.py",
    function="silu_triton",
    signature="silu_triton(input)",
    harness="",
    cases=CASES,
    make_inputs=make_inputs,
    expected=lambda case, inputs: silu_formulas.silu(inputs[0]),
    tolerance=tolerance,
    mistakes=(
        *silu_formulas.formulas(),
        Mistake(
            "strides-ignored",
            "memory is read in order, as if the input were contiguous: its strides say otherwise",
            _first_memory,
        ),
        Mistake(
            "output-strides",
            "the output is written in order of memory, but its strides are those of the transposed input",
            _written_in_order,
        ),
        Mistake("half-precision", "exp is computed in float16, which overflows: load, then .to(tl.float32)", _half_exp),
        *silu_formulas.coverage(),
    ),
    kind="triton",
    hints={
        "out-of-bounds": "The last program has offsets beyond n: mask=offsets < n, in the load and in the store.",
        "strides-ignored": "input.contiguous() is a copy in order; or compute addresses from the strides.",
        "no-kernel": "Write silu_kernel, and launch it: silu_kernel[grid](...). silu_torch.py is the reference only.",
        "output-strides": "torch.empty_like(input) keeps the strides of a transposed input: empty_like(x) of the copy.",
        "blocks-overlap": "tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
        "one-block": "tl.program_id(0) * BLOCK? The grid is the number of programs: triton.cdiv(n, BLOCK).",
    },
)

"""What a lab is to the grader: its files, its cases, its oracle, and the mistakes it recognises.

A lab module (`common.grading.labs.NAME`) holds one `Lab`. Nothing here imports torch or needs a GPU.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]

# What an output's words hold before the call, by fill pattern (harness.h): one is a NaN. Other memory differs:
# an element that was never written differs from one that was computed from unwritten memory.
OUTPUT_FILL = {"nan": np.uint32(0xFFFFDEAD), "large": np.uint32(0x4B4BDEAD)}
# In a prediction: this element is never written. (No float32 has this value.)
UNWRITTEN = -1.25e300

# A lab's folder -> the module that defines it.
LABS = {
    "rms_norm/matrix": "rms_norm_matrix",
    "rms_norm/vector": "rms_norm_vector",
    "silu/CUDA": "silu_cuda",
    "silu": "silu_triton",
    "host_GPU": "host_gpu",
}


@dataclass(frozen=True)
class Case:
    """One call with given sizes and values.

    `sizes` maps the function's integer parameters to values, in the order of the signature; `values` names how the
    inputs are drawn; `calls` > 1 calls the function that often with other inputs first. `hidden` cases are shown to
    instructors only; `quick` ones make up `--quick`; `heavy` ones run in one order of execution only; `gpu_only` ones
    are too large for the emulation.
    """

    group: str
    sizes: dict[str, int]
    values: str = "normal"
    epsilon: float = 1e-6
    calls: int = 1
    hidden: bool = False
    quick: bool = False
    heavy: bool = False
    gpu_only: bool = False
    dtype: str = "float32"  # Triton labs: the input's dtype and memory layout
    layout: str = "contiguous"

    @property
    def is_large(self) -> bool:
        """Whether it runs once only, and has longer to end."""
        return self.heavy or self.gpu_only

    @property
    def name(self) -> str:
        parts = [f"{key}={value}" for key, value in self.sizes.items()]
        parts += [self.values] if self.values != "normal" else []
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [self.layout] if self.layout != "contiguous" else []
        parts += [f"epsilon={self.epsilon:g}"] if self.epsilon != 1e-6 else []
        parts += [f"calls={self.calls}"] if self.calls != 1 else []
        return ",".join(parts)


Inputs = Sequence[np.ndarray]


@dataclass(frozen=True)
class Mistake:
    """A wrong formula: `predict(case, inputs)` is the output it gives, UNWRITTEN where it writes nothing."""

    lesson: str
    text: str
    predict: Callable[[Case, Inputs], np.ndarray]


@dataclass(frozen=True)
class Lab:
    name: str  # its folder, relative to the root
    source: str  # the learner's file
    function: str
    signature: str
    harness: str  # in common/grading/harness
    cases: tuple[Case, ...]
    make_inputs: Callable[[Case, np.random.Generator], list[np.ndarray]]
    expected: Callable[[Case, Inputs], np.ndarray]  # float64
    tolerance: Callable[[Case, Inputs, np.ndarray], np.ndarray]  # the greatest allowed |got - expected|
    mistakes: tuple[Mistake, ...] = ()
    hints: dict[str, str] = field(default_factory=dict)  # lesson -> what to look at, for --hint
    kind: str = "cuda"
    needs_kernel: bool = True  # a result that no kernel made is wrong

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    def points(self) -> tuple[dict[str, float], dict[str, float]]:
        """(points a group of cases, the table [speed]) from the lab's points.toml."""
        path = self.folder / "points.toml"
        with path.open("rb") as file:
            try:
                table = tomllib.load(file)
            except tomllib.TOMLDecodeError as error:
                raise UserError(f"{path}: {error}") from None
        unknown = set(table) - {"correctness", "speed"}
        groups = {case.group for case in self.cases}
        if unknown or set(table.get("correctness", {})) != groups:
            raise UserError(f"{path}: needs [correctness] with exactly {', '.join(sorted(groups))}, and [speed]")
        speed = table.get("speed", {})
        if set(speed) not in ({"points", "full_share", "slow_share"}, {"points", "full_us", "slow_us"}):
            raise UserError(f"{path}: [speed] needs points and either full_share, slow_share or full_us, slow_us")
        return table["correctness"], speed

    def solutions(self) -> list[Path]:
        """The ladder, in order: solutions/1_*.cu, 2_*.cu ..."""
        suffix = Path(self.source).suffix
        return sorted(p for p in (self.folder / "solutions").glob(f"[0-9]_*{suffix}"))


def get(name: str) -> Lab:
    """The lab in folder `name`; UserError with the known names if there is none."""
    key = name.strip("/")
    if key not in LABS:
        raise UserError(f"no lab {name!r}: the labs are {', '.join(LABS)}")
    return importlib.import_module(f"common.grading.labs.{LABS[key]}").LAB


def inputs_of(lab: Lab, case: Case) -> list[np.ndarray]:
    """The case's inputs; they depend on the case alone, so a class is graded on the same numbers."""
    seed = np.frombuffer(f"{lab.name}:{case.name}".encode(), dtype=np.uint8)
    with np.errstate(all="ignore"):
        return lab.make_inputs(case, np.random.default_rng(seed.tolist()))

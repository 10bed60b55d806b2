"""How long would a step take on a machine that is not here? A roofline, in place of the device, under real schedulers.

    linears             weights read / memory speed against 2 * tokens * weights / compute speed, whichever is longer,
                        with a soft corner between (below); the head works on the sampled rows only
    decode attention    K/V of the real context lengths / memory speed
    prefill attention   4 * query-key pairs * query heads * head_dim / compute speed
    the rest            norms, rotary, activations: every tensor between the linears written once and read once
    overhead            a fixed time a step and one for each request that gets a token: the two figures that are fitted
                        (`fit_overhead`) to a measured run

The corner. A product is near both limits at once where rows * 2 / element size is near compute / memory speed, and no
kernel overlaps them perfectly: (bytes^1.5 + compute^1.5)^(1/1.5) at 90 % of the read speed. Of one Llama-3-8B layer's
linears on an H200 (measured: 122, 123, 128, 130, 138, 170, 206 us at 1, 32, 64, 96, 128, 192, 256 rows) it is within
14 % everywhere, of SmolLM2's step on two CPU cores (24, 29, 33, 99, 685 ms at 1, 4, 16, 64, 512 rows) within 15 %.

Left out: CUDA graph capture, the growth of host work with the batch, clocks that fall under load, caches that hold
small models, attention kernels that are slow on few long rows. Check it on your own run (docs/simulator.md):

    python -m common.simulate --simulate h200:llama3-8b --check assignment4/Section1/results/chunked_iterations.csv
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import cli, results
from common.config import SHAPES, ModelConfig
from common.errors import CheckFailed, UserError
from common.roofline import Ceilings
from common.serving import Chunk, InstantEngine, Work

CORNER = 1.5
MEMORY_EFFICIENCY = 0.9
ELEMENT_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
KV_MEMORY_SHARE = 0.95
STEP_LIMIT, TOTAL_LIMIT = 0.15, 0.10  # what the simulator is held to: a step's median error, the total time's
WORK_COLUMNS = ("prefill_tokens", "decode_tokens", "sampled_tokens", "context_tokens", "attended_pairs")
FIT_ROUNDS, SMALLEST_DEVIATION = 30, 1e-4  # of fit_overhead: beyond these nothing changes


@dataclass(frozen=True)
class Machine:
    """What a step's time depends on. GB and TFLOP are powers of ten."""

    name: str
    memory_gb_per_s: float  # read
    tflops: float  # sustained, in `dtype`
    dtype: str
    memory_gb: float  # for weights and K/V
    overhead_s: float  # a step
    request_overhead_s: float = 0.0  # and each request whose next token it gives

    @property
    def element_size(self) -> int:
        return ELEMENT_SIZE[self.dtype]


# Measured machines only. cpu2: two cores with AVX-512, oneDNN's prepacked weights.
MACHINES = {
    "h200": Machine("h200", 4590.0, 680.0, "bfloat16", 150.0, 300e-6),
    "cpu2": Machine("cpu2", 26.0, 0.2, "float32", 8.0, 2e-3),
}
DEFAULT_SHAPE = {"h200": "llama3-8b", "cpu2": "smollm2-135m"}


def parse(text: str) -> tuple[Machine, str]:
    """ "MACHINE[:SHAPE]" -> the machine and the name of a shape. MACHINE: one of MACHINES, or a JSON file that
    `python -m common.roofline`, a measuring script (beside its CSV) or `--save` wrote. Raises UserError naming what is
    unknown."""
    source, _, shape = text.rpartition(":") if text.rpartition(":")[2] in SHAPES else (text, "", "")
    if source in MACHINES:
        machine = MACHINES[source]
    elif Path(source).is_file():
        machine = _machine_of_file(Path(source))
    else:
        raise UserError(
            f"--simulate {text}: {source!r} is neither a file nor one of {', '.join(MACHINES)}, "
            f"and a shape after a colon is one of {', '.join(SHAPES)}"
        )
    fallback = "llama3-8b" if machine.dtype != "float32" else "smollm2-135m"
    return machine, shape or DEFAULT_SHAPE.get(source, fallback)


def machine_of(known: Ceilings, dtype: str) -> Machine:
    """A machine from its measured ceilings; its memory and its overheads are guesses, of the same kind of machine."""
    on_gpu = known.device_type == "cuda"
    like = MACHINES["h200" if on_gpu else "cpu2"]
    return Machine(
        name=known.device_name,
        memory_gb_per_s=known.memory_gb_per_s(),
        # Where a CPU was slower for long it was busy with something else; a GPU's power limit is always there.
        tflops=known.peak_tflops(dtype, "sustained" if on_gpu else "burst"),
        dtype=dtype,
        memory_gb=80.0 if on_gpu else 8.0,
        overhead_s=like.overhead_s,
        request_overhead_s=like.request_overhead_s,
    )


def _machine_of_file(path: Path) -> Machine:
    record = results.read_json(path) or {}
    try:
        if "machine" in record:  # what --save wrote
            return Machine(**record["machine"])
        record = record.get("ceilings") or record
        names = {field.name for field in fields(Ceilings)}
        known = Ceilings(**{name: value for name, value in record.items() if name in names})
        half = known.device_type == "cuda" and "bfloat16" in known.tflops
        return machine_of(known, "bfloat16" if half else next(iter(known.tflops)))
    except (AttributeError, KeyError, TypeError, StopIteration):
        raise UserError(
            f"--simulate {path}: no measured ceilings in it; write one with python -m common.roofline"
        ) from None


@dataclass(frozen=True)
class StepModel:
    """Seconds of a step of a model on a machine, from what the step computes."""

    machine: Machine
    config: ModelConfig

    def time_s(self, work: Work) -> float:
        tokens = work.prefill_tokens + work.decode_tokens
        read_speed, compute_speed = self._read_speed * MEMORY_EFFICIENCY, self._compute_speed
        layers, head = self._layer_weights, self._head_weights
        element_size = self.machine.element_size
        time = self.machine.overhead_s + work.sampled_tokens * self.machine.request_overhead_s
        time += corner(layers * element_size / read_speed, 2 * tokens * layers / compute_speed)
        if work.sampled_tokens:
            time += corner(head * element_size / read_speed, 2 * work.sampled_tokens * head / compute_speed)
        time += work.context_tokens * self._kv_bytes / read_speed
        time += work.attended_pairs * self._attention_flops / compute_speed
        return time + tokens * self._activations * element_size / read_speed

    def ceiling_s(self, work: Work) -> float:
        """What the roofline allows at best: full speed, no overhead, memory and compute perfectly overlapped."""
        tokens = work.prefill_tokens + work.decode_tokens
        weights = self._layer_weights + (self._head_weights if work.sampled_tokens else 0)
        bytes_moved = weights * self.machine.element_size + (work.context_tokens + tokens) * self._kv_bytes
        flops = 2 * (tokens * self._layer_weights + work.sampled_tokens * self._head_weights)
        flops += self._attention_flops * (work.attended_pairs + work.context_tokens)
        return max(bytes_moved / self._read_speed, flops / self._compute_speed)

    # Bytes and operations a second
    @cached_property
    def _read_speed(self) -> float:
        return self.machine.memory_gb_per_s * 1e9

    @cached_property
    def _compute_speed(self) -> float:
        return self.machine.tflops * 1e12

    # Numbers of weights
    @cached_property
    def _head_weights(self) -> int:
        return self.config.hidden_size * self.config.vocab_size

    @cached_property
    def _layer_weights(self) -> int:
        return self.config.num_linear_parameters - self._head_weights

    @cached_property
    def _kv_bytes(self) -> int:
        """K and V of one token."""
        return self.config.kv_bytes_per_token(self.machine.element_size)

    @cached_property
    def _attention_flops(self) -> int:
        """Operations of one query-key pair: two products, a multiply and an add each, in every head and layer."""
        return 4 * self.config.q_size * self.config.num_hidden_layers

    @cached_property
    def _activations(self) -> int:
        """Elements written and read between the linears, a token: norms, residual sums, qkv, attention, SiLU."""
        c = self.config
        layer = 8 * c.hidden_size + 2 * (c.q_size + 2 * c.kv_size) + 2 * c.q_size + 6 * c.intermediate_size
        return layer * c.num_hidden_layers

    def num_pages(self, page_size: int) -> int:
        """Pages that 95 % of what the weights leave free can hold."""
        m, c = self.machine, self.config
        free = m.memory_gb * 1e9 - c.num_parameters * m.element_size
        pages = int(KV_MEMORY_SHARE * free / (page_size * c.kv_bytes_per_token(m.element_size)))
        if pages < 1:
            raise UserError(f"--simulate: this shape's weights do not fit in {m.name}'s {m.memory_gb:g} GB")
        return pages


def corner(bytes_s: float, compute_s: float) -> float:
    """Time of a product that takes `bytes_s` for its bytes alone and `compute_s` for its operations alone."""
    return (bytes_s**CORNER + compute_s**CORNER) ** (1 / CORNER)


class SimulatedEngine(InstantEngine):
    """Pages and tokens of the instant engine, and a clock that moves as the machine's would."""

    def __init__(self, model: StepModel, *, num_pages: int | None = None, page_size: int = 16):
        pages = num_pages or model.num_pages(page_size)
        super().__init__(
            pages, page_size, max_context=model.config.max_position_embeddings, vocab=model.config.vocab_size
        )
        self.model = model

    def step_time_s(self, chunks: Sequence[Chunk]) -> float:
        return self.model.time_s(Work.of(chunks))


def serve_replicas(loops: Sequence, requests: Iterable) -> None:
    """Serve `requests` (in order of arrival) by several schedulers, each with an engine and a clock of its own.

    The router in front gives a request, when it arrives, to the replica with the fewest requests that have not ended.
    """
    outstanding = [0] * len(loops)
    try:
        for request in requests:
            for i, loop in enumerate(loops):  # what each has done by then
                while not loop.finished() and loop.now() < request.arrival_time:
                    loop.step()
                outstanding[i] = loop.num_outstanding
            loops[outstanding.index(min(outstanding))].add_req(request)
        for loop in loops:
            while not loop.finished():
                loop.step()
    finally:
        for loop in loops:
            loop.close()


# --- checking it against a measured run ------------------------------------------------------------------------------
class Measured(NamedTuple):
    """One iteration of a measured run."""

    policy: str
    kind: str
    work: Work
    time_s: float


def read_measured(path: Path) -> list[Measured]:
    """The iterations in an *_iterations.csv. UserError where there are none, or a column or a number is missing."""
    numbers = [*WORK_COLUMNS, "time_us"]
    rows = results.read_rows(path, ["policy", "kind", *numbers], numbers=numbers)
    if not rows:
        raise UserError(f"{path}: no iterations in it")
    if any(row["time_us"] <= 0 for row in rows):
        raise UserError(f"{path}: time_us is not above 0 in one row; measure again")
    return [
        Measured(row["policy"], row["kind"], Work(**{name: row[name] for name in WORK_COLUMNS}), row["time_us"] / 1e6)
        for row in rows
    ]


def fit_overhead(model: StepModel, measured: Sequence[Measured]) -> StepModel:
    """The same model with the overheads, a step's and a request's, that fit best; neither is negative.

    Least absolute deviations, each step in parts of what it would take without them: short and long steps count alike,
    and a few that the host delayed, and the ones after them that look shorter for it, hardly pull at the rest, as
    squares would let them. By least squares whose weights follow the deviations (iteratively reweighted least squares).
    """
    without = replace(model, machine=replace(model.machine, overhead_s=0.0, request_overhead_s=0.0))
    expected = np.array([without.time_s(it.work) for it in measured])
    missing = np.array([it.time_s for it in measured]) / expected - 1
    columns = np.array([[1, it.work.sampled_tokens] for it in measured]) / expected[:, None]

    def deviations(found: np.ndarray) -> np.ndarray:
        return abs(columns @ found - missing)

    def fitted(mask: Sequence[int]) -> np.ndarray:
        found, weights = np.zeros(2), np.ones(len(missing))
        for _ in range(FIT_ROUNDS):
            found[mask] = np.linalg.lstsq(columns[:, mask] * weights[:, None], missing * weights, rcond=None)[0]
            weights = np.maximum(deviations(found), SMALLEST_DEVIATION) ** -0.5
        return found

    candidates = [fitted([0, 1]), fitted([0]), fitted([1]), np.zeros(2)]
    best = min((c for c in candidates if (c >= 0).all()), key=lambda c: deviations(c).sum())
    overhead_s, request_overhead_s = map(float, best)
    return replace(model, machine=replace(model.machine, overhead_s=overhead_s, request_overhead_s=request_overhead_s))


def errors(model: StepModel, measured: Sequence[Measured]) -> tuple[float, float]:
    """(median of a step's relative error without its sign, signed relative error of the total time)."""
    simulated = [model.time_s(it.work) for it in measured]
    steps = statistics.median(abs(s / it.time_s - 1) for s, it in zip(simulated, measured))
    return steps, sum(simulated) / sum(it.time_s for it in measured) - 1


def error_rows(model: StepModel, measured: Sequence[Measured]) -> list[dict]:
    """A line for each policy and kind of step, which tells what the model is wrong about; the last is all together."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for it in sorted(measured, key=lambda it: (it.policy, it.kind)):
        groups.setdefault((it.policy, it.kind), []).append(it)
    rows = []
    for (policy, kind), mine in [*groups.items(), (("all", ""), measured)]:
        steps, total = errors(model, mine)
        rows.append(
            {
                "policy": policy,
                "kind": kind,
                "steps": len(mine),
                "measured_ms": 1e3 * statistics.median(it.time_s for it in mine),
                "simulated_ms": 1e3 * statistics.median(model.time_s(it.work) for it in mine),
                "median_error_%": 100 * steps,
                "total_time_%": 100 * total,
            }
        )
    return rows


def main(args) -> None:
    if args.save:
        cli.check_output_file(args.save, "--save")
    machine, shape = parse(args.simulate)
    measured = read_measured(Path(args.check))
    # Fitted on every other step and checked on the rest: a figure that was fitted to itself would prove nothing.
    model = fit_overhead(StepModel(machine, SHAPES[shape]), measured[::2])
    rest = measured[1::2] or measured
    fitted = model.machine
    print(
        f"{fitted.name}, {shape} in {fitted.dtype}, fitted to every other of {len(measured):,} steps: overhead "
        f"{1e6 * fitted.overhead_s:,.0f} us a step and {1e6 * fitted.request_overhead_s:,.0f} us a request. The errors "
        "are those of the other steps:"
    )
    rows = error_rows(model, rest)
    cli.print_table(rows, list(rows[0]))
    if args.save:
        results.write_json(Path(args.save), {"machine": asdict(fitted)})
        cli.print_written(args.save)
    steps, total = errors(model, rest)
    verdict = (
        f"a step's time is wrong by {100 * steps:.1f} % at the median (at most {100 * STEP_LIMIT:.0f} % is allowed), "
        f"the total time by {100 * total:+.1f} % (at most {100 * TOTAL_LIMIT:.0f} %)"
    )
    if steps > STEP_LIMIT or abs(total) > TOTAL_LIMIT:
        raise CheckFailed(verdict)
    print(verdict)


if __name__ == "__main__":
    parser = cli.build_bare_parser(__doc__)
    parser.add_argument("--simulate", required=True, metavar="MACHINE[:SHAPE]", help="the machine of the measured run")
    parser.add_argument("--check", required=True, metavar="CSV", help="an *_iterations.csv measured on it")
    parser.add_argument(
        "--save",
        type=cli.a_path,
        metavar="FILE",
        help="write the fitted machine, for --simulate FILE",
    )
    cli.run(main, parser)

"""Do several ranks compute what one device computes? Logits of a few positions, and the greedy tokens.

A split product is summed in another order than a whole one. In float32 the greedy tokens are the same all the same, and
must be. In 16 bits the two sums round differently, the difference grows from layer to layer, and where two logits are
near each other another token wins, after which the texts have nothing in common: there the logits are compared, with
the context forced to be the same, and the tokens that part are only counted.

transformer-w3l1.py saves the logits of some rows of each batch, at the prompt's last token and after the first few of
its own greedy tokens (transformer_w3l1_logits.safetensors). transformer-tp2.py gives its ranks the same tokens and
compares. Both compute them as they compute what is timed: with the same engine, paged cache and CUDA graphs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckFailed
from common.results import read_json, read_rows, write_atomic
from common.serving import Chunk, InputRequest, Request

if TYPE_CHECKING:
    import torch

    from common.distributed import World
    from common.engine import Engine
    from common.llama import Llama

REFERENCE = "transformer_w3l1"
LOGITS_FILE = f"{REFERENCE}_logits.safetensors"
POSITIONS, MAX_ROWS = 4, 4  # of a batch: 8 MB of Llama-3's logits
SAME = ("model", "dtype", "shapes", "prompt_length", "n1", "n2", "seed")  # what makes two runs comparable
ROUNDINGS = {"bfloat16": 5.0, "float16": 10.0}
FLOAT32_TOLERANCE = 1e-4
Tokens = Sequence[Sequence[int]]


def tolerance(dtype: torch.dtype, num_layers: int) -> float:
    """The largest relative error of a row of logits that summing in another order explains.

    16 bits: each of the 2 products a layer that are summed over the ranks is rounded in another way, by about the unit
    roundoff u (bfloat16: 2^-8), and the residual stream keeps it: u sqrt(2 layers) in the end, as independent errors
    add up, times ROUNDINGS. Measured with two processes on a CPU: 1.6 to 2.2 times u sqrt(2 layers) for random weights
    in bfloat16 at 2, 8 and 32 layers; 2.3 (bfloat16) and 4.8 (float16) for the embedded model. One rank's parts of
    o_proj 5 % too large gave 8 times at 2 layers, 11 times at 32.

    float32: the thousands of terms of each sum count instead: 5e-7 to 7e-6 was measured at 2 to 32 layers.
    """
    import torch

    if dtype == torch.float32:
        return FLOAT32_TOLERANCE
    roundoff = torch.finfo(dtype).eps / 2
    return ROUNDINGS[str(dtype).removeprefix("torch.")] * roundoff * math.sqrt(2 * num_layers)


# --- the logits ------------------------------------------------------------------------------------------------------
def checked_rows(batch_size: int) -> list[int]:
    """The rows of a batch whose logits are compared: the first, the last, and what lies evenly between."""
    count = min(batch_size, MAX_ROWS)
    return sorted({i * (batch_size - 1) // max(1, count - 1) for i in range(count)})


def forced_logits(engine: Engine, prompts: Tokens, forced: Tokens) -> torch.Tensor:
    """Logits [rows, 1 + forced tokens, V] of `checked_rows`, float32, on the CPU: after each prompt, then after each
    further token of `forced`, whatever the model would have sampled. All rows are decoded together, as when timed.
    """
    import torch

    steps = len(forced[0])
    rows = torch.tensor(checked_rows(len(prompts)), device=engine.model.device)
    requests = [Request(InputRequest("", steps + 1, prompt), row) for row, prompt in enumerate(prompts)]
    found = []
    try:
        for step in range(steps + 1):
            if step:
                ids = torch.tensor([tokens[step - 1] for tokens in forced], device=engine.model.device)
                engine.set_next_tokens(requests, ids)
            chunks = [Chunk(r, r.num_computed, 1 if step else r.num_prefill) for r in requests]
            found.append(engine.model.logits(engine.hidden_states(chunks)[rows]).cpu())
    finally:
        for request in requests:
            engine.release(request)
    return torch.stack(found, dim=1)


@dataclass
class Saved:
    """What transformer-w3l1.py keeps of each batch size (the keys): the forced tokens [B, steps], the logits."""

    forced: dict[int, list[list[int]]] = field(default_factory=dict)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)

    def look(self, engine: Engine, prompts: Tokens, generated: Tokens) -> None:
        """For `experiment.measure`: the logits along the first greedy tokens."""
        steps = min(POSITIONS, len(generated[0])) - 1  # the engine may have no page for the last token generated
        forced = [list(tokens[:steps]) for tokens in generated]
        self.forced[len(prompts)], self.logits[len(prompts)] = forced, forced_logits(engine, prompts, forced)


def save_logits(out: Path, record: Mapping[str, Any], saved: Saved) -> Path:
    """Write LOGITS_FILE, whole or not at all, as belonging to the run of `record`. Its path."""
    import torch
    from safetensors.torch import save

    tensors = {f"logits.{size}": logits.contiguous() for size, logits in saved.logits.items()}
    tensors |= {f"forced.{size}": torch.tensor(forced) for size, forced in saved.forced.items()}
    path = out / LOGITS_FILE
    write_atomic(path, save(tensors, {"run": _run_of(record)}))
    return path


def _run_of(record: Mapping[str, Any]) -> str:
    """Tells the run whose JSON stands beside the logits from an earlier one, of another model or of this one."""
    return json.dumps([record[name] for name in ("utc_time", *SAME)], sort_keys=True)


def read_logits(out: Path, record: Mapping[str, Any]) -> Saved:
    """What the run of `record` saved; nothing where the file is missing, damaged or another run's."""
    import torch
    from safetensors import SafetensorError, safe_open

    saved = Saved()
    try:
        with safe_open(out / LOGITS_FILE, framework="pt") as file:
            if (file.metadata() or {}).get("run") != _run_of(record):
                return saved
            for name in file.keys():  # noqa: SIM118 (not a dict)
                kind, size = name.split(".")
                value = file.get_tensor(name)
                if kind == "logits":
                    saved.logits[int(size)] = value.to(torch.float32)
                else:
                    saved.forced[int(size)] = value.tolist()
    except (OSError, SafetensorError, KeyError):
        return Saved()
    return saved


# --- the reference ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reference:
    """What transformer-w3l1.py measured of the same model and sizes: batch size -> microseconds a step, its tokens,
    and the logits. Empty where it did not run."""

    step_us: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, list[list[int]]] = field(default_factory=dict)
    saved: Saved = field(default_factory=Saved)


def read_reference(out: Path, record: Mapping[str, Any]) -> Reference:
    """The reference in `out` for a run with provenance `record`."""
    other = read_json(out / f"{REFERENCE}.json")
    if other is None or not (out / f"{REFERENCE}.csv").exists():
        return Reference()
    kinds = [str(each["device"]).partition(":")[0] for each in (other, record)]
    if kinds[0] != kinds[1] or any(other.get(name) != record[name] for name in SAME):
        return Reference()
    rows = read_rows(out / f"{REFERENCE}.csv", ("batch_size", "time_us"))
    tokens = {int(size): rows for size, rows in other.get("output_token_ids", {}).items()}
    return Reference({row["batch_size"]: row["time_us"] for row in rows}, tokens, read_logits(out, other))


def share_reference(world: World, reference: Reference) -> Reference:
    """Rank 0's reference on every rank, but for the logits: rank 0 alone compares them."""
    views = world.broadcast([list(d.items()) for d in (reference.step_us, reference.tokens, reference.saved.forced)])
    step_us, tokens, forced = map(dict, views)
    return Reference(step_us, tokens, Saved(forced, reference.saved.logits))


# --- the comparison --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Distance:
    """How far logits are from the reference's, over `rows` x `positions` of them: the largest ||a - b|| / ||b||, and
    the largest |a - b| over the spread (largest - smallest) of b. The second sees a single wrong logit."""

    rows: int
    positions: int
    relative_error: float
    largest_difference: float

    @classmethod
    def between(cls, got: torch.Tensor, expected: torch.Tensor) -> Distance:
        """got, expected: [rows, positions, V]. What is not a number is infinitely far."""
        import torch

        apart = got - expected
        relative = apart.norm(dim=-1) / expected.norm(dim=-1)
        largest = apart.abs().amax(-1) / (expected.amax(-1) - expected.amin(-1))
        worst = [float(torch.nan_to_num(x, nan=math.inf, posinf=math.inf).max()) for x in (relative, largest)]
        return cls(*expected.shape[:2], *worst)

    def within(self, limit: float) -> bool:
        return self.relative_error <= limit and self.largest_difference <= limit

    def __str__(self) -> str:
        return (
            f"the logits of {self.rows} x {self.positions} positions are off by at most {self.relative_error:.2g} of "
            f"their norm, none by more than {self.largest_difference:.2g} of their spread"
        )


class LogitCheck:
    """Compares as the ranks measure: `look` is for `experiment.measure`, all ranks together; rank 0 has `distances`."""

    def __init__(self, world: World, saved: Saved) -> None:
        self.world, self.saved = world, saved
        self.distances: dict[int, Distance] = {}

    def look(self, engine: Engine, prompts: Tokens, generated: Tokens) -> None:
        """`generated` is not asked: the context must be the reference's."""
        size = len(prompts)
        if size not in self.saved.forced:
            return
        got = forced_logits(engine, prompts, self.saved.forced[size])
        if self.world.is_first:
            self.distances[size] = Distance.between(got, self.saved.logits[size])

    def share(self) -> dict[int, Distance]:
        """Rank 0's distances on every rank."""
        pairs = self.world.broadcast([(size, asdict(d)) for size, d in self.distances.items()])
        return {size: Distance(**values) for size, values in pairs}


@dataclass
class Verdict:
    """Sentences about what agrees, a line a batch size, and about what does not."""

    agreed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def raise_problems(self) -> None:
        """CheckFailed, if there are any."""
        if self.problems:
            raise CheckFailed("; ".join(self.problems))

    def __str__(self) -> str:
        return "\n".join(self.agreed)


def judge(
    model: Llama,
    tokens: Mapping[int, Tokens],
    prompts_of: Callable[[int], Tokens],
    expected: Mapping[int, Tokens],
    distances: Mapping[int, Distance],
) -> Verdict:
    """Compare what the ranks gave with one device, for each batch size of `tokens` that one device has run too.

    All ranks together: in float32 a token that differs is judged by running the model.
    """
    import torch

    from common.equality import require_equal

    verdict = Verdict()
    limit = tolerance(model.dtype, model.config.num_hidden_layers)
    dtype = str(model.dtype).removeprefix("torch.")
    for size, rows in tokens.items():
        if size not in expected:
            continue
        what, agreed, distance = f"batch {size} against one device", [], distances.get(size)
        try:
            if model.dtype == torch.float32:
                sentence = require_equal(model, prompts_of(size), expected[size], rows, what)
                agreed.append(sentence.removeprefix(f"{what}: "))
            else:
                agreed.append(_parted(expected[size], rows))
        except CheckFailed as error:
            verdict.problems.append(str(error))
        if distance is None:
            agreed.append("no logits of one device to compare with; run transformer-w3l1.py again")
        elif distance.within(limit):
            agreed.append(f"{distance} (limit {limit:.2g} in {dtype})")
        else:
            verdict.problems.append(f"{what}: {distance}; rounding to {dtype} explains {limit:.2g}")
        if agreed:
            verdict.agreed.append(f"{what}: {'; '.join(agreed)}")
    if not verdict.agreed and not verdict.problems:
        verdict.agreed = ["no tokens of one device to compare with; run transformer-w3l1.py on the same sizes"]
    return verdict


def _parted(expected: Tokens, got: Tokens) -> str:
    """How many rows' tokens differ, and where the first does."""
    from common.equality import first_difference

    steps = [first_difference(*rows) for rows in zip(expected, got)]
    parted = [step for step in steps if step is not None]
    if not parted:
        return "the same tokens"
    return f"{len(parted)} of {len(steps)} rows' tokens part, the first at output token {min(parted)}"

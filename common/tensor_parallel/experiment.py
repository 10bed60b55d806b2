"""What transformer-w3l1.py and transformer-tp2.py share: the generation loop, the measuring, the rows.

The loop and the decoder are the same on one device and on many. What differs is which slices of the weights a rank
loads (common/tensor_parallel/sharding.py), and that two products a layer are summed over the ranks
(common/kernels/linear.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import checkpoint, cli, roofline
from common.config import ModelConfig
from common.distributed import World
from common.engine import Engine
from common.errors import UserError
from common.generation import StepTimes, StopRule
from common.memory import MemoryUse
from common.paged.graphs import bucket_of
from common.pages import pages_for
from common.results import ResultFile
from common.scripts import text_run
from common.scripts.experiment import Experiment
from common.serving import Chunk, InputRequest, Request, Step
from common.tensor_parallel.options import PRESETS
from common.timing import summarise

COLUMNS = (
    "world",
    "batch_size",
    "time_us",
    "tokens_per_s",
    "allreduce_share",
    "memory_bytes",
    "bytes_read",
    "time_us_p10",
    "time_us_p90",
    "allreduce_us",
    "allreduce",
)
GENERATION_LIMIT_S = 120.0  # a generation that takes a second a token longer than this hangs in a collective
PAGE_SIZE = 16
Shards = Callable[[ModelConfig], checkpoint.Shard]
Look = Callable[[Engine, Sequence[Sequence[int]], Sequence[Sequence[int]]], None]
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096


def generate(engine: Engine, prompts: Sequence[Sequence[int]], stop: StopRule, times: StepTimes) -> list[list[int]]:
    """Greedy tokens after each of `prompts`. On a GPU a step is launched before the one in front of it is read, so that
    the host's work hides behind the device's. `times` is stamped when a step's tokens are on the host."""
    given = [InputRequest("", stop.output_len, prompt, ignore_eos=stop.ignore_eos) for prompt in prompts]
    requests = [Request(g, row, eos_token_ids=stop.eos_token_ids) for row, g in enumerate(given)]
    overlaps = engine.model.device.type == "cuda"
    times.start()
    step = engine.launch([Chunk(r, 0, r.num_prefill) for r in requests])
    while step is not None:
        ahead = launch_decodes(engine, requests) if overlaps else None
        for request, token in step.tokens().items():
            request.read(token, 0.0)
        times.step()
        step = ahead or launch_decodes(engine, requests)
    for request in requests:
        engine.release(request)
    return [request.output_token_ids for request in requests]


def launch_decodes(engine: Engine, requests: Sequence[Request]) -> Step | None:
    """The next step of all requests that go on; None when there is none."""
    chunks = [Chunk(r, r.num_computed, 1) for r in requests if r.wants_more]
    return engine.launch(chunks) if chunks else None


def one_by_one(exp: Experiment) -> Callable[..., list[list[int]]]:
    """For `text_run.answer`: each prompt on its own."""

    def run(prompts: Sequence[Sequence[int]], stop: StopRule, times: StepTimes) -> list[list[int]]:
        engine = make_engine(exp, 1, max(map(len, prompts)) + stop.output_len)
        return [generate(engine, [prompt], stop, Stamps())[0] for prompt in prompts]

    return run


def make_engine(exp: Experiment, batch_size: int, max_tokens: int) -> Engine:
    """An engine whose pool holds exactly `batch_size` sequences of up to `max_tokens` tokens."""
    pages = batch_size * pages_for(max_tokens, PAGE_SIZE)
    return Engine(exp.model, page_size=PAGE_SIZE, num_pages=pages, max_requests=batch_size)


class Stamps(StepTimes):
    """The host's clock (reading a token is all the waiting there must be), and beside each stamp a counter's state."""

    def __init__(self, counter: Callable[[], float] = float) -> None:
        import torch

        super().__init__(torch.device("cpu"))
        self._counter, self.counts = counter, [0.0]

    def start(self) -> None:
        super().start()
        self.counts = [self._counter()]

    def step(self) -> None:
        super().step()
        self.counts.append(self._counter())


# --- loading ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Loaded:
    """An experiment on one device or on a rank's part of the model. `config`: the whole model's; `memory`: used
    since before loading."""

    exp: Experiment
    config: ModelConfig
    memory: MemoryUse

    def provenance(self, **facts: Any) -> dict[str, Any]:
        """Provenance with the whole model's shapes, also where this process holds a part of it."""
        return replace(self.exp, model=replace(self.exp.model, config=self.config)).provenance(**facts)


def prepare(args: Any, out: Path, device: Any, world: World | None = None, tp: Shards | None = None) -> Loaded:
    """Sizes, ceilings, model. With `world`: after all ranks agreed which model it is, each loads what `tp` gives it.

    UserError, on all ranks alike, where the ranks would load different models.
    """
    typed = cli.apply_preset(args, PRESETS, device.type)
    dtype = checkpoint.pick_dtype(args.dtype, device)
    name = args.model
    if world is not None:
        # Rank 0 decides what no --model means: ranks that look one after another could find different memory free.
        name = world.broadcast(_named(checkpoint.resolve(name, device, dtype)) if world.is_first else None)
    found = checkpoint.resolve(name, device, dtype, args.context)
    folder = checkpoint.folder_of(found)
    config = found.config or ModelConfig.from_pretrained(folder)
    known = None
    if world is None or world.is_first:  # one rank measures while the others wait
        known = roofline.ceilings(device, dtype)
    if world is not None:
        facts = {"source": found.kind, "dtype": str(dtype), "device": device.type, "config": vars(config)}
        world.require_same("model", facts | {"files": fingerprint(folder) if folder else ""})
    memory = MemoryUse(device)
    quiet = world is not None and not world.is_first
    model, tokenizer = checkpoint.load(
        name, device=device, dtype=dtype, tp=tp, seed=args.seed, context=args.context, quiet=quiet
    )
    return Loaded(Experiment(args, out, typed, model, tokenizer, known), config, memory)


def _named(found: checkpoint.Source) -> str:
    return "embedded" if found.kind == "embedded" else found.name


def fingerprint(folder: Path) -> str:
    """Tells checkpoints apart without reading them whole: each file's size and 64 small blocks of it."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for block in range(SAMPLED_BLOCKS):
                file.seek(block * size // SAMPLED_BLOCKS)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


# --- measuring -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Parallel:
    """What measuring on several ranks adds.

    spent_s: seconds that this rank has spent in all-reduces so far. columns(batch_size, step_s, all_reduce_s): what is
    added to a row, from a step's seconds and those of its all-reduces; all ranks call it together.
    """

    world: World
    spent_s: Callable[[], float]
    columns: Callable[[int, float, float], dict[str, Any]]


def n1_n2(exp: Experiment) -> tuple[int, int]:
    lengths = exp.args.output_lengths
    if len(lengths) != 2:
        raise UserError(f"--output-lengths: takes two lengths n1,n2 (a step is what lies between), not {len(lengths)}")
    exp.check_context(exp.args.input_length, lengths[1], "--output-lengths")
    return lengths[0], lengths[1]


def dump_tokens(exp: Experiment, tokens: dict[int, list[list[int]]]) -> None:
    """`--dump-tokens` of a measuring run: the largest batch of this run."""
    if exp.args.dump_tokens and tokens:
        rows = tokens[max(tokens)]
        stop = StopRule(len(rows[0]), ignore_eos=True)
        text_run.dump_tokens(exp.args.dump_tokens, prompts_of(exp, len(rows)), rows, stop)


def prompts_of(exp: Experiment, batch_size: int) -> list[list[int]]:
    return [exp.tokenizer.prompt_of_length(exp.args.input_length, 97 * row) for row in range(batch_size)]


def measure(
    loaded: Loaded,
    file: ResultFile | None,
    tokens: dict[int, list[list[int]]],
    look: Look,
    parallel: Parallel | None = None,
) -> None:
    """Time a decode step at every batch size; rank 0 (or the only process) has `file` and writes the rows.

    tokens: filled with batch size -> the tokens of each row, the same on all ranks. look: called with the engine, the
    prompts and their tokens after each batch size was timed (common/tensor_parallel/check.py).
    """
    exp = loaded.exp
    n1_n2(exp)
    world = parallel.world if parallel else None
    for batch_size in exp.args.batch_sizes:
        known = file is not None and file.has(world=world.size if world else 1, batch_size=batch_size)
        if world.broadcast(known) if world else known:
            continue
        if world and world.stop_requested():
            return
        samples = _sample(exp, batch_size, tokens, look, parallel)
        if world:
            world.heartbeat.expect_within(None)
            # The slowest rank's step. Who waits least in the all-reduces waits for nobody: that is what they take.
            samples = [(max(s for s, _ in ranks), min(r for _, r in ranks)) for ranks in zip(*world.exchange(samples))]
        if not samples:
            return
        row = _row(loaded, batch_size, samples, parallel)
        if file is not None:
            file.append(**row)


def _sample(
    exp: Experiment, batch_size: int, tokens: dict[int, list[list[int]]], look: Look, parallel: Parallel | None
) -> list[tuple[float, float]]:
    """(seconds of a step, seconds of it in all-reduces) of each repeat on this rank; fewer after an interrupt."""
    (n1, n2), prompts = n1_n2(exp), prompts_of(exp, batch_size)
    engine = make_engine(exp, batch_size, exp.args.input_length + n2)
    samples = []
    for repeat in range(exp.args.warmup + exp.args.repeats):
        is_warm = repeat >= exp.args.warmup
        times = Stamps(parallel.spent_s) if parallel else Stamps()
        if parallel:
            parallel.world.heartbeat.expect_within(GENERATION_LIMIT_S + n2, f"a generation of {n2} tokens")
        stop = StopRule(n2 if is_warm else min(n2, n1 + 2), ignore_eos=True)
        generated = generate(engine, prompts, stop, times)
        if is_warm:
            tokens[batch_size] = generated
            step_s = (times.until(n2) - times.until(n1)) / (n2 - n1)
            samples.append((step_s, (times.counts[n2] - times.counts[n1]) / (n2 - n1)))
        if parallel and parallel.world.stop_requested():
            break
    if samples:
        look(engine, prompts, tokens[batch_size])
    return samples


def _row(
    loaded: Loaded, batch_size: int, samples: list[tuple[float, float]], parallel: Parallel | None
) -> dict[str, Any]:
    step = summarise([s for s, _ in samples])
    columns = {"allreduce_share": 0.0, "allreduce_us": 0.0, "allreduce": None}
    mine = [loaded.memory.num_bytes, loaded.exp.model.bytes_read]
    ranks = parallel.world.exchange(mine) if parallel else [mine]
    if parallel:
        columns = parallel.columns(batch_size, step.median_s, summarise([r for _, r in samples]).median_s)
    return {
        "world": len(ranks),
        "batch_size": batch_size,
        "time_us": 1e6 * step.median_s,
        "tokens_per_s": batch_size / step.median_s,
        "memory_bytes": max(m for m, _ in ranks),
        "bytes_read": max(b for _, b in ranks),
        "time_us_p10": 1e6 * step.p10_s,
        "time_us_p90": 1e6 * step.p90_s,
    } | columns


def rows_of(batch_size: int, device_type: str) -> int:
    """Rows of a step's activations: a captured graph pads the batch to its bucket."""
    return bucket_of(batch_size) if device_type == "cuda" else batch_size

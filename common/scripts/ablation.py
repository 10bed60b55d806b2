"""What does each technique buy? One decoder, from no cache to everything on, one technique more a bar.

A rung hands the decoder plainer operations (common/operations.py) or another attend, never another model: `no cache`
recomputes the whole text at every step, `KV cache` keeps a contiguous one, both with q, k, v and gate, up multiplied
apart and one torch operation after the other; then products are fused, then (on a GPU) norms, activation and residual,
then the script's own engine serves from pages, then its decode steps are CUDA graphs, then products are our own. On a
CPU there is what there is: prepacked weights, and pages that torch gathers.

Method: prompts of equal length, greedy. Every rung's first tokens are compared with those of `no cache` before anything
is timed. tokens_per_s = B (n2 - n1) / (time of the n2-th tokens - time of the n1-th), n1 and n2 the first and the last
of --output-lengths for one request, half as many steps for more; the rungs in turn, so that a clock that drifts hits
them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from common import cli, roofline
from common.attention import Decode, Prefill
from common.equality import require_equal
from common.errors import UserError
from common.generation import StepTimes
from common.kernels.linear import HOPPER_ROWS, MOST_ROWS
from common.kernels.runtime import Kernels, runs_triton
from common.kernels.small_gemm import small_gemm_pays
from common.kv_cache import ContiguousKVCache
from common.llama import Llama
from common.memory import free_bytes, human_bytes
from common.operations import with_kernels
from common.paged.backends import Backend, pick_backend
from common.pages import pages_for
from common.results import SUSPECT, ResultFile
from common.scripts.experiment import Experiment
from common.scripts.pipeline_sweeps import equal_works
from common.serving import InputRequest
from common.step_cost import Cost, steps_cost
from common.timing import summarise

NAME = "pipeline_ablation"
COLUMNS = (
    "batch_size", "technique", "tokens_per_s", "mbu", "speedup", "ceiling_tokens_per_s", "time", "time_p10",
    "time_p90", "repeats", "prompt_tokens", "output_tokens", SUSPECT,
)  # fmt: skip
NOT_PRINTED = {"time_p10", "time_p90", "prompt_tokens", "output_tokens"}
PRESETS = {
    "quick": {"batch_sizes": [1, 4], "input_length": 16, "output_lengths": [2, 6], "repeats": 1, "warmup": 0},
    "laptop": {"batch_sizes": [1, 32], "input_length": 16, "output_lengths": [2, 8], "repeats": 2, "warmup": 0},
    # On an H200 32 steps a run are two minutes in all, and 256, as the decode figures have them, ten: without a cache
    # 32 requests take 0.1 s a token, and the plain bars 30 ms.
    "course": {"batch_sizes": [1, 32], "input_length": 128, "output_lengths": [16, 48], "repeats": 5},
}

# What the command line has for answers and sweeps, and an ablation would ignore.
UNUSED = (
    "prompt", "prompts", "raw", "dump_tokens", "ignore_eos", "max_new_tokens", "stream", "no_sweep", "compare",
    "seq_lens", "kv_lens", "kv_pages", "kv_memory",
)  # fmt: skip


@dataclass
class Generation:
    """A run: each row's tokens, and the moment (seconds) at which the k-th tokens of all rows were on the host."""

    tokens: list[list[int]]
    stamps: list[float]


@dataclass(frozen=True)
class Rung:
    """One bar: its name and `generate(prompts, count) -> Generation`."""

    technique: str
    generate: Callable[[Sequence[Sequence[int]], int], Generation]


# --- the loops -------------------------------------------------------------------------------------------------------
def no_cache(model: Llama, prompts: Sequence[Sequence[int]], count: int) -> Generation:
    """Every step runs over all tokens so far; nothing is kept."""
    texts, times = [list(prompt) for prompt in prompts], StepTimes(model.device)
    times.start()
    for _ in range(count):
        lengths = [len(text) for text in texts]
        ids = torch.tensor([token for text in texts for token in text], device=model.device)
        last = torch.tensor(lengths, device=model.device).cumsum(0) - 1
        found = model.greedy(model.forward(ids, Prefill(model, lengths), rows=last)).tolist()
        for text, token in zip(texts, found):
            text.append(token)
        times.step()
    return Generation([text[len(prompt) :] for text, prompt in zip(texts, prompts)], times.stamps[1:])


def contiguous_cache(model: Llama, prompts: Sequence[Sequence[int]], count: int) -> Generation:
    """One pass over the prompts, then one token of each a step; K and V in one rectangle."""
    lengths, times, steps = [len(prompt) for prompt in prompts], StepTimes(model.device), []
    cache = ContiguousKVCache(model.config, len(prompts), max(lengths) + count, dtype=model.dtype, device=model.device)
    times.start()
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)
    last = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    hidden = model.forward(ids, Prefill(model, lengths, cache), rows=last)
    while True:
        ids = model.greedy(hidden)
        steps.append(ids.tolist())
        times.step()
        if len(steps) == count:
            return Generation([list(row) for row in zip(*steps)], times.stamps[1:])
        hidden = model.forward(ids, Decode(model, cache))


def paged(engine: Any, prompts: Sequence[Sequence[int]], count: int) -> Generation:
    """The script's own loop over pages: ids stay on the device, a step is launched before the last one is read."""
    start = time.perf_counter()
    requests = engine.generate_batched([InputRequest("", count, prompt) for prompt in prompts])
    stamps = [start + max(times) for times in zip(*(r.token_times for r in requests))]
    return Generation([r.output_token_ids for r in requests], stamps)


# --- the rungs -------------------------------------------------------------------------------------------------------
def ladder(model: Llama, backend: Backend, make_engine: Callable[..., Any], batch_size: int) -> list[Rung]:
    """The rungs that exist on this device, in order. make_engine(model, graphs=...) gives the script's Engine."""
    _check_memory(model)
    fused_weights = with_kernels(model, Kernels.PLAIN)
    unfused = with_kernels(fused_weights, Kernels.PLAIN, fused_weights=False)

    def rung(technique: str, loop: Callable[..., Generation], handed: Any) -> Rung:
        return Rung(technique, lambda prompts, count: loop(handed, prompts, count))

    rungs = [
        rung("no cache", no_cache, unfused),
        rung("KV cache", contiguous_cache, unfused),
        rung("fused qkv, gate_up", contiguous_cache, fused_weights),
    ]
    so_far = fused_weights
    if runs_triton(model.embed_tokens):
        so_far = with_kernels(fused_weights, Kernels.FUSED)
        rungs.append(rung("fused norms, activation, residual", contiguous_cache, so_far))
    elif model.lm_head.is_prepacked:
        so_far = model
        rungs.append(rung("oneDNN prepacked weights", contiguous_cache, so_far))
    pages = {"torch": "pages, gathered by torch", "triton": "paged attention kernel"}
    name = pages.get(backend.name, f"paged attention by {backend.name}")
    rungs.append(rung(name, paged, make_engine(so_far, graphs=False)))
    if backend.captures:
        rungs.append(rung("CUDA graph", paged, make_engine(so_far, graphs=True)))
    if own_products(model, batch_size):
        kind = "matrix-vector kernels" if batch_size == 1 else "few-row product kernels"
        rungs.append(rung(kind, paged, make_engine(model, graphs=True)))
    return rungs


def own_products(model: Llama, batch_size: int) -> bool:
    """Whether a decode step of `batch_size` rows takes products of our own on this device."""
    x = model.embed_tokens
    few = batch_size <= max(MOST_ROWS.values()) or any(batch_size in rows for rows in HOPPER_ROWS.values())
    return runs_triton(x) and (batch_size == 1 or (few and small_gemm_pays(x)))


def _check_memory(model: Llama) -> None:
    """Where weights are held prepacked, the plainer rungs need them once more."""
    needed = model.config.num_linear_parameters * model.dtype.itemsize if model.lm_head.is_prepacked else 0
    free = free_bytes(model.device)
    if needed > free:
        raise UserError(
            f"--ablation: holds the weights plain beside prepacked, {human_bytes(needed)} more, and "
            f"{human_bytes(free)} are free; use a smaller model"
        )


# --- measuring -------------------------------------------------------------------------------------------------------
@dataclass
class _Batch:
    """One batch size: its prompts, the tokens between which it is timed, and what that costs at least."""

    size: int
    prompts: list[list[int]]
    first: int
    last: int
    cost: Cost
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.size * (self.last - self.first)

    def seconds(self, rung: Rung) -> float:
        stamps = rung.generate(self.prompts, self.last).stamps
        return stamps[self.last - 1] - stamps[self.first - 1]


class Ablation:
    """The measurement. engine_type: the script's Engine."""

    def __init__(self, exp: Experiment, engine_type: Callable[..., Any]) -> None:
        self.exp, self.args, self.engine_type = exp, exp.args, engine_type
        self.backend = pick_backend(self.args.backend, exp.model)
        self.ceilings = exp.ceilings

    def measure(self) -> ResultFile:
        """The file, with the rows of every batch size; those measured until Ctrl-C where it came."""
        args, lengths = self.args, self.args.output_lengths
        if len(lengths) < 2:
            raise UserError("--output-lengths: --ablation times from the first to the last of them; give two, as 16,80")
        self.exp.check_context(args.input_length, lengths[-1], "--ablation")
        record = self.exp.provenance(backend=self.backend.name, page_size=args.page_size, ignore_eos=True)
        with ResultFile(
            self.exp.out, NAME, COLUMNS, record, key=("batch_size", "technique"), resume=args.resume
        ) as file:
            with cli.keep_partial(args):
                for size in args.batch_sizes:
                    self._measure_batch(file, self._batch(size))
        if not file.rows:
            raise KeyboardInterrupt
        return file

    def _batch(self, size: int) -> _Batch:
        first, last = self.args.output_lengths[0], self.args.output_lengths[-1]
        if size > 1:
            last = first + max((last - first) // 2, 1)
        prompt = self.args.input_length
        prompts = [self.exp.tokenizer.prompt_of_length(prompt, 31 * row) for row in range(size)]
        works = equal_works(size, prompt, last)[first:]
        return _Batch(
            size, prompts, first, last, steps_cost(self.exp.model.config, self.exp.model.dtype.itemsize, works)
        )

    def _engine(self, batch: _Batch) -> Callable[..., Any]:
        page_size = self.args.page_size
        pages = batch.size * pages_for(len(batch.prompts[0]) + batch.last, page_size)

        def make(model: Llama, *, graphs: bool) -> Any:
            return self.engine_type(
                model, backend=self.args.backend, page_size=page_size, num_pages=pages, max_requests=batch.size,
                graphs=graphs,
            )  # fmt: skip

        return make

    def _measure_batch(self, file: ResultFile, batch: _Batch) -> None:
        rungs = ladder(self.exp.model, self.backend, self._engine(batch), batch.size)
        todo = [r for r in rungs if not file.has(batch_size=batch.size, technique=r.technique)]
        if not todo:
            return
        if not own_products(self.exp.model, batch.size) and runs_triton(self.exp.model.embed_tokens):
            print(f"batch {batch.size}: no bar for products of our own: the library's are used here at so many rows")
        self._check(rungs[0], todo, batch)
        for rung in todo:
            for _ in range(self.args.warmup):
                rung.generate(batch.prompts, batch.first + 1)
        batch.samples = {rung.technique: [] for rung in todo}
        try:
            for _ in range(self.args.repeats):
                for rung in todo:
                    batch.samples[rung.technique].append(batch.seconds(rung))
        finally:  # Ctrl-C in the middle: what was timed stays, with how often it was
            for rung in todo:
                if batch.samples[rung.technique]:
                    self._append(file, rung, batch)

    def _check(self, plainest: Rung, todo: Sequence[Rung], batch: _Batch) -> None:
        """The same greedy tokens on every rung, up to the first that is timed; compiles and captures, too."""
        count = batch.first + 1
        expected = plainest.generate(batch.prompts, count).tokens
        for rung in todo:
            if rung is not plainest:
                got = rung.generate(batch.prompts, count).tokens
                what = f"batch {batch.size}, {rung.technique} against {plainest.technique}, {count} tokens a row"
                print(require_equal(self.exp.model, batch.prompts, expected, got, what), flush=True)

    def _append(self, file: ResultFile, rung: Rung, batch: _Batch) -> None:
        timing, dtype, model = summarise(batch.samples[rung.technique]), self.exp.dtype_name, self.exp.model

        def measured_again() -> float:
            nonlocal timing
            timing = summarise([batch.seconds(rung) for _ in range(self.args.repeats)])
            return 1 / timing.median_s

        _, self.ceilings, suspect = roofline.gate(
            1 / timing.median_s,
            measured_again,
            lambda c: 1 / batch.cost.seconds(c, dtype),
            self.ceilings,
            model.device,
            model.dtype,
        )
        tokens_per_s = batch.tokens / timing.median_s
        before = [row for row in file.rows if row["batch_size"] == batch.size]
        file.append(
            batch_size=batch.size,
            technique=rung.technique,
            tokens_per_s=tokens_per_s,
            mbu=batch.cost.shares(timing.median_s, self.ceilings, dtype)[0],
            speedup=tokens_per_s / before[-1]["tokens_per_s"] if before else None,
            ceiling_tokens_per_s=batch.tokens / batch.cost.seconds(self.ceilings, dtype),
            time=timing.median_s,
            time_p10=timing.p10_s,
            time_p90=timing.p90_s,
            repeats=len(timing.samples),
            prompt_tokens=batch.size * len(batch.prompts[0]),
            output_tokens=batch.size * batch.last,
            suspect=int(suspect),
        )


def conclusion(rows: Sequence[dict[str, Any]]) -> str:
    """What the rows say, in words: the whole way, and the technique that bought most, at each batch size."""
    texts = []
    for size in dict.fromkeys(row["batch_size"] for row in rows):
        part = [row for row in rows if row["batch_size"] == size]
        first, last = part[0], part[-1]
        text = (
            f"batch {size}: {cli.format_value(first['tokens_per_s'])} tokens/s with {first['technique']}, "
            f"{cli.format_value(last['tokens_per_s'])} with everything up to {last['technique']}, "
            f"{last['tokens_per_s'] / last['ceiling_tokens_per_s']:.0%} of what the machine allows"
        )
        steps = [row for row in part if row["speedup"]]
        if steps:
            best = max(steps, key=lambda row: row["speedup"])
            text += f"; {best['technique']} bought most ({best['speedup']:.3g}x)"
            lost = [row["technique"] for row in steps if row["speedup"] < 0.97]
            text += f"; {', '.join(lost)} lost" if lost else ""
        texts.append(text)
    return ". ".join(texts) + "."

"""The four sweeps of the pipeline script: decode length in one batch, prefill length alone, batch size, context.

What is timed is the script's own `generate_batched`, token ids in, token ids out, scheduling included; the time of a
token is when the host has read it. MBU and MFU come from what the launched steps computed (common/step_cost.py), and so
does bound_tokens_per_s: the same steps with each of their parts at its own ceiling, one after the other.

decode   tokens_per_s = B (n - 1) / (time of the n-th tokens - time of the first); one run passes all lengths
prefill  tokens_per_s = prompt tokens / time to the first token
batch    tokens_per_s = output tokens / time of the whole call
context  as decode, of one request, the last tokens before its context is that long
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common import cli, roofline
from common.equality import peer_sentence
from common.errors import UserError
from common.generation import StepTimes
from common.pages import pages_for
from common.results import SUSPECT, ResultFile
from common.scripts.experiment import Experiment
from common.serving import InputRequest, Work
from common.step_cost import Cost, parts_seconds, steps_cost
from common.timing import summarise

COLUMNS = (
    "backend", "batch_size", "prompt_tokens", "output_tokens", "time", "tokens_per_s", "mbu", "mfu", "time_p10",
    "time_p90", "prefill_time", "bound_tokens_per_s", SUSPECT,
)  # fmt: skip
NOT_PRINTED = {"time_p10", "time_p90"}  # they would make the table too wide
KEY = ("backend", "batch_size", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Run:
    """One call: when each step's tokens were there (`stamps`, seconds from the call), and what the steps computed."""

    stamps: list[float]
    prefill: list[Work]  # up to the first tokens
    decodes: list[Work]  # of each later token

    @classmethod
    def of(cls, stamps: list[float], works: Sequence[Work]) -> Run:
        return cls(stamps, [w for w in works if not w.decode_tokens], [w for w in works if w.decode_tokens])


@dataclass(frozen=True)
class Figure:
    """What a row states: `tokens` were computed in `seconds`, by steps that computed `works`."""

    tokens: int
    seconds: float
    works: list[Work]

    def cost(self, exp: Experiment) -> Cost:
        return steps_cost(exp.model.config, exp.model.dtype.itemsize, self.works)

    def bound_s(self, exp: Experiment, ceilings: roofline.Ceilings) -> float:
        """Seconds with every part of every step at its ceiling."""
        config, size, dtype = exp.model.config, exp.model.dtype.itemsize, exp.dtype_name
        return sum(sum(parts_seconds(config, size, work, ceilings, dtype).values()) for work in self.works)


def _decode_figure(runs: Sequence[Run], batch: int, prompt: int, n: int) -> Figure:
    seconds = summarise([run.stamps[n - 1] - run.stamps[0] for run in runs]).median_s
    return Figure(batch * (n - 1), seconds, runs[0].decodes[: n - 1])


def _prefill_figure(runs: Sequence[Run], batch: int, prompt: int, n: int) -> Figure:
    return Figure(batch * prompt, summarise([run.stamps[0] for run in runs]).median_s, runs[0].prefill)


def _batch_figure(runs: Sequence[Run], batch: int, prompt: int, n: int) -> Figure:
    seconds = summarise([run.stamps[n - 1] for run in runs]).median_s
    return Figure(batch * n, seconds, runs[0].prefill + runs[0].decodes)


class Sweeps:
    """The four sweeps over the script's Engine and the peers of --compare."""

    def __init__(self, exp: Experiment, engine: Any) -> None:
        self.exp, self.engine, self.args = exp, engine, exp.args
        self.ceilings = exp.ceilings
        self.peer = None
        self.tokens: dict[str, list[list[int]]] = {}  # of the last run of each engine
        self.names = ("ours", "hf") if "hf" in exp.args.compare else ("ours",)
        # Now: what was typed wrongly is refused before anything is measured.
        self.decode_lengths, self.decode_batch = self._decode_sizes()
        self.prompts, self.batch_sizes, self.contexts = self._prompts(), self._batch_sizes(), self._contexts()

    def measure(self) -> list[ResultFile]:
        """The files that have rows; a sweep that Ctrl-C ended is the last."""
        files = []
        if "hf" in self.names:
            from common.peers import HuggingFacePeer

            self.peer = HuggingFacePeer(self.exp.model)
        for sweep in (self.decode, self.prefill, self.batch, self.context):
            if not self.args.interrupted:
                files.append(sweep())
        if not any(file.rows for file in files):
            raise KeyboardInterrupt
        return [file for file in files if file.rows]

    def decode(self) -> ResultFile:
        with self._file("pipeline_decode") as file, cli.keep_partial(self.args):
            self._rows(file, self.decode_batch, self.args.input_length, self.decode_lengths, _decode_figure)
            self._compare_tokens(self.decode_batch, self.args.input_length)
        return file

    def prefill(self) -> ResultFile:
        with self._file("pipeline_prefill") as file, cli.keep_partial(self.args):
            for prompt in self.prompts:
                self._rows(file, 1, prompt, [1], _prefill_figure)
        return file

    def batch(self) -> ResultFile:
        tokens = self.args.batch_tokens
        with self._file("pipeline_batch") as file, cli.keep_partial(self.args):
            for size in self.batch_sizes:
                self._rows(file, size, tokens, [tokens], _batch_figure)
        return file

    def context(self) -> ResultFile:
        tokens = self.args.context_tokens
        with self._file("pipeline_context") as file, cli.keep_partial(self.args):
            for length in self.contexts:
                self._rows(file, 1, length - tokens, [tokens], _decode_figure)
        return file

    # --- sizes -------------------------------------------------------------------------------------------------------
    def _decode_sizes(self) -> tuple[list[int], int]:
        """Output lengths and the batch that is decoded."""
        args, prompt = self.args, self.args.input_length
        if min(args.output_lengths) < 2:
            raise UserError("--output-lengths: decoding begins at the second token; give lengths of at least 2")
        context = self.exp.model.config.max_position_embeddings
        room = context - prompt
        if room < 2:
            raise UserError(f"--input-length: {prompt} leaves no room for 2 output tokens in the context of {context}")
        what = f"what the context leaves after {prompt} prompt tokens:"
        lengths = self._clip("output_lengths", room, what)
        batch = min(args.decode_batch, self._requests_that_fit(prompt + lengths[-1] - 1))
        if batch < args.decode_batch:
            print(f"decode sweep: a batch of {batch} instead of {args.decode_batch}: the pool holds no more")
        return lengths, batch

    def _prompts(self) -> list[int]:
        pool = self.engine.pool
        limit = min(self.exp.model.config.max_position_embeddings - 1, pool.capacity * pool.page_size)
        return self._clip("seq_lens", limit, "what context and pool hold:")

    def _batch_sizes(self) -> list[int]:
        tokens = self.args.batch_tokens
        limit = min(self._requests_that_fit(2 * tokens - 1), self.engine.steps.max_requests)
        return self._clip("batch_sizes", limit, "what the pool of pages holds:")

    def _contexts(self) -> list[int]:
        pool, tokens = self.engine.pool, self.args.context_tokens
        limit = min(self.exp.model.config.max_position_embeddings, pool.capacity * pool.page_size)
        lengths = self._clip("kv_lens", limit, "what context and pool hold:")
        if min(lengths) <= tokens:
            raise UserError(f"--kv-lens: {min(lengths)} leaves no prompt before the {tokens} tokens that are decoded")
        return lengths

    def _clip(self, name: str, limit: int, what: str) -> list[int]:
        return cli.clip_option(self.args, name, limit, typed=self.exp.typed, what=what)

    def _requests_that_fit(self, tokens: int) -> int:
        return max(self.engine.pool.capacity // pages_for(tokens, self.engine.pool.page_size), 1)

    # --- running -----------------------------------------------------------------------------------------------------
    def _run(self, name: str, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        if name == "ours":
            requests = self.engine.generate_batched([InputRequest("", output_len, prompt) for prompt in prompts])
            self.tokens[name] = [r.output_token_ids for r in requests]
            stamps = [max(times) for times in zip(*(r.token_times for r in requests))]
            return Run.of(stamps, self.engine.works)
        times = StepTimes(self.exp.model.device)
        self.tokens[name] = self.peer.generate(prompts, output_len, times=times)
        stamps = [times.until(i + 1) for i in range(output_len)]
        return Run.of(stamps, equal_works(len(prompts), len(prompts[0]), output_len))

    def _repeat(self, name: str, batch: int, prompt: int, output_len: int, count: int) -> list[Run]:
        prompts = self._prompt_ids(batch, prompt)
        return [self._run(name, prompts, output_len) for _ in range(count)]

    def _prompt_ids(self, batch: int, prompt: int) -> list[list[int]]:
        return [self.exp.tokenizer.prompt_of_length(prompt, 31 * row) for row in range(batch)]

    def _compare_tokens(self, batch: int, prompt: int) -> None:
        """Say whether the peer's tokens are ours, of one batch that both have just computed. Raises CheckFailed."""
        if self.tokens.keys() == {"ours", "hf"}:
            count = min(len(rows[0]) for rows in self.tokens.values())  # one of the two may have been measured again
            theirs, ours = ([row[:count] for row in self.tokens[name]] for name in ("hf", "ours"))
            print(peer_sentence(self.exp.model, self._prompt_ids(batch, prompt), theirs, ours, "hf"))

    def _rows(
        self,
        file: ResultFile,
        batch: int,
        prompt: int,
        lengths: Sequence[int],
        figure: Callable[[Sequence[Run], int, int, int], Figure],
    ) -> None:
        """Measure one batch with each engine in turn, up to its longest output; a row for each length on the way."""
        wanted = {name: [n for n in lengths if not file.has(**self._keys(file, name, batch, prompt, n))]
                  for name in self.names}  # fmt: skip
        runs: dict[str, list[Run]] = {name: [] for name in self.names if wanted[name]}
        for name in runs:
            self._repeat(name, batch, prompt, min(max(wanted[name]), 4), self.args.warmup)
        for _ in range(self.args.repeats):
            for name in runs:
                runs[name] += self._repeat(name, batch, prompt, max(wanted[name]), 1)
        for n in lengths:
            for name in runs:
                if n in wanted[name]:
                    self._append(file, name, runs[name], batch, prompt, n, figure)

    # --- rows --------------------------------------------------------------------------------------------------------
    def _file(self, name: str) -> ResultFile:
        columns, key = (COLUMNS, KEY) if len(self.names) == 1 else ((*COLUMNS, "engine"), (*KEY, "engine"))
        steps = self.engine.steps
        facts = {"backend": steps.backend.name, "page_size": steps.page_size, "kv_pages": steps.pool.capacity}
        record = self.exp.provenance(**facts, ignore_eos=True)
        return ResultFile(self.exp.out, name, columns, record, key=key, resume=self.args.resume)

    def _keys(self, file: ResultFile, name: str, batch: int, prompt: int, n: int) -> dict[str, Any]:
        backend = self.engine.steps.backend.name if name == "ours" else "sdpa"
        keys = {"backend": backend, "batch_size": batch, "prompt_tokens": batch * prompt, "output_tokens": batch * n}
        return keys | ({"engine": name} if "engine" in file.columns else {})

    def _append(
        self,
        file: ResultFile,
        name: str,
        runs: list[Run],
        batch: int,
        prompt: int,
        n: int,
        figure: Callable[[Sequence[Run], int, int, int], Figure],
    ) -> None:
        def measured_again() -> float:
            nonlocal runs, found
            runs = self._repeat(name, batch, prompt, n, self.args.repeats)
            found = figure(runs, batch, prompt, n)
            return 1 / found.seconds

        found = figure(runs, batch, prompt, n)
        dtype, cost, model = self.exp.dtype_name, found.cost(self.exp), self.exp.model
        _, self.ceilings, suspect = roofline.gate(
            1 / found.seconds,
            measured_again,
            lambda c: 1 / cost.seconds(c, dtype),
            self.ceilings,
            model.device,
            model.dtype,
        )
        mbu, mfu = cost.shares(found.seconds, self.ceilings, dtype)
        total = summarise([run.stamps[n - 1] for run in runs])
        file.append(
            **self._keys(file, name, batch, prompt, n),
            time=total.median_s,
            tokens_per_s=found.tokens / found.seconds,
            mbu=mbu,
            mfu=mfu,
            time_p10=total.p10_s,
            time_p90=total.p90_s,
            prefill_time=summarise([run.stamps[0] for run in runs]).median_s,
            bound_tokens_per_s=found.tokens / found.bound_s(self.exp, self.ceilings),
            suspect=int(suspect),
        )


def equal_works(batch: int, prompt: int, output_len: int) -> list[Work]:
    """What a batch of equal prompts needs at least: one step for the prompts, one for each later token."""
    works = [Work(batch * prompt, 0, batch, 0, batch * prompt * (prompt + 1) // 2)]
    for step in range(1, output_len):
        works.append(Work(0, batch, batch, batch * (prompt + step), 0))
    return works


def report_suspects(exp: Experiment, files: Sequence[ResultFile]) -> None:
    """After all is written: CheckFailed on CUDA, a note on a CPU, if any row stands above its ceiling."""
    roofline.report_suspects([row for file in files for row in file.rows], exp.model.device.type)


def _size_of(row: dict[str, Any]) -> tuple[int, int, int]:
    """By what rows are put in order: --resume appends what was missing at the end of the file."""
    return row["batch_size"], row["prompt_tokens"], row["output_tokens"]


def conclusion(exp: Experiment, files: Sequence[ResultFile]) -> str:
    """What the rows say, in words."""
    every = {file.path.stem: sorted(file.rows, key=_size_of) for file in files}
    rows = {name: [r for r in part if r.get("engine", "ours") == "ours"] for name, part in every.items()}
    texts = []
    if rows.get("pipeline_decode"):
        last = rows["pipeline_decode"][-1]
        texts.append(
            f"decoding {last['batch_size']} requests together gave {cli.format_value(last['tokens_per_s'])} tokens/s, "
            f"{last['mbu']:.0%} of the memory bandwidth"
        )
        for peer in every["pipeline_decode"]:
            if peer.get("engine") == "hf" and _size_of(peer) == _size_of(last):
                texts[-1] += f", {last['tokens_per_s'] / peer['tokens_per_s']:.2f} times what Hugging Face gave"
    if rows.get("pipeline_prefill"):
        best = max(rows["pipeline_prefill"], key=lambda r: r["tokens_per_s"])
        texts.append(
            f"prefill reached {cli.format_value(best['tokens_per_s'])} tokens/s at {best['prompt_tokens']} tokens, an "
            f"MFU of {best['mfu']:.0%}, where its parts at their ceilings, one after the other, allow "
            f"{cli.format_value(best['bound_tokens_per_s'])} ({best['tokens_per_s'] / best['bound_tokens_per_s']:.0%})"
        )
    if rows.get("pipeline_batch"):
        first, last = rows["pipeline_batch"][0], rows["pipeline_batch"][-1]
        texts.append(
            f"{last['batch_size']} requests at once gave {last['tokens_per_s'] / first['tokens_per_s']:.3g} times the "
            f"tokens/s of {first['batch_size']}"
        )
    if rows.get("pipeline_context"):
        first, last = rows["pipeline_context"][0], rows["pipeline_context"][-1]
        lengths = [row["prompt_tokens"] + row["output_tokens"] for row in (first, last)]
        limits = [row["tokens_per_s"] / max(row["mbu"], row["mfu"]) for row in (first, last)]
        texts.append(
            f"with {lengths[1]} tokens of context a request decodes {cli.format_value(last['tokens_per_s'])} tokens/s, "
            f"{last['tokens_per_s'] / first['tokens_per_s']:.0%} of what it does with {lengths[0]}; by the bytes to "
            f"read it could be {limits[1] / limits[0]:.0%}"
        )
    return "; ".join(texts) + "."

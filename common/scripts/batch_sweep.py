"""Time against batch size: the measuring that uniform_prefill.py and different_prefill.py share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import cli
from common.equality import greedy_reference, peer_sentence, require_equal
from common.errors import UserError
from common.generation import StepTimes, StopRule
from common.memory import free_bytes, human_bytes
from common.results import ResultFile
from common.scripts import text_run
from common.scripts.experiment import Experiment
from common.timing import summarise

COLUMNS = (
    "batch_size",
    "time",
    "time_p10",
    "time_p90",
    "prefill_time",
    "decode_time",
    "prompt_tokens",
    "output_tokens",
    "tokens_per_s",
)
CHECKED_TOKENS = 8

Prompts = Sequence[Sequence[int]]
# generate(model, prompts, stop, times) -> output ids of each row; calls times.start(), then times.step() at every token
Generate = Callable[..., list[list[int]]]


@dataclass(frozen=True)
class BatchSweep:
    """What was measured: the file, and for each engine the ids of the last batch of this run."""

    file: ResultFile
    tokens: dict[str, list[list[int]]]

    def rows(self, engine: str = "ours") -> list[dict[str, Any]]:
        """The rows of one engine, smallest batch first: --resume appends what was missing at the end of the file."""
        rows = (row for row in self.file.rows if row.get("engine", "ours") == engine)
        return sorted(rows, key=lambda row: row["batch_size"])


def output_length(exp: Experiment) -> int:
    """The one output length of a batch script. UserError where several were typed."""
    lengths = exp.args.output_lengths
    if len(lengths) != 1:
        raise UserError(f"--output-lengths: this script takes one length, not {len(lengths)}")
    return lengths[0]


def batches_that_fit(exp: Experiment, longest_prompt: int) -> list[int]:
    """The batch sizes that free memory has room for; a typed one that it has not is a UserError."""
    exp.check_context(longest_prompt, output_length(exp), "--input-length")
    row_bytes = bytes_of_a_row(exp, longest_prompt)
    free = free_bytes(exp.model.device)
    limit = int(0.9 * free // row_bytes)
    if limit < 1:
        raise UserError(f"--input-length: one row takes {human_bytes(row_bytes)}; {human_bytes(free)} are free")
    what = f"what {human_bytes(free)} of free memory hold:"
    return cli.clip_option(exp.args, "batch_sizes", limit, typed=exp.typed, what=what)


def bytes_of_a_row(exp: Experiment, prompt_tokens: int) -> int:
    """What one more row takes at most: its K and V, a layer's activations of its prompt, its logits."""
    c = exp.model.config
    # x and what is added to it; q, k, v; gate, up and their product. Logits are copied once, to be float32.
    activations = 2 * c.hidden_size + c.q_size + 2 * c.kv_size + 3 * c.intermediate_size
    kv = (prompt_tokens + output_length(exp)) * exp.kv_bytes_per_token
    return kv + prompt_tokens * activations * exp.model.dtype.itemsize + 2 * 4 * c.vocab_size


def check_rows_alone(exp: Experiment, generate: Generate, prompts: Prompts) -> str:
    """Each row of the batch gives what its prompt gives alone by full recompute. Raises CheckFailed where not."""
    expected = [greedy_reference(exp.model, prompt, CHECKED_TOKENS) for prompt in prompts]
    got = generate(exp.model, prompts, StopRule(CHECKED_TOKENS, ignore_eos=True), StepTimes(exp.model.device))
    return require_equal(exp.model, prompts, expected, got, f"a batch of {len(prompts)} against each prompt alone")


def measure_batches(
    exp: Experiment,
    name: str,
    batches: Mapping[int, Prompts],
    generate: Generate,
    variants: Mapping[str, Generate] | None = None,
) -> BatchSweep:
    """Measure `generate`, its `variants` and the peers of --compare on every batch, in turn; a row each."""
    args, output_len = exp.args, output_length(exp)
    eos = exp.tokenizer.eos_token_ids if args.ignore_eos is False else ()
    engines = {"ours": generate} | dict(variants or {})
    if "hf" in args.compare:
        from common.peers import HuggingFacePeer

        peer = HuggingFacePeer(exp.model)
        engines["hf"] = lambda _, prompts, stop, times: peer.generate(
            prompts, stop.output_len, eos_token_ids=stop.eos_token_ids, times=times
        )
    columns = [*COLUMNS, "engine"] if len(engines) > 1 else COLUMNS
    key = ["batch_size", "engine"] if len(engines) > 1 else ["batch_size"]
    record = exp.provenance(output_len=output_len, ignore_eos=not eos)
    sweep = BatchSweep(ResultFile(exp.out, name, columns, record, key=key, resume=args.resume), {})
    with sweep.file, cli.keep_partial(args):
        for prompts in batches.values():
            _measure_batch(exp, sweep, engines, prompts, StopRule(output_len, eos, ignore_eos=not eos))
        # Said at the end: a resumed run may add larger batches, whose further prompts change no earlier row.
        sweep.file.close(prompt_lengths=[len(p) for p in batches[max(batches)]])
    if not sweep.file.rows:
        raise KeyboardInterrupt
    if args.dump_tokens:
        if "ours" not in sweep.tokens:
            raise UserError("--dump-tokens: nothing was generated, every row was there already; drop --resume")
        rows = sweep.tokens["ours"]
        prompts = batches[len(rows)]
        text_run.dump_tokens(args.dump_tokens, prompts, rows, StopRule(output_len, eos, ignore_eos=not eos))
    ours, theirs = sweep.tokens.get("ours", []), sweep.tokens.get("hf", [])
    if ours and len(ours) == len(theirs):
        print(peer_sentence(exp.model, batches[len(ours)], theirs, ours, "hf"))
    return sweep


def _measure_batch(
    exp: Experiment, sweep: BatchSweep, engines: Mapping[str, Generate], prompts: Prompts, stop: StopRule
) -> None:
    keys = {
        engine: {"batch_size": len(prompts)} | ({"engine": engine} if "engine" in sweep.file.columns else {})
        for engine in engines
    }
    todo = {engine: generate for engine, generate in engines.items() if not sweep.file.has(**keys[engine])}
    runs: dict[str, list[StepTimes]] = {engine: [] for engine in todo}
    short = StopRule(min(2, stop.output_len), ignore_eos=True)
    for generate in todo.values():
        for _ in range(exp.args.warmup):
            generate(exp.model, prompts, short, StepTimes(exp.model.device))
    for _ in range(exp.args.repeats):
        for engine, generate in todo.items():
            times = StepTimes(exp.model.device)
            sweep.tokens[engine] = generate(exp.model, prompts, stop, times)
            runs[engine].append(times)
    for engine in todo:
        outputs = sum(map(len, sweep.tokens[engine]))
        sweep.file.append(**keys[engine], **_row(runs[engine], sum(map(len, prompts)), outputs))


def _row(runs: Sequence[StepTimes], prompt_tokens: int, output_tokens: int) -> dict[str, float]:
    total = summarise([times.total_s for times in runs])
    return {
        "time": total.median_s,
        "time_p10": total.p10_s,
        "time_p90": total.p90_s,
        "prefill_time": summarise([times.prefill_s for times in runs]).median_s,
        "decode_time": summarise([times.total_s - times.prefill_s for times in runs]).median_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "tokens_per_s": output_tokens / total.median_s,
    }


def conclusion(sweep: BatchSweep) -> str:
    """What the rows say, in words: what batching bought, and each other engine at the largest batch."""
    rows = sweep.rows()
    first, last = rows[0], rows[-1]
    text = (
        f"a batch of {last['batch_size']} gave {cli.format_value(last['tokens_per_s'])} output tokens/s, "
        f"{last['tokens_per_s'] / first['tokens_per_s']:.2f} times a batch of {first['batch_size']}, "
        f"in {last['time'] / first['time']:.2f} times its wall time"
    )
    for engine in {row["engine"]: None for row in sweep.file.rows if row.get("engine", "ours") != "ours"}:
        other = next((row for row in sweep.rows(engine) if row["batch_size"] == last["batch_size"]), None)
        if other:
            text += (
                f"; {engine} took {other['time'] / last['time']:.2f} times as long there "
                f"(prefill {other['prefill_time'] / last['prefill_time']:.2f}"
            )
            text += f", decode {other['decode_time'] / last['decode_time']:.2f})" if last["decode_time"] else ")"
    return text + "."

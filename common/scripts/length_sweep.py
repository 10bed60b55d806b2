"""Time against output length: the measuring that no_kv.py and single_batch.py share. Their technique is in them.

One generation passes through all the shorter lengths on its way to the longest, so by default each repeat is a single
generation whose clock is read at every length; `separate` times each length on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import cli
from common.equality import peer_sentence
from common.errors import UserError
from common.generation import StepTimes, StopRule
from common.results import ResultFile
from common.scripts import text_run
from common.scripts.experiment import Experiment
from common.timing import summarise

# generate(model, prompt, stop, times) -> output ids; calls times.start() and then times.step() after every token
Generate = Callable[..., list[int]]


@dataclass(frozen=True)
class LengthSweep:
    """What was measured: the file's rows and, for each engine, the ids of its longest generation in this run."""

    file: ResultFile
    prompt: list[int]
    tokens: dict[str, list[int]]

    def rows(self, engine: str = "ours") -> list[dict[str, Any]]:
        """The rows of one engine, shortest first: --resume appends what was missing at the end of the file."""
        rows = (row for row in self.file.rows if row.get("engine", engine) == engine)
        return sorted(rows, key=lambda row: row["output_length"])


def lengths_that_fit(exp: Experiment) -> list[int]:
    """The output lengths that the context has room for after the prompt; a typed one that has not is refused."""
    if "output_lengths" in exp.typed:
        exp.check_context(exp.args.input_length, max(exp.args.output_lengths), "--output-lengths")
    context = exp.model.config.max_position_embeddings
    if exp.args.input_length >= context:
        raise UserError(f"--input-length {exp.args.input_length}: the model's context is {context}")
    room = context - exp.args.input_length
    what = f"what the context of {context} leaves after the prompt:"
    return cli.clip_sweep(exp.args.output_lengths, room, typed=False, what=what)


def measure_lengths(exp: Experiment, name: str, columns: Sequence[str], generate: Generate) -> LengthSweep:
    """Measure `generate` (and the peers of --compare, in turn with it) at every length; a row each.

    Ctrl-C keeps what was measured: lengths that were passed get their row from the repeats there are.
    """
    args, lengths = exp.args, lengths_that_fit(exp)
    prompt = exp.tokenizer.prompt_of_length(args.input_length)
    eos = exp.tokenizer.eos_token_ids if args.ignore_eos is False else ()
    engines = {"ours": lambda n, times: generate(exp.model, prompt, StopRule(n, eos, ignore_eos=not eos), times)}
    compare = getattr(args, "compare", ())
    if "hf" in compare:
        from common.peers import HuggingFacePeer

        peer = HuggingFacePeer(exp.model)
        engines["hf"] = lambda n, times: peer.generate([prompt], n, eos_token_ids=eos, times=times)[0]
    key = ["output_length", "engine"] if compare else ["output_length"]
    record = exp.provenance(prompt_token_ids=prompt, ignore_eos=not eos)
    all_columns = [*columns, "engine"] if compare else columns
    with ResultFile(exp.out, name, all_columns, record, key=key, resume=args.resume) as file:
        tokens: dict[str, list[int]] = {}
        with cli.keep_partial(args):
            for _ in range(args.warmup):
                for run in engines.values():
                    run(min(4, max(lengths)), StepTimes(exp.model.device))
            for group in [[n] for n in lengths] if args.separate else [lengths]:
                _measure_group(exp, file, engines, group, tokens)
        if tokens.get("ours"):
            file.close(output_token_ids=tokens["ours"])
    if not file.rows:
        if getattr(args, "interrupted", False):
            raise KeyboardInterrupt
        count = len(tokens["ours"])
        raise UserError(f"--stop-at-eos: the text ended after {count} tokens; give --output-lengths of at most {count}")
    if args.dump_tokens:
        if not tokens.get("ours"):
            raise UserError("--dump-tokens: nothing was generated, every row was there already; drop --resume")
        text_run.dump_tokens(args.dump_tokens, [prompt], [tokens["ours"]], StopRule(max(lengths), eos, not eos))
    ours, theirs = tokens.get("ours", []), tokens.get("hf", [])
    if ours and len(ours) == len(theirs):
        print(peer_sentence(exp.model, [prompt], [theirs], [ours], "hf"))
    return LengthSweep(file, prompt, tokens)


def _measure_group(
    exp: Experiment,
    file: ResultFile,
    engines: Mapping[str, Callable[[int, StepTimes], list[int]]],
    group: Sequence[int],
    tokens: dict[str, list[int]],
) -> None:
    """One set of lengths that share generations: `repeats` of them per engine, then the rows."""

    def key(engine: str, n: int) -> dict[str, Any]:
        return {"output_length": n} | ({"engine": engine} if "engine" in file.columns else {})

    wanted = {e: [n for n in group if not file.has(**key(e, n))] for e in engines}
    clocks: dict[str, list[StepTimes]] = {e: [] for e in engines if wanted[e]}
    try:
        for _ in range(exp.args.repeats):
            for engine, times_so_far in clocks.items():
                times_so_far.append(StepTimes(exp.model.device))
                ids = engines[engine](max(wanted[engine]), times_so_far[-1])
                tokens[engine] = max(ids, tokens.get(engine, []), key=len)
    finally:
        for n in group:
            for engine, runs in clocks.items():
                samples = [times.until(n) for times in runs if times.num_steps >= n]
                if n in wanted[engine] and samples:
                    timing = summarise(samples)
                    row = {"time": timing.median_s, "time_p10": timing.p10_s, "time_p90": timing.p90_s}
                    row["tokens_per_s"] = n / timing.median_s
                    if "prefill_time" in file.columns:
                        row["prefill_time"] = summarise([times.prefill_s for times in runs if times.num_steps]).median_s
                    file.append(**row, **key(engine, n))

"""Answering prompts that the user typed: the boring half of every script that generates text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from common import cli
from common.errors import UserError
from common.generation import StepTimes, StopRule
from common.results import write_atomic
from common.scripts.experiment import Experiment
from common.serving import Request

# run(prompts, stop, times) -> output ids of each prompt
Run = Callable[[list[list[int]], StopRule, StepTimes], list[list[int]]]


def answer(exp: Experiment, prompts: Sequence[str], output_len: int, run: Run) -> None:
    """Print what the model answers to each prompt, stopping at EOS unless --ignore-eos, and how fast it came."""
    args, tokenizer = exp.args, exp.tokenizer
    ids = [tokenizer.encode(text) if args.raw else tokenizer.chat(text) for text in prompts]
    if "output_lengths" not in exp.typed:  # a preset's length gives way to a long prompt
        room = exp.model.config.max_position_embeddings - max(map(len, ids))
        output_len = max(1, min(output_len, room))
    for text, prompt in zip(prompts, ids):
        if not prompt:
            raise UserError(f"--prompt {text!r}: no tokens; give some text")
        exp.check_context(len(prompt), output_len, f"prompt {shown(text)}")
    stop = StopRule(output_len, tokenizer.eos_token_ids, ignore_eos=bool(args.ignore_eos))
    start = time.perf_counter()
    # May be several generations: the clock is read around them all.
    outputs = run(ids, stop, StepTimes(exp.model.device))
    elapsed = time.perf_counter() - start
    for text, output in zip(prompts, outputs):
        print(f"\n> {shown(text)}\n{tokenizer.decode(output).strip()}")
    count = sum(map(len, outputs))
    print(f"\n{count} tokens in {elapsed:.2f} s: {count / elapsed:.1f} tokens/s, reading the prompts included")
    if args.dump_tokens:
        dump_tokens(args.dump_tokens, ids, outputs, stop)


def dump_tokens(path: str, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], stop: StopRule) -> None:
    """Write one JSON line a request: request, prompt_token_ids, output_token_ids, finish_reason."""
    reasons = [stop.finish_reason(output) for output in outputs]
    _write_lines(path, zip(range(len(prompts)), prompts, outputs, reasons))


def dump_requests(path: str, requests: Sequence[Request]) -> None:
    """The same for requests that an engine has served."""
    _write_lines(path, ((r.request_id, r.prompt_token_ids, r.output_token_ids, r.finish_reason) for r in requests))


def _write_lines(path: str, rows: Iterable[tuple[int, Sequence[int], Sequence[int], str | None]]) -> None:
    names = ("request", "prompt_token_ids", "output_token_ids", "finish_reason")
    lines = []
    for number, prompt, output, reason in rows:
        lines.append(json.dumps(dict(zip(names, (number, list(prompt), list(output), reason)))) + "\n")
    try:
        write_atomic(Path(path), "".join(lines).encode())
    except OSError as error:
        raise UserError(f"--dump-tokens {path}: {error.strerror}; give a file in a folder you can write") from None
    cli.print_written(path)


def shown(text: str) -> str:
    """A prompt as one line of at most 100 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "..."

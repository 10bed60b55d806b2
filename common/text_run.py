"""Answering prompts that the user typed: the boring half of every script that generates text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common import cli
from common.errors import UserError
from common.experiment import Experiment
from common.generation import StepTimes, StopRule
from common.results import write_atomic

# run(prompts, stop, times) -> output ids of each prompt
Run = Callable[[list[list[int]], StopRule, StepTimes], list[list[int]]]


def answer(exp: Experiment, prompts: Sequence[str], output_len: int, run: Run) -> None:
    """Print what the model answers to each prompt, stopping at EOS unless --ignore-eos, and how fast it came."""
    args, tokenizer = exp.args, exp.tokenizer
    ids = [tokenizer.encode(text) if args.raw else tokenizer.chat(text) for text in prompts]
    for text, prompt in zip(prompts, ids):
        if not prompt:
            raise UserError(f"--prompt {text!r}: no tokens; give some text")
        exp.check_context(len(prompt), output_len, f"prompt {_shown(text)}")
    stop = StopRule(output_len, tokenizer.eos_token_ids, ignore_eos=bool(args.ignore_eos))
    start = time.perf_counter()
    outputs = run(
        ids, stop, StepTimes(exp.model.device)
    )  # may be several generations: the clock is read around them all
    elapsed = time.perf_counter() - start
    for text, output in zip(prompts, outputs):
        print(f"\n> {_shown(text)}\n{tokenizer.decode(output).strip()}")
    count = sum(map(len, outputs))
    print(f"\n{count} tokens in {elapsed:.2f} s: {count / elapsed:.1f} tokens/s, reading the prompts included")
    if args.dump_tokens:
        dump_tokens(args.dump_tokens, ids, outputs, stop)


def dump_tokens(path: str, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], stop: StopRule) -> None:
    """Write one JSON line a request: request, prompt_token_ids, output_token_ids, finish_reason."""
    lines = [
        json.dumps(
            {
                "request": i,
                "prompt_token_ids": list(prompt),
                "output_token_ids": list(output),
                "finish_reason": stop.finish_reason(output),
            }
        )
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]
    try:
        write_atomic(Path(path), "".join(line + "\n" for line in lines).encode())
    except OSError as error:
        raise UserError(f"--dump-tokens {path}: {error.strerror}; give a file in a folder you can write") from None
    cli.print_written(path)


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "..."

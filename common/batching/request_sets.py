"""Request sets: one fixed list of requests that every policy gets, by name or from a file. No torch.

    handout     100 short prompts, U[1, 10] tokens in, U[1, 128] out
    lognormal   100 long-tailed prompts, lognormal(6.0, 0.7) in, U[1, 512] out
    mix         256 prompts of U[100, 1024], U[100, 1024] out: the load that engines are compared on
    uniform     32 prompts of U[16, 128], U[16, 128] out: a small mix, for a CPU
    FILE.jsonl  JSON lines as vLLM's custom dataset has them: {"prompt": "...", "output_tokens": 64}
    FILE.csv    an Azure LLM inference trace: TIMESTAMP, ContextTokens, GeneratedTokens

Lengths and ids come from a seed, so two students, and two engines, get the same requests.
"""

import csv
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from common.errors import UserError
from common.serving import InputRequest

NAMES = ("handout", "lognormal", "mix", "uniform")
HELP = "handout, lognormal, mix, uniform, a .jsonl file (prompt, output_tokens) or an Azure LLM trace (.csv)"
MIX_REQUESTS = 256
USED_VOCAB = 10_001  # ids 0 .. 10000, as in `mix`: in every vocabulary that the lab knows
MAX_TOKENS = 10_000_000  # of a line of a trace: past any context, and still drawn in seconds
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def sample_lognormal_ints(
    count: int, mean: float = 6.0, sigma: float = 0.7, *, low: int = 1, high: int | None = None, seed: int = 0
) -> list[int]:
    """`count` whole numbers whose logarithm is normal(mean, sigma), at least `low`, at most `high` (if given)."""
    draw = random.Random(seed)
    values = (max(low, round(draw.lognormvariate(mean, sigma))) for _ in range(count))
    return [v if high is None else min(v, high) for v in values]


def random_prompt(draw: random.Random, length: int, vocab_size: int) -> list[int]:
    top = min(USED_VOCAB, vocab_size)
    return [draw.randrange(top) for _ in range(length)]


def handout(
    count: int = 100, *, vocab_size: int = USED_VOCAB, seed: int = 0, max_output: int = 128
) -> list[InputRequest]:
    """The set of continuous batching: input lengths U[1, 10], output lengths U[1, 128] (or up to `max_output`)."""
    draw = random.Random(seed)
    return [
        InputRequest(
            prompt_token_ids=random_prompt(draw, draw.randint(1, 10), vocab_size),
            output_len=draw.randint(1, max_output),
        )
        for _ in range(count)
    ]


def lognormal(
    count: int = 100, *, vocab_size: int = USED_VOCAB, seed: int = 0, mean: float = 6.0, max_output: int = 512
) -> list[InputRequest]:
    """The set of chunked prefill: input lengths lognormal(`mean`, 0.7), output lengths U[1, `max_output`]."""
    draw = random.Random(seed)
    return [
        InputRequest(prompt_token_ids=random_prompt(draw, length, vocab_size), output_len=draw.randint(1, max_output))
        for length in sample_lognormal_ints(count, mean, 0.7, seed=seed)
    ]


def mix() -> list[InputRequest]:
    """142,827 prompt and 133,966 output tokens: exactly these ids in every engine, whatever the seed of the run."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, 10_000) for _ in range(draw.randint(100, 1024))] for _ in range(MIX_REQUESTS)]
    output_lens = [draw.randint(100, 1024) for _ in range(MIX_REQUESTS)]
    return [InputRequest(prompt_token_ids=p, output_len=n) for p, n in zip(prompts, output_lens)]


def uniform(count: int = 32, *, vocab_size: int = USED_VOCAB, seed: int = 0) -> list[InputRequest]:
    """A set that a CPU serves in seconds: U[16, 128] tokens in and out."""
    draw = random.Random(seed)
    return [
        InputRequest(
            prompt_token_ids=random_prompt(draw, draw.randint(16, 128), vocab_size), output_len=draw.randint(16, 128)
        )
        for _ in range(count)
    ]


def poisson_arrivals(requests: Sequence[InputRequest], rate: float, *, seed: int = 0) -> None:
    """Set the arrival times of a Poisson process of `rate` requests a second, in the order of `requests`."""
    if not rate > 0:
        raise UserError(f"--rate must be above 0 requests per second, not {rate}")
    draw = random.Random(seed)
    time = 0.0
    for request in requests:
        time += draw.expovariate(rate)
        request.arrival_time = time


def check_source(source: str) -> None:
    """UserError for a source that is neither a set nor a file: asked before a model is loaded for it."""
    if source not in NAMES and not Path(source).is_file():
        raise UserError(f"--requests {source}: neither a file nor one of {', '.join(NAMES)}")


def check_file(source: str, *, count: int | None = None) -> None:
    """UserError for a file that `load` would refuse, without drawing a trace's ids: of a long one that takes long."""
    path = Path(source)
    rows = _azure_rows(path, count=count) if path.suffix == ".csv" else read_jsonl(path, count=count)
    _refuse_empty(source, list(rows))


def _refuse_empty(source: str, requests: Sequence) -> None:
    if not requests:
        raise UserError(f"--requests {source}: no requests in it")


def load(
    source: str, *, count: int | None = None, vocab_size: int = USED_VOCAB, seed: int = 0, **shape: float
) -> list[InputRequest]:
    """The set called `source` (one of NAMES) or in the file `source`; `count` takes that many (of a file, the first).

    `shape`: arguments of `handout` or `lognormal` that make a smaller set. Raises UserError for an unknown name, an
    empty set, and a malformed line (with its number).
    """
    if count is not None and count < 1:
        raise UserError(f"--num-requests must be at least 1, not {count}")
    if source == "handout":
        return handout(count or 100, vocab_size=vocab_size, seed=seed, **shape)
    if source == "lognormal":
        return lognormal(count or 100, vocab_size=vocab_size, seed=seed, **shape)
    if source == "uniform":
        return uniform(count or 32, vocab_size=vocab_size, seed=seed)
    if source == "mix":
        if vocab_size < USED_VOCAB:
            raise UserError(f"--requests mix has ids up to 10000, the vocabulary has {vocab_size}: take another set")
        return mix()[:count]
    path = Path(source)
    check_source(source)
    if path.suffix == ".csv":
        requests = read_azure_csv(path, vocab_size=vocab_size, seed=seed, count=count)
    else:
        requests = read_jsonl(path, count=count)
    _refuse_empty(source, requests)
    return requests


def read_jsonl(path: Path, *, count: int | None = None) -> list[InputRequest]:
    """vLLM's custom dataset: one JSON object a line with `prompt` and, if wanted, `output_tokens` (else 128)."""
    requests: list[InputRequest] = []
    for number, line in enumerate(_lines(path), 1):
        if len(requests) == count:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)})") from None
        except RecursionError:
            raise UserError(f"{path}, line {number}: brackets too deep to read") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f'{path}, line {number}: want an object with "prompt", a text that is not empty')
        output_len = row.get("output_tokens", 128)
        if type(output_len) is not int or output_len < 1:
            raise UserError(f'{path}, line {number}: "output_tokens" must be a whole number from 1, not {output_len!r}')
        requests.append(InputRequest(input_str=prompt, output_len=output_len))
    return requests


def read_azure_csv(
    path: Path, *, vocab_size: int = USED_VOCAB, seed: int = 0, count: int | None = None
) -> list[InputRequest]:
    """An Azure LLM inference trace. It has lengths and times only, so the ids are random; times start at the first row.

    Source of the form: Azure/AzurePublicDataset, AzureLLMInferenceDataset2023 and 2024.
    """
    draw = random.Random(seed)
    return [
        InputRequest(
            prompt_token_ids=random_prompt(draw, prompt_len, vocab_size), output_len=output_len, arrival_time=time
        )
        for time, prompt_len, output_len in _azure_rows(path, count=count)
    ]


def _azure_rows(path: Path, *, count: int | None) -> Iterator[tuple[float, int, int]]:
    """(seconds after the first row, prompt tokens, output tokens) of each line, or of the first `count`."""
    rows = csv.DictReader(_lines(path))
    missing = [name for name in AZURE_COLUMNS if name not in (rows.fieldnames or [])]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; an Azure trace has {', '.join(AZURE_COLUMNS)}")
    first: float | None = None
    for row in itertools.islice(rows, count):
        try:
            time = _timestamp_s(row["TIMESTAMP"])
            prompt_len, output_len = (_num_tokens(name, row[name]) for name in AZURE_COLUMNS[1:])
            first = time if first is None else first
            if time < first:
                raise ValueError("earlier than the first row")
        except ValueError as error:
            raise UserError(f"{path}, line {rows.line_num}: {error}") from None
        yield time - first, prompt_len, output_len


def _num_tokens(name: str, text: str | None) -> int:
    if text is None or not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{name} must be a whole number from 1, not {text!r}")
    if int(text) > MAX_TOKENS:
        raise ValueError(f"{name} {text.strip()} is above {MAX_TOKENS:,}, which no context holds")
    return int(text)


def _timestamp_s(text: str) -> float:
    """Seconds of "2023-11-16 18:15:46.6805900" (seven digits, perhaps a zone), which datetime cannot read alone."""
    whole, _, rest = text.strip().partition(".")
    fraction = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    try:
        seconds = (datetime.fromisoformat(whole[:19]) - datetime(1970, 1, 1)).total_seconds()
    except (ValueError, TypeError):  # TypeError: a short date takes the zone along
        raise ValueError(f"TIMESTAMP must be like 2023-11-16 18:15:46.68, not {text!r}") from None
    return seconds + (float("0." + fraction) if fraction else 0.0)


def _lines(path: Path):
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None

"""A request's life, and the engine that a scheduler drives, as far as neither holds a tensor.

A scheduler decides; an engine computes. Between them go `Chunk`s: pieces of requests, any mixture of which the engine
packs in one forward pass (a step). The scheduler launches step k + 1 before it reads the tokens of step k, so the
device never waits for Python; therefore a request knows three counts of tokens:

    num_computed   K/V written by steps that were launched (read or not)
    num_sampled    output tokens sampled by steps that were launched (read or not)
    len(tokens)    prompt and output tokens that the host has read

Nothing here imports torch: the same schedulers drive the real engine (`common.engine`), the `InstantEngine` below,
which computes nothing and is for tests, and the simulated one (`common.simulate`), which computes times.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from common.errors import UserError
from common.pages import DistKVCache, OutOfPages, PageAllocator
from common.sampling import GREEDY, SamplingParams


@dataclass
class InputRequest:
    """What a user asks for. `prompt_token_ids` wins over `input_str`; `arrival_time` is in seconds after the start."""

    input_str: str = ""
    output_len: int = 128
    prompt_token_ids: Sequence[int] | None = None
    arrival_time: float = 0.0
    ignore_eos: bool = True
    stop: Sequence[str] = ()
    sampling: SamplingParams = GREEDY

    def __post_init__(self):
        if self.output_len < 1:
            raise UserError(f"output_len must be at least 1, not {self.output_len}")
        if self.arrival_time < 0:
            raise UserError(f"arrival_time must not be negative, not {self.arrival_time}")


class Request:
    """An InputRequest on its way: its tokens, how many are computed, its pages, its times, and why it ended.

    `eos_token_ids` end it unless the input says `ignore_eos`. `detokenize(ids) -> str` is needed for stop strings only.
    `finish_reason`: None while it runs, then "length", "stop" (EOS or a stop string) or "refused" (why: `refusal`).
    Times are seconds on the engine's clock, counted from the start of the run, as `arrival_time` is.
    """

    def __init__(
        self,
        given: InputRequest,
        request_id: int = 0,
        *,
        prompt_token_ids: Sequence[int] | None = None,
        eos_token_ids: Collection[int] = (),
        detokenize: Callable[[list[int]], str] | None = None,
    ):
        prompt = given.prompt_token_ids if prompt_token_ids is None else prompt_token_ids
        if prompt is None or len(prompt) == 0:
            raise UserError(f"request {request_id} has no prompt tokens")
        if given.stop and detokenize is None:
            raise UserError(f"request {request_id} has stop strings, which need a tokenizer to be found")
        self.given = given
        self.request_id = request_id
        self.num_prompt_tokens = len(prompt)
        self.output_len = given.output_len
        self.arrival_time = given.arrival_time
        self.sampling = given.sampling
        self.eos_token_ids = frozenset() if given.ignore_eos else frozenset(eos_token_ids)
        self.detokenize = detokenize
        self.tokens: list[int] = list(prompt)
        self.num_computed = 0
        self.num_sampled = 0
        self.num_prefill = len(prompt)  # tokens to compute before the next is sampled; more after a preemption
        self.pages: DistKVCache | None = None  # set by the engine
        self.token_times: list[float] = []
        self.finish_reason: str | None = None
        self.refusal = ""
        self.preemptions = 0

    def __repr__(self) -> str:
        out = f"{self.num_output_tokens}/{self.output_len}"
        return f"Request({self.request_id}, {self.num_prompt_tokens} in, {out} out)"

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.tokens[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_unread(self) -> int:
        """Tokens that launched steps sample and that the host has not read yet."""
        return self.num_sampled - (len(self.tokens) - self.num_prompt_tokens)

    @property
    def max_tokens(self) -> int:
        """Tokens whose K/V it holds at its longest: the last output token is never computed."""
        return self.num_prompt_tokens + self.output_len - 1

    @property
    def wants_more(self) -> bool:
        """Whether there is anything to launch: not ended, and its last token is not on its way already."""
        return self.finish_reason is None and self.num_sampled < self.output_len

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.num_prefill

    @property
    def decodes_next(self) -> bool:
        """`wants_more`, and all its known tokens are computed."""
        return (
            self.num_computed >= self.num_prefill and self.num_sampled < self.output_len and self.finish_reason is None
        )

    def launched(self, length: int) -> None:
        """Note that a step computing the next `length` tokens was launched."""
        self.num_computed += length
        if self.num_computed >= self.num_prefill:
            self.num_sampled += 1

    def read(self, token: int, time: float) -> bool:
        """Take a token that a step has given, at `time`; whether the request ends by it. One that was computed past the
        end is dropped."""
        if self.finish_reason is not None:
            self.num_sampled -= 1
            return False
        self.tokens.append(token)
        self.token_times.append(time)
        if token in self.eos_token_ids or self.given.stop and self._ends_with_stop():
            self.finish_reason = "stop"
        elif len(self.token_times) >= self.output_len:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def _ends_with_stop(self) -> bool:
        # A character is at most four byte tokens, so this tail holds any stop string that the newest token completes.
        tail = 4 * max(map(len, self.given.stop)) + 4
        text = self.detokenize(self.tokens[max(self.num_prompt_tokens, len(self.tokens) - tail) :])
        return any(stop in text for stop in self.given.stop)

    def preempt(self) -> None:
        """Forget what was computed (not what was read). Only when no launched step computes it."""
        self.preemptions += 1
        self.num_computed = 0
        self.num_prefill = len(self.tokens)

    def refuse(self, why: str) -> None:
        self.finish_reason = "refused"
        self.refusal = why


class Chunk(NamedTuple):
    """Tokens start .. start + length - 1 of a request: a piece of its prompt, or a decode (the one next token).

    The token of a decode may be one that the step in flight samples: `start >= len(request.tokens)` then, and the
    engine takes it from where that step leaves it on the device (also when it was computed past the request's end).
    """

    request: Request
    start: int
    length: int

    @property
    def is_decode(self) -> bool:
        return self.start >= self.request.num_prefill

    @property
    def samples(self) -> bool:
        """Whether the step gives the request's next token: all tokens before it are computed then."""
        return self.start + self.length >= self.request.num_prefill


@dataclass(slots=True)
class Work:
    """What a step computes, as far as its time depends on it."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    sampled_tokens: int = 0
    context_tokens: int = 0  # K/V tokens that the decodes read
    attended_pairs: int = 0  # query-key pairs of the prompt pieces

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> "Work":
        prefill = decodes = sampled = context = pairs = 0
        for request, start, length in chunks:  # `Chunk.is_decode` and `samples`, written out: this runs for every token
            prompt = request.num_prefill
            if start >= prompt:
                decodes += 1
                context += start + 1
            else:
                prefill += length
                pairs += length * start + length * (length + 1) // 2
                sampled += start + length >= prompt
        return cls(prefill, decodes, decodes + sampled, context, pairs)

    @property
    def kind(self) -> str:
        if self.prefill_tokens and self.decode_tokens:
            return "mixed"
        return "prefill" if self.prefill_tokens else "decode"


class Step(Protocol):
    """A launched step."""

    def tokens(self) -> dict[Request, int]:
        """Wait for the step (also when it samples nothing); the next token of each request whose chunk `samples`."""


class StepEngine(Protocol):
    """What a scheduler needs to know of an engine.

    Requests that end leave one step later than their successors enter, so an engine holds up to twice as many requests
    as are computed in a step.
    """

    page_size: int
    max_context: int  # tokens that one request may have
    is_asynchronous: bool  # whether `launch` returns before the step is computed

    @property
    def num_free_pages(self) -> int: ...

    def now(self) -> float:
        """Seconds on a clock that never goes back."""

    def wait_until(self, time: float) -> None:
        """Sleep until now() is `time`: nothing is running and the next request has not arrived yet."""

    def launch(self, chunks: Sequence[Chunk]) -> Step:
        """Enqueue forward and sampling, and return at once. Decodes come first in `chunks`, then pieces of prompts.

        Takes the pages by `reserve_pages` first, so OutOfPages leaves everything as it was.
        """

    def release(self, request: Request) -> None:
        """Give the request's pages back; only when no launched step can touch them. Without pages it does nothing."""


def reserve_pages(pool: PageAllocator, chunks: Sequence[Chunk]) -> list[Request]:
    """Pages for all tokens of a step, or OutOfPages and nothing changed; then note the tokens as launched. Returns the
    requests that have new pages.

    This is the first thing that an engine's `launch` does.
    """
    needed = 0
    growing = []
    for request, start, length in chunks:
        pages = request.pages
        if pages is None:
            pages = request.pages = DistKVCache(pool)
        if start != request.num_computed or pages.seqlen != start:
            raise ValueError(f"chunk at {start} of {request}, of which {request.num_computed} tokens are computed")
        if length > pages.room:
            needed += pages.pages_needed(length)
            growing.append(request)
    if needed > pool.num_free_pages:
        raise OutOfPages(needed, pool.num_free_pages, pool.capacity)
    for request, _, length in chunks:
        request.pages.allocate_tokens(length)
        request.launched(length)
    return growing


def release_pages(request: Request) -> None:
    """The other end: what an engine's `release` does."""
    if request.pages is not None:
        request.pages.release()
        request.pages = None


class InstantStep:
    """A step of an engine with a clock of its own: reading it moves the clock to the step's end."""

    __slots__ = ("engine", "end_s", "_tokens")

    def __init__(self, engine: "InstantEngine", end_s: float, tokens: dict[Request, int]):
        self.engine = engine
        self.end_s = end_s
        self._tokens = tokens

    def tokens(self) -> dict[Request, int]:
        self.engine.wait_until(self.end_s)
        return self._tokens


class InstantEngine:
    """Pages and tokens as in a real engine, no model, and a clock that moves `step_s` a step.

    The next token is a hash of the one before it and of its position, so a request has the same tokens whenever and
    with whomever it runs, and a wrong or repeated token is seen. Steps run one after the other, as on one CUDA stream.
    """

    def __init__(
        self, num_pages: int, page_size: int = 16, *, step_s: float = 1.0, max_context: int = 1 << 30, vocab=50_000
    ):
        self.pool = PageAllocator(num_pages, page_size)
        self.page_size = page_size
        self.max_context = max_context
        self.is_asynchronous = True
        self.step_s = step_s
        self.vocab = vocab
        self._now_s = 0.0
        self._device_free_s = 0.0
        self._last_token: dict[Request, int] = {}  # what a real engine keeps on the device

    @property
    def num_free_pages(self) -> int:
        return self.pool.num_free_pages

    def now(self) -> float:
        return self._now_s

    def wait_until(self, time: float) -> None:
        self._now_s = max(self._now_s, time)

    def step_time_s(self, chunks: Sequence[Chunk]) -> float:
        return self.step_s

    def launch(self, chunks: Sequence[Chunk]) -> InstantStep:
        reserve_pages(self.pool, chunks)
        tokens = {}
        last_token = self._last_token
        for request, start, length in chunks:
            position = start + length
            if position >= request.num_prefill:
                before = last_token[request] if start >= request.num_prefill else request.tokens[position - 1]
                tokens[request] = last_token[request] = (before * 48271 + position * 40692 + 11) % self.vocab
        self._device_free_s = max(self._now_s, self._device_free_s) + self.step_time_s(chunks)
        return InstantStep(self, self._device_free_s, tokens)

    def release(self, request: Request) -> None:
        self._last_token.pop(request, None)
        release_pages(request)

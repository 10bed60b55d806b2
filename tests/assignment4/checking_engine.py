"""An engine without a model that finds what a scheduler does wrong: the oracle of the scheduler tests.

Unlike the InstantEngine it has a "K/V memory": a step writes its tokens into its pages and computes the next token from
what it reads back through them. A page shared by two requests, given back too early or never written gives other
tokens. Released pages are poisoned only once no launched step is unread: a page that comes back earlier is an error.
"""

from common.serving import Chunk, InstantEngine, InstantStep, Request, release_pages, reserve_pages

VOCAB = 997


def next_token(tokens: list[int]) -> int:
    """Depends on every token and on its position."""
    value = 17
    for position, token in enumerate(tokens):
        value = (value * 31 + token + 7 * position) % 1_000_003
    return value % VOCAB


def tokens_alone(prompt: list[int], output_len: int, eos: frozenset = frozenset()) -> list[int]:
    """What a request must give, whoever runs beside it."""
    tokens = list(prompt)
    for _ in range(output_len):
        tokens.append(next_token(tokens))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


class CheckingEngine(InstantEngine):
    def __init__(
        self, num_pages: int, page_size: int, *, max_tokens: int | None = None, max_requests: int | None = None
    ):
        super().__init__(num_pages, page_size)
        self.memory: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self.max_tokens = max_tokens
        self.max_requests = max_requests
        self.owner: dict[int, Request] = {}
        self.sampled_position: dict[Request, int] = {}
        self.unread: list[CheckingStep] = []
        self.launched_chunks: list[list[Chunk]] = []

    def launch(self, chunks):
        assert chunks, "an empty step"
        assert len(self.unread) <= 1, "more than one step in flight beyond the one being read"
        requests = [c.request for c in chunks]
        assert len(set(requests)) == len(requests), "a request twice in one step"
        decodes = [c.is_decode for c in chunks]
        assert decodes == sorted(decodes, reverse=True), "decodes come first"
        assert all(c.length >= 1 for c in chunks) and all(c.length == 1 for c in chunks if c.is_decode)
        if self.max_tokens is not None:
            assert sum(c.length for c in chunks) <= self.max_tokens, "over the token budget"
        if self.max_requests is not None:
            assert len(chunks) <= self.max_requests, "over the batch size"
        reserve_pages(self.pool, chunks)
        tokens = {}
        for chunk in chunks:
            request, start, length = chunk
            for page in request.pages.indices:
                assert self.owner.setdefault(page, request) is request, f"page {page} has two owners"
            for position in range(start, start + length):
                self.write(request, position, self.input_token(request, position))
            if chunk.samples:
                tokens[request] = self._last_token[request] = next_token(self.read(request, start + length))
                self.sampled_position[request] = start + length
        self.launched_chunks.append(list(chunks))
        self._device_free_s = max(self._now_s, self._device_free_s) + self.step_s
        step = CheckingStep(self, self._device_free_s, tokens)
        step.requests = set(requests)
        self.unread.append(step)
        return step

    def input_token(self, request, position):
        if position < len(request.tokens):
            return request.tokens[position]
        assert self.sampled_position[request] == position, "a token that nobody has sampled"
        return self._last_token[request]

    def write(self, request, position, token):
        self.memory[request.pages.indices[position // self.page_size]][position % self.page_size] = token

    def read(self, request, length):
        return [self.memory[request.pages.indices[p // self.page_size]][p % self.page_size] for p in range(length)]

    def release(self, request):
        for step in self.unread:
            assert request not in step.requests, f"{request} released under a launched step"
        if request.pages:
            for page in request.pages.indices:
                del self.owner[page]
                self.memory[page] = [None] * self.page_size  # next_token() of a None fails
        self._last_token.pop(request, None)
        release_pages(request)

    def assert_all_pages_free(self):
        assert self.num_free_pages == self.pool.capacity and not self.owner


class CheckingStep(InstantStep):
    __slots__ = ("requests",)

    def tokens(self):
        assert self.engine.unread[0] is self, "steps are read in the order of their launches"
        self.engine.unread.pop(0)
        return super().tokens()

"""Which tokens does the next step compute? Chunked prefill: the decodes first, then pieces of prompts up to a budget.

With whole-prompt prefills (continous_scheduler.py) a step takes as long as the prompts that enter in it, and everybody
who is decoding waits: a gap between tokens. Here every step computes at most `token_batch_size` tokens, so the budget
is a bound on the gap, paid for by prompts that take several steps (and then wait longer for their first token).

Order: running requests decode (one token each); then the one prompt that is part done; then waiting ones, oldest first,
until the budget is spent. A request enters only if something of its prompt is computed at once, and the one before it
is complete then: so at most one prompt is part done, and there are never more decodes than the budget.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assignment4.Section1.chunked_engine import decode_chunks, next_piece
from assignment4.Section1.continous_scheduler import at_least_one
from common.batching.step_loop import StepLoop
from common.pages import pages_for
from common.serving import Chunk, StepEngine


class Scheduler(StepLoop):
    """`token_batch_size`: tokens a step computes at most. `req_batch_size`: requests that run at once at most."""

    policy = "chunked"

    def __init__(self, engine: StepEngine, token_batch_size: int, req_batch_size: int | None = None, **options):
        super().__init__(engine, **options)
        self.token_batch_size = at_least_one("token_batch_size", token_batch_size)
        self.req_batch_size = at_least_one("req_batch_size", req_batch_size or token_batch_size)

    def schedule(self) -> list[Chunk]:
        decoding, free_pages = self.decoding_requests()
        chunks = decode_chunks(decoding)
        page_size = self.engine.page_size
        budget = self.token_batch_size - len(chunks)

        part_done = [r for r in self.running if r.is_prefilling]
        while budget > 0:
            if part_done:
                request = part_done.pop()
            elif self.waiting and len(chunks) < self.req_batch_size and self.fits(free_pages):
                request = self.enter()
            else:
                break
            piece = next_piece(request, budget, free_pages, page_size)
            if piece is None:
                break  # its pages went to older requests: it goes on when they end
            chunks.append(piece)
            budget -= piece.length
            free_pages -= request_pages(piece, page_size)
        return chunks

    def fits(self, free_pages: int) -> bool:
        """Whether the oldest waiting request's whole prompt has pages, though only a piece may be computed now: one
        that enters with less would be the first to be preempted."""
        return pages_for(self.waiting[0].num_prefill, self.engine.page_size) <= free_pages


def request_pages(piece: Chunk, page_size: int) -> int:
    """New pages that a piece takes."""
    return pages_for(piece.start + piece.length, page_size) - pages_for(piece.start, page_size)

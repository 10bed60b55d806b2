"""From a chunked prefill decision to what the engine computes: decodes, and prompts cut into pieces.

A step computes at most `token_budget` tokens. The decodes take one each; what is left goes to prompts in order, and the
last of them may get only a piece: the next step goes on where it ends. So no step is much longer than another, and a
long prompt no longer stops the running requests (Agrawal et al. 2024, "Taming Throughput-Latency Tradeoff in LLM
Inference with Sarathi-Serve").
"""

from collections.abc import Sequence

from common.serving import Chunk, Request


def decode_chunks(decoding: Sequence[Request]) -> list[Chunk]:
    return [Chunk(r, r.num_computed, 1) for r in decoding]


def next_piece(request: Request, token_budget: int, free_pages: int, page_size: int) -> Chunk | None:
    """The longest next piece of a prompt that the budget and the pages allow; None when not one token is allowed."""
    room = -request.num_computed % page_size + free_pages * page_size  # the rest of its last page, then new ones
    length = min(request.num_prefill - request.num_computed, token_budget, room)
    return Chunk(request, request.num_computed, length) if length > 0 else None

"""From a continuous batching decision to what the engine computes: whole prompts and decodes.

A request that enters brings its whole prompt into the step (all its known tokens when it is recomputed after a
preemption), so a long prompt makes a long step, and every running request waits for it: see chunked_engine.py.
"""

from collections.abc import Sequence

from common.serving import Chunk, Request


def leading_prompts(requests: Sequence[Request], max_tokens: int) -> list[Request]:
    """As many of the requests, in order, as have prompts of `max_tokens` together; the first whatever its length."""
    taken: list[Request] = []
    for request in requests:
        max_tokens -= request.num_prefill
        if max_tokens < 0 and taken:
            break
        taken.append(request)
    return taken


def whole_prompts(decoding: Sequence[Request], entering: Sequence[Request]) -> list[Chunk]:
    """One token of each decoding request, then all tokens of each entering one."""
    chunks = [Chunk(r, r.num_computed, 1) for r in decoding]
    chunks += [Chunk(r, 0, r.num_prefill) for r in entering]
    return chunks

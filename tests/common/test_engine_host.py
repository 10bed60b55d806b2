"""What a step costs the host: calls, which can be counted, and not time, which cannot be trusted.

The model and its attend are taken out, as on a GPU, where they are launches: what is left is bookkeeping and arrays.
"""

import cProfile
import pstats
from types import SimpleNamespace

import pytest
import torch

import common.engine
from common.engine import Engine
from common.serving import Chunk, InputRequest, Request


@pytest.fixture
def engine(tiny, monkeypatch):
    model = tiny[0]
    monkeypatch.setattr(common.engine, "make_attend", lambda *arguments: None)
    fake = SimpleNamespace(
        config=model.config.with_context(8192),
        device=model.device,
        dtype=model.dtype,
        forward=lambda tokens, attend, rows: torch.zeros(len(rows), 1),
        greedy=lambda hidden: torch.zeros(len(hidden), dtype=torch.int64),
    )
    return Engine(fake, num_pages=20_000, max_requests=400)


def calls(engine, decodes, context, piece):
    """Calls of any function, Python's or C's, in one launch of `decodes` decodes and a prompt piece of `piece` tokens.

    Nobody's decode opens a page: that is counted apart.
    """
    requests = [Request(InputRequest(prompt_token_ids=[5] * context, output_len=9), i) for i in range(decodes)]
    last = Request(InputRequest(prompt_token_ids=[6] * 8000, output_len=9), decodes)
    engine.launch([Chunk(r, 0, context) for r in requests])
    engine.launch([Chunk(last, 0, 16)])
    chunks = [*(Chunk(r, context, 1) for r in requests), Chunk(last, 16, piece)]
    profile = cProfile.Profile()
    profile.runcall(engine.launch, chunks)
    for request in (*requests, last):
        engine.release(request)
    # A page that is taken is a call or two.
    return pstats.Stats(profile).total_calls - 3 * (piece // engine.page_size)


def test_a_step_costs_the_host_what_its_rows_cost_not_what_their_tokens_do(engine):
    calls(engine, 4, 20, 64)  # what is made once
    few = calls(engine, 32, 20, 64)
    assert calls(engine, 32, 20, 2048) <= few  # a longer piece
    assert calls(engine, 32, 120, 64) <= few + 2  # longer contexts
    many = calls(engine, 160, 20, 64)
    assert (many - few) / 128 < 10, "calls for each decode"

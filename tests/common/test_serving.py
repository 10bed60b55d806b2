"""Requests, chunks and the instant engine by hand; and none of it, nor a scheduler, may pull torch in."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.pages import OutOfPages
from common.serving import Chunk, InputRequest, InstantEngine, Request

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = [
    "common.pages",
    "common.serving",
    "common.batching.request_sets",
    "common.batching.metrics",
    "common.batching.step_loop",
    "common.simulate",
    "assignment4.Section1.continous_scheduler",
    "assignment4.Section1.chunked_scheduler",
    "assignment4.Section1.continous_engine",
    "assignment4.Section1.chunked_engine",
    "assignment4.Section1.continous_main",
    "assignment4.Section1.chunked_main",
]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_no_torch(module):
    code = f"import sys, {module}; sys.exit(any(m.split('.')[0] == 'torch' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def request(prompt=3, out=4, **given):
    return Request(InputRequest(prompt_token_ids=list(range(1, prompt + 1)), output_len=out, **given))


def test_life_of_a_request_with_a_step_in_flight():
    r = request(prompt=3, out=2)
    r.launched(2)
    assert r.is_prefilling and r.num_sampled == 0 and r.wants_more
    r.launched(1)
    assert not r.is_prefilling and r.num_sampled == r.num_unread == 1 and r.wants_more
    r.launched(1)  # its second token, before the first is read
    assert r.num_unread == 2 and not r.wants_more  # the length end is foreseen
    r.read(70, 1.5)
    assert r.output_token_ids == [70] and r.finish_reason is None and r.num_unread == 1
    r.read(71, 2.5)
    assert r.output_token_ids == [70, 71] and r.finish_reason == "length" and r.token_times == [1.5, 2.5]
    assert r.prompt_token_ids == [1, 2, 3] and r.num_unread == 0


def test_token_past_the_end_is_dropped():
    r = Request(InputRequest(prompt_token_ids=[1], output_len=9, ignore_eos=False), eos_token_ids=[8, 9])
    r.launched(1)
    r.launched(1)
    r.read(9, 1.0)
    assert r.finish_reason == "stop" and r.num_unread == 1
    r.read(5, 2.0)
    assert r.output_token_ids == [9] and r.token_times == [1.0] and r.num_unread == 0


def test_eos_is_an_ordinary_token_when_ignored():
    r = Request(InputRequest(prompt_token_ids=[1], output_len=9), eos_token_ids=[9])
    r.launched(1)
    r.read(9, 1.0)
    assert r.finish_reason is None


def test_preemption_keeps_what_was_read():
    r = request(prompt=3, out=4)
    r.launched(3)
    r.read(70, 1.0)
    r.launched(1)
    r.read(71, 2.0)
    r.preempt()
    assert r.num_computed == 0 and r.num_prefill == 5 and r.output_token_ids == [70, 71] and r.preemptions == 1
    assert not Chunk(r, 0, 4).samples and Chunk(r, 0, 5).samples and not Chunk(r, 4, 1).is_decode
    assert Chunk(r, 5, 1).is_decode
    r.launched(5)
    assert r.num_unread == 1


@pytest.mark.parametrize("found", ["b><c", "c>", "a><b><c>"])
def test_stop_string_across_tokens(found):
    r = Request(
        InputRequest(prompt_token_ids=[0], output_len=50, stop=["nowhere", found]),
        detokenize=lambda ids: "".join(f"<{chr(97 + i)}>" for i in ids),
    )
    for token in (5, 0, 1):
        r.read(token, 0.0)
        assert r.finish_reason is None
    r.read(2, 0.0)
    assert r.finish_reason == "stop"


def test_prompt_is_not_searched_for_stop_strings():
    r = Request(
        InputRequest(prompt_token_ids=[1, 2], output_len=50, stop=["bc"]),
        detokenize=lambda ids: "".join(chr(97 + i) for i in ids),
    )
    r.read(7, 0.0)
    assert r.finish_reason is None


@pytest.mark.parametrize("given", [{"output_len": 0}, {"output_len": -1}, {"arrival_time": -0.1}])
def test_impossible_inputs(given):
    with pytest.raises(UserError, match="output_len|arrival_time"):
        InputRequest(prompt_token_ids=[1], **given)


def test_request_needs_a_prompt_and_a_detokenizer_for_stops():
    for given in (InputRequest(), InputRequest("text"), InputRequest(prompt_token_ids=[])):
        with pytest.raises(UserError, match="request 3 has no prompt tokens"):
            Request(given, 3)
    with pytest.raises(UserError, match="stop strings"):
        Request(InputRequest(prompt_token_ids=[1], stop=["x"]))


def test_instant_engine_takes_all_pages_or_none():
    engine = InstantEngine(4, 4)
    a, b = request(prompt=9), request(prompt=8)
    with pytest.raises(OutOfPages, match="5 pages requested, 4 of 4 free"):
        engine.launch([Chunk(a, 0, 9), Chunk(b, 0, 8)])
    assert engine.num_free_pages == 4 and a.num_computed == b.num_computed == 0
    step = engine.launch([Chunk(a, 0, 9), Chunk(b, 0, 4)])
    assert engine.num_free_pages == 0 and set(step.tokens()) == {a} and engine.now() == 1.0
    engine.release(a)
    engine.release(a)  # nothing left to give
    assert engine.num_free_pages == 3


def test_engine_refuses_a_chunk_that_is_not_the_next():
    engine = InstantEngine(4, 4)
    r = request(prompt=9)
    with pytest.raises(ValueError, match="chunk at 2"):
        engine.launch([Chunk(r, 2, 3)])


def test_instant_clock_runs_steps_one_after_the_other():
    engine = InstantEngine(40, 4, step_s=2.0)
    first = engine.launch([Chunk(request(), 0, 3)])
    second = engine.launch([Chunk(request(), 0, 3)])
    assert engine.now() == 0.0  # launching does not wait
    first.tokens()
    assert engine.now() == 2.0
    second.tokens()
    assert engine.now() == 4.0
    engine.wait_until(3.0)
    assert engine.now() == 4.0
    engine.wait_until(10.0)
    engine.launch([Chunk(request(), 0, 3)]).tokens()
    assert engine.now() == 12.0

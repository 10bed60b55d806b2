"""Random schedules of every policy on the checking engine: what comes out, and what holds at every step."""

import random
import sys

import pytest
from checking_engine import CheckingEngine, tokens_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from assignment4.Section1 import chunked_engine, chunked_scheduler, continous_scheduler
from common.batching import request_sets
from common.errors import UserError
from common.pages import pages_for
from common.serving import InputRequest, InstantEngine, Request

POLICIES = ("continuous", "chunked", "naive", "naive drop")


def scheduler(policy, engine, size, **options):
    if policy == "continuous":
        return continous_scheduler.Scheduler(engine, size, **options)
    if policy == "chunked":
        return chunked_scheduler.Scheduler(engine, size, **options)
    return continous_scheduler.NaiveScheduler(engine, size, drop_finished=policy == "naive drop", **options)


def limits(policy, size):
    return {"max_tokens": size} if policy == "chunked" else {"max_requests": size}


request_lists = st.lists(
    st.tuples(
        st.lists(st.integers(0, 996), min_size=1, max_size=25),  # prompt
        st.integers(1, 20),  # output length
        st.sampled_from([0.0, 0.0, 0.3, 3.1, 7.5, 40.7]),  # arrival
        st.booleans(),  # ends by EOS too
    ),
    min_size=1,
    max_size=12,
)
EOS = frozenset(range(0, 997, 9))


def make(specs):
    return [
        Request(
            InputRequest(prompt_token_ids=prompt, output_len=out, arrival_time=arrival, ignore_eos=not eos),
            i,
            eos_token_ids=EOS,
        )
        for i, (prompt, out, arrival, eos) in enumerate(specs)
    ]


def check_end(loop, engine, requests):
    engine.assert_all_pages_free()
    assert not engine.unread and loop.finished()
    assert sorted(r.request_id for r in loop.completed) == [r.request_id for r in requests]
    for r in requests:
        if r.finish_reason == "refused":
            assert r.output_token_ids == [] and r.refusal
            assert pages_for(r.max_tokens, engine.page_size) > engine.pool.capacity
            continue
        eos = r.eos_token_ids
        assert r.output_token_ids == tokens_alone(r.prompt_token_ids, r.output_len, eos)
        assert r.finish_reason == ("stop" if r.output_token_ids[-1] in eos else "length")
        assert len(r.token_times) == r.num_output_tokens and r.token_times == sorted(r.token_times)
        assert r.token_times[0] >= r.arrival_time - 1e-9


@settings(max_examples=300, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    specs=request_lists,
    size=st.integers(1, 40),
    page_size=st.integers(1, 9),
    num_pages=st.integers(1, 30),
    clock=st.sampled_from([0.0, 0.1, 1.7, 1234.567]),
    is_asynchronous=st.booleans(),
)
def test_any_schedule(policy, specs, size, page_size, num_pages, clock, is_asynchronous):
    engine = CheckingEngine(num_pages, page_size, **limits(policy, size))
    engine.is_asynchronous = is_asynchronous
    engine.wait_until(clock)  # an engine that has run before
    requests = make(specs)

    def each_step(loop):
        taken = [page for r in requests if r.pages for page in r.pages.indices]
        assert len(taken) == len(set(taken)) == num_pages - engine.num_free_pages  # none twice, none leaked
        order = [(r.arrival_time, r.request_id) for r in [*loop.running, *loop.waiting]]
        assert order == sorted(order)  # older ones are never behind newer ones
        assert len(loop.in_flight) <= 1

    loop = scheduler(policy, engine, size, on_step=each_step)
    for r in requests:
        loop.add_req(r)
    loop.run()
    check_end(loop, engine, requests)
    check_holds(loop, size if policy != "chunked" else None)


def check_holds(loop, slots):
    """In no slot do two requests overlap by more than the step whose token is still to be read."""
    by_slot = {}
    for hold in loop.holds:
        by_slot.setdefault(hold.slot, []).append(hold)
        assert hold.start_s <= hold.finish_s <= hold.release_s
    if slots is not None:
        assert set(by_slot) <= set(range(slots))
    for holds in by_slot.values():
        holds.sort(key=lambda h: h.start_s)
        for before, after in zip(holds, holds[1:]):
            assert after.start_s >= before.release_s - 2 * loop.engine.step_s - 1e-9


@pytest.mark.parametrize("policy", POLICIES)
def test_pools_that_force_preemption(policy):
    draw = random.Random(3)
    specs = [
        ([draw.randrange(997) for _ in range(draw.randint(1, 30))], draw.randint(1, 40), 0.0, False) for _ in range(60)
    ]
    engine = CheckingEngine(18, 4, **limits(policy, 16))  # one request may take all but none of the pool
    loop = scheduler(policy, engine, 16)
    requests = [loop.add_req(r) for r in make(specs)]
    loop.run()
    check_end(loop, engine, requests)
    preemptions = sum(r.preemptions for r in requests)
    assert (preemptions > 0) == (policy in ("continuous", "chunked"))
    entered = len(loop.holds)
    assert entered == len([r for r in requests if r.finish_reason != "refused"]) + preemptions


@pytest.mark.parametrize("policy", POLICIES)
def test_one_that_never_fits_is_refused_by_name_and_the_others_finish(policy, capsys):
    engine = CheckingEngine(4, 4)
    loop = scheduler(policy, engine, 8)
    fits = loop.add_req(InputRequest(prompt_token_ids=[1] * 10, output_len=7))  # 16 tokens: just
    never = loop.add_req(InputRequest(prompt_token_ids=[1] * 10, output_len=8))  # 17
    other = loop.add_req(InputRequest(prompt_token_ids=[2], output_len=3))
    loop.run()
    assert [r.finish_reason for r in (fits, never, other)] == ["length", "refused", "length"]
    loop.print_completed()
    out = capsys.readouterr().out
    assert "request 1: refused: 17 tokens take 5 pages, and the pool has 4" in out
    assert "request 2: 1 tokens in, 3 out (length)" in out


def test_past_the_context_is_refused():
    loop = scheduler("continuous", InstantEngine(100, 4, max_context=20), 4)
    assert loop.add_req(InputRequest(prompt_token_ids=[1] * 15, output_len=6)).finish_reason is None
    assert "context is 20" in loop.add_req(InputRequest(prompt_token_ids=[1] * 15, output_len=7)).refusal


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [0, -2])
def test_sizes_below_one(policy, size):
    with pytest.raises(UserError, match=f"at least 1, not {size}"):
        scheduler(policy, InstantEngine(4), size)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_starvation_under_hostile_arrivals(policy):
    """A large request stands among a flood of small ones that never stops while it waits. A policy that fills gaps with
    whoever fits would never let it in."""
    engine = CheckingEngine(20, 4, **limits(policy, 8))
    loop = scheduler(policy, engine, 8)
    small = [loop.add_req(InputRequest(prompt_token_ids=[i % 50], output_len=9, arrival_time=0.0)) for i in range(8)]
    large = loop.add_req(InputRequest(prompt_token_ids=[7] * 60, output_len=20, arrival_time=1.0))
    # Two small ones a step, for ever longer than the machine can serve.
    flood = [
        loop.add_req(InputRequest(prompt_token_ids=[3], output_len=9, arrival_time=1.0 + i / 2)) for i in range(600)
    ]
    loop.run()
    check_end(loop, engine, [*small, large, *flood])
    first_entry = {}
    for hold in sorted(loop.holds, key=lambda h: (h.start_s, h.slot)):
        first_entry.setdefault(hold.request_id, hold.start_s)
    served_before = [r for r in flood if first_entry[r.request_id] < first_entry[large.request_id]]
    assert served_before == []
    assert large.token_times[-1] < loop.iterations[-1].start_s / 2
    entries = [first_entry[r.request_id] for r in [large, *flood]]
    assert entries == sorted(entries)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_pages_come_back_after_an_exception_in_the_middle(policy, error):
    engine = CheckingEngine(40, 4)

    def stop(loop):
        if len(loop.iterations) == 5:
            raise error

    loop = scheduler(policy, engine, 8, on_step=stop)
    for i in range(20):
        loop.add_req(InputRequest(prompt_token_ids=[i] * 9, output_len=12))
    with pytest.raises(error):
        loop.run()
    engine.assert_all_pages_free()
    assert not engine.unread


def test_continuous_fills_a_slot_in_the_step_after_its_last_token():
    """Requests of 1, 3, 3 tokens, two slots: what each step holds, written out by hand."""
    engine = CheckingEngine(50, 4)
    loop = scheduler("continuous", engine, 2)
    for out in (1, 3, 3):
        loop.add_req(InputRequest(prompt_token_ids=[1, 2], output_len=out))
    loop.run()
    steps = [[(c.request.request_id, c.start, c.length) for c in chunks] for chunks in engine.launched_chunks]
    assert steps == [[(0, 0, 2), (1, 0, 2)], [(1, 2, 1), (2, 0, 2)], [(1, 3, 1), (2, 2, 1)], [(2, 3, 1)]]
    assert [it.work.kind for it in loop.iterations] == ["prefill", "mixed", "decode", "decode"]
    assert [it.start_s for it in loop.iterations] == [0, 1, 2, 3]


@pytest.mark.parametrize("drop", [False, True])
def test_naive_runs_the_batch_until_its_longest_is_done(drop):
    engine = CheckingEngine(50, 4)
    loop = scheduler("naive drop" if drop else "naive", engine, 2)
    for out in (1, 3, 2):
        loop.add_req(InputRequest(prompt_token_ids=[1, 2], output_len=out))
    loop.run()
    steps = [[(c.request.request_id, c.start, c.length) for c in chunks] for chunks in engine.launched_chunks]
    first = [[(0, 0, 2), (1, 0, 2)], [(0, 2, 1), (1, 2, 1)], [(0, 3, 1), (1, 3, 1)]]
    if drop:
        first = [[(0, 0, 2), (1, 0, 2)], [(1, 2, 1)], [(1, 3, 1)]]
    assert steps == [*first, [(2, 0, 2)], [(2, 2, 1)]]
    hold = next(h for h in loop.holds if h.request_id == 0)
    assert (hold.finish_s, hold.release_s) == (1, 3)  # its slot stays taken


def test_chunked_packs_decodes_first_and_cuts_prompts_at_the_budget():
    engine = CheckingEngine(50, 4)
    loop = scheduler("chunked", engine, 6)
    for prompt, out in ((4, 3), (9, 2), (1, 1)):
        loop.add_req(InputRequest(prompt_token_ids=[1] * prompt, output_len=out))
    loop.run()
    steps = [[(c.request.request_id, c.start, c.length) for c in chunks] for chunks in engine.launched_chunks]
    assert steps == [[(0, 0, 4), (1, 0, 2)], [(0, 4, 1), (1, 2, 5)], [(0, 5, 1), (1, 7, 2), (2, 0, 1)], [(1, 9, 1)]]


@pytest.mark.parametrize(
    "computed, budget, free_pages, length",
    [
        (0, 100, 9, 11),  # the rest of the prompt
        (0, 6, 9, 6),  # the budget
        (0, 100, 2, 8),  # two pages of four
        (6, 100, 0, 2),  # the rest of the last page
        (6, 100, 1, 5),  # of which and a new one the prompt needs five
        (8, 100, 0, None),
        (3, 0, 9, None),
    ],
)
def test_a_piece_is_as_long_as_prompt_budget_and_pages_allow(computed, budget, free_pages, length):
    r = Request(InputRequest(prompt_token_ids=[1] * 11, output_len=3))
    r.launched(computed)
    piece = chunked_engine.next_piece(r, budget, free_pages, page_size=4)
    assert piece == (None if length is None else (r, computed, length))


@pytest.mark.parametrize("policy", ["continuous", "naive", "naive drop"])
def test_whole_prompts_of_a_step_stay_within_its_memory(policy, monkeypatch):
    """Prompts of 5, 5, 12, 3 tokens and a limit of 10: together, alone though too long, and what is left."""
    monkeypatch.setattr(continous_scheduler, "MAX_PROMPT_TOKENS", 10)
    engine = CheckingEngine(50, 4)
    loop = scheduler(policy, engine, 4)
    for prompt in (5, 5, 12, 3):
        loop.add_req(InputRequest(prompt_token_ids=[1] * prompt, output_len=2))
    loop.run()
    prompts = [[c.length for c in step if not c.is_decode] for step in engine.launched_chunks]
    assert [p for p in prompts if p] == [[5, 5], [12], [3]]


def test_an_engine_that_computes_while_it_launches_is_read_at_once():
    """Nothing can overlap there, so a stop is known before another token is computed."""
    prompt = [5, 6]
    engine = CheckingEngine(50, 4)
    engine.is_asynchronous = False
    loop = scheduler("continuous", engine, 2)
    first = tokens_alone(prompt, 1)[0]
    given_eos = InputRequest(prompt_token_ids=prompt, output_len=9, ignore_eos=False)
    loop.add_req(Request(given_eos, 0, eos_token_ids={first}))
    loop.run()
    assert len(engine.launched_chunks) == 1


def test_a_token_computed_past_a_stop_is_dropped():
    """The request ends by its first token, read after the step of its second was launched."""
    prompt = [5, 6]
    first = tokens_alone(prompt, 1)[0]
    engine = CheckingEngine(50, 4)
    loop = scheduler("continuous", engine, 2)
    r = loop.add_req(
        Request(InputRequest(prompt_token_ids=prompt, output_len=9, ignore_eos=False), 0, eos_token_ids={first})
    )
    loop.run()
    assert r.output_token_ids == [first] and r.finish_reason == "stop" and len(engine.launched_chunks) == 2
    engine.assert_all_pages_free()


def test_stop_strings():
    prompt = [5, 6]
    outputs = tokens_alone(prompt, 6)
    engine = CheckingEngine(50, 4)
    loop = scheduler("continuous", engine, 2)
    given_stop = InputRequest(prompt_token_ids=prompt, output_len=9, stop=[f"<{outputs[2]}><{outputs[3]}>"])
    r = loop.add_req(Request(given_stop, 0, detokenize=lambda ids: "".join(f"<{i}>" for i in ids)))
    loop.run()
    assert r.output_token_ids == outputs[:4] and r.finish_reason == "stop"


def python_calls(function) -> int:
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("policy", ["continuous", "chunked"])
def test_python_work_a_token_is_small_and_does_not_grow(policy):
    """Counted, not timed: function calls a token, with 50 and with 1,000 requests waiting. 10,000 requests of this set
    are 640,000 tokens and must take under 10 s, so 15 us a token is all there is."""
    per_token = []
    for count in (50, 1000):
        engine = InstantEngine(500, 16)
        if policy == "chunked":
            loop = chunked_scheduler.Scheduler(engine, 512, 10)
        else:
            loop = continous_scheduler.Scheduler(engine, 10)
        for request in request_sets.handout(count):
            loop.add_req(request)
        calls = python_calls(loop.run)
        per_token.append(calls / sum(r.num_output_tokens for r in loop.completed))
    assert per_token[1] < 1.1 * per_token[0]
    assert per_token[1] < 40

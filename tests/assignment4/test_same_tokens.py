"""The master test of the schedulers: on the real engine every request gives what it gives alone.

The oracle recomputes everything for every token and knows neither cache, pages nor batches.
"""

import random
from functools import partial

import pytest

from assignment4.Section1 import chunked_scheduler, continous_scheduler
from common.pages import pages_for
from common.serving import InputRequest, Request

torch = pytest.importorskip("torch")

POLICIES = {
    "naive": partial(continous_scheduler.NaiveScheduler, req_batch_size=4, drop_finished=False),
    "naive, rows dropped": partial(continous_scheduler.NaiveScheduler, req_batch_size=4, drop_finished=True),
    "continuous": partial(continous_scheduler.Scheduler, req_batch_size=5),
    **{
        f"chunked {budget}": partial(chunked_scheduler.Scheduler, token_batch_size=budget, req_batch_size=6)
        for budget in (1, 7, 64, 512)
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A model this small only waits for its second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(one_thread):
    from common.checkpoint import load

    return load("random:tiny", device="cpu", dtype="float32", seed=3, quiet=True)[0]


@pytest.fixture(scope="module")
def requests(model):
    """[(prompt, output_len, expected)]: prompts of 1 to 70 tokens, outputs of 1 to 24."""
    from common.equality import greedy_reference

    draw = random.Random(5)
    found = []
    for length in (1, 70, 16, 3, 33, 15, 2, 17, 40):
        prompt = [draw.randrange(model.config.vocab_size) for _ in range(length)]
        output_len = draw.randint(1, 24)
        with torch.inference_mode():
            found.append((prompt, output_len, greedy_reference(model, prompt, output_len)))
    return found


@pytest.fixture(autouse=True)
def poisoned_pages(monkeypatch):
    """What a request leaves in its pages becomes NaN: reading any of it gives another token."""
    from common.engine import Engine

    release = Engine.release

    def release_and_poison(self, request):
        pages = list(request.pages.indices) if request.pages else []
        release(self, request)
        for layer in self.pool.layers:
            layer[pages] = float("nan")

    monkeypatch.setattr(Engine, "release", release_and_poison)


def serve(model, policy, requests, *, page_size, num_pages, order, eos=()):
    from common.engine import Engine

    engine = Engine(model, backend="torch", page_size=page_size, num_pages=num_pages, max_requests=12)
    loop = POLICIES[policy](engine)
    mine = {}
    for i in order:
        prompt, output_len, _ = requests[i]
        given = InputRequest(prompt_token_ids=prompt, output_len=output_len, ignore_eos=not eos)
        mine[i] = loop.add_req(Request(given, i, eos_token_ids=eos))
    loop.run()
    assert engine.num_free_pages == num_pages
    return mine


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("pool", ["ample", "just one fits"])
def test_tokens_are_those_of_the_request_alone(model, requests, policy, page_size, pool):
    longest = max(len(prompt) + out - 1 for prompt, out, _ in requests)
    num_pages = pages_for(longest, page_size) if pool == "just one fits" else pages_for(1000, page_size)
    order = list(range(len(requests)))
    random.Random(f"{policy} {page_size} {pool}").shuffle(order)
    mine = serve(model, policy, requests, page_size=page_size, num_pages=num_pages, order=order)
    for i, (_, _, expected) in enumerate(requests):
        assert mine[i].output_token_ids == expected, f"request {i}"
    if pool == "just one fits" and policy == "continuous":
        assert sum(r.preemptions for r in mine.values()) > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stop_token_ends_a_request_wherever_it_runs(model, requests, policy):
    """Some tokens of the outputs are declared EOS."""
    eos = {expected[len(expected) // 2] for _, _, expected in requests[::2]}
    mine = serve(model, policy, requests, page_size=4, num_pages=300, order=range(len(requests)), eos=eos)
    ended_early = 0
    for i, (_, _, expected) in enumerate(requests):
        end = next((n for n, token in enumerate(expected) if token in eos), len(expected) - 1)
        assert mine[i].output_token_ids == expected[: end + 1]
        ended_early += end < len(expected) - 1
    assert ended_early >= 3

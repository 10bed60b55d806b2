"""How a request set is divided among ranks that serve it together (data parallelism)."""

import random
from types import SimpleNamespace

import pytest

from common.batching.data_parallel import share
from common.errors import UserError
from common.serving import InputRequest


def shares(lengths, size):
    requests = [(i, InputRequest("", length, [1])) for i, length in enumerate(lengths)]
    return [share(requests, SimpleNamespace(rank=rank, size=size)) for rank in range(size)]


@pytest.mark.parametrize("seed", range(20))
def test_every_request_has_one_rank_and_no_rank_lags_by_more_than_one_request(seed):
    draw = random.Random(seed)
    size = draw.randint(1, 8)
    lengths = [draw.randint(1, 1024) for _ in range(draw.randint(size, 200))]
    parts = shares(lengths, size)
    assert sorted(number for part in parts for number, _ in part) == list(range(len(lengths)))
    assert all(part == sorted(part, key=lambda numbered: numbered[0]) for part in parts)  # first come, first served
    tokens = [sum(request.output_len for _, request in part) for part in parts]
    assert min(len(part) for part in parts) >= 1 and max(tokens) - min(tokens) <= max(lengths)


def test_long_requests_at_every_second_place_do_not_meet_on_one_rank():
    first, second = shares([1000, 10] * 20, 2)
    assert abs(sum(r.output_len for _, r in first) - sum(r.output_len for _, r in second)) <= 1000


def test_more_ranks_than_requests_are_refused():
    with pytest.raises(UserError, match="2 requests cannot keep 3 ranks busy"):
        shares([5, 5], 3)

"""The metrics on requests whose times are written down, with the results worked out by hand."""

import math

import pytest

from common.batching.metrics import max_itl_s, percentiles, request_row, summarise, tpot_s
from common.serving import InputRequest, Request


def ended(request_id, arrival, times):
    r = Request(InputRequest(prompt_token_ids=[1, 2], output_len=len(times), arrival_time=arrival), request_id)
    for t in times:
        r.read(7, t)
    assert r.finish_reason == "length"
    return r


THREE = [
    ended(0, 1.0, [2.0, 3.0, 7.0]),  # TTFT 1, TPOT 5/2, gaps 1 and 4, latency 6
    ended(1, 0.5, [4.0, 4.5]),  # TTFT 3.5, TPOT 0.5, gap 0.5, latency 4
    ended(2, 3.0, [3.25]),  # TTFT 0.25, no TPOT, no gap, latency 0.25
]


def test_summary_by_hand():
    s = summarise(THREE, slo_ttft=1.0, slo_tpot=2.5)
    assert (s["requests"], s["output_tokens"], s["time"]) == (3, 6, 6.5)
    assert s["tokens_per_s"] == pytest.approx(6 / 6.5)
    assert s["ttft_p50_s"] == 1.0
    assert s["ttft_p90_s"] == pytest.approx(1.0 + 0.8 * 2.5)  # of 0.25, 1, 3.5: rank 0.9 * 2 = 1.8
    assert s["tpot_p50_s"] == 1.5
    assert s["itl_p50_s"] == 1.0  # of 0.5, 1, 4: pooled over requests
    assert s["itl_p99_s"] == pytest.approx(1.0 + 0.98 * 3.0)
    assert s["max_itl_s"] == 4.0
    assert s["latency_p50_s"] == 4.0
    assert s["good_requests"] == 2 and s["goodput"] == pytest.approx(2 / 6.5)


@pytest.mark.parametrize(
    "ttft, tpot, good",
    [(math.inf, math.inf, 3), (0.99, math.inf, 1), (1.0, 2.49, 1), (3.5, 0.5, 2), (3.49, 0.5, 1), (0.1, 9.0, 0)],
)
def test_goodput_wants_both_targets(ttft, tpot, good):
    assert summarise(THREE, slo_ttft=ttft, slo_tpot=tpot)["good_requests"] == good


def test_single_tokens_have_no_gap():
    assert tpot_s(THREE[2]) is None and max_itl_s(THREE[2]) is None
    s = summarise([THREE[2]])
    assert s["tpot_p50_s"] is s["itl_p99_s"] is None and s["max_itl_s"] == 0.0


def test_rows_of_the_csv():
    row = request_row(THREE[0])
    assert row == {
        "request": 0,
        "arrival_s": 1.0,
        "prompt_tokens": 2,
        "output_tokens": 3,
        "ttft_s": 1.0,
        "tpot_s": 2.5,
        "max_itl_s": 4.0,
        "latency_s": 6.0,
        "preemptions": 0,
        "finish_reason": "length",
    }
    refused = Request(InputRequest(prompt_token_ids=[1], output_len=3), 9)
    refused.refuse("why")
    row = request_row(refused)
    assert row["ttft_s"] is row["tpot_s"] is row["latency_s"] is None and row["finish_reason"] == "refused"


def test_refused_ones_count_as_refused_only():
    refused = Request(InputRequest(prompt_token_ids=[1], output_len=3), 9)
    refused.refuse("why")
    s = summarise([*THREE, refused])
    assert (s["requests"], s["refused"], s["time"]) == (3, 1, 6.5)
    with pytest.raises(ValueError):
        summarise([refused])


def test_percentiles_interpolate():
    assert percentiles("x", range(101)) == {"x_p50_s": 50, "x_p90_s": 90, "x_p99_s": 99}
    assert percentiles("x", [3.0]) == {"x_p50_s": 3, "x_p90_s": 3, "x_p99_s": 3}

"""What is reported of a run of requests, as vLLM's serving benchmark defines it. No torch.

TTFT        first token - arrival
TPOT        (last token - first token) / (tokens - 1), a request; none where there is one token
ITL         the gaps between tokens, of all requests pooled
latency     last token - arrival
throughput  output tokens / (last end - first arrival)
goodput     requests a second inside the targets: TTFT <= slo_ttft and TPOT <= slo_tpot
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from common.serving import Request

PERCENTILES = (50, 90, 99)


def ttft_s(request: Request) -> float:
    return request.token_times[0] - request.arrival_time


def tpot_s(request: Request) -> float | None:
    times = request.token_times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def max_itl_s(request: Request) -> float | None:
    times = request.token_times
    return max(b - a for a, b in zip(times, times[1:])) if len(times) > 1 else None


def latency_s(request: Request) -> float:
    return request.token_times[-1] - request.arrival_time


def percentiles(name: str, values: Iterable[float]) -> dict[str, float | None]:
    """{name_p50_s, name_p90_s, name_p99_s}, interpolated linearly; None without values."""
    values = np.fromiter(values, dtype=np.float64)
    return {f"{name}_p{p}_s": float(np.percentile(values, p)) if len(values) else None for p in PERCENTILES}


def request_row(request: Request) -> dict:
    """One line of *_requests.csv; times that do not exist (one token, or refused) are None."""
    answered = bool(request.token_times)
    return {
        "request": request.request_id,
        "arrival_s": request.arrival_time,
        "prompt_tokens": request.num_prompt_tokens,
        "output_tokens": request.num_output_tokens,
        "ttft_s": ttft_s(request) if answered else None,
        "tpot_s": tpot_s(request),
        "max_itl_s": max_itl_s(request),
        "latency_s": latency_s(request) if answered else None,
        "preemptions": request.preemptions,
        "finish_reason": request.finish_reason or "",
    }


def summarise(requests: Sequence[Request], *, slo_ttft: float = math.inf, slo_tpot: float = math.inf) -> dict:
    """The summary of a run's requests; the targets are in seconds. Refused requests count as such and nowhere else."""
    done = [r for r in requests if r.token_times]
    if not done:
        raise ValueError("no request gave a token")
    time = max(r.token_times[-1] for r in done) - min(r.arrival_time for r in done)
    output_tokens = sum(len(r.token_times) for r in done)
    tpots = {r: tpot_s(r) for r in done}
    good = [r for r in done if ttft_s(r) <= slo_ttft and (tpots[r] is None or tpots[r] <= slo_tpot)]
    gaps = [np.diff(r.token_times) for r in done]
    return {
        "requests": len(done),
        "output_tokens": output_tokens,
        "time": time,
        "tokens_per_s": output_tokens / time if time else math.inf,
        **percentiles("ttft", (ttft_s(r) for r in done)),
        **percentiles("tpot", (t for t in tpots.values() if t is not None)),
        **percentiles("itl", np.concatenate(gaps)),
        "max_itl_s": float(max((g.max() for g in gaps if len(g)), default=0.0)),
        **percentiles("latency", (latency_s(r) for r in done)),
        "goodput": len(good) / time if time else math.inf,
        "good_requests": len(good),
        "preemptions": sum(r.preemptions for r in requests),
        "refused": sum(r.finish_reason == "refused" for r in requests),
    }

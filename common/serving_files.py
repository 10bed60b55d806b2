"""The CSVs of continous_main.py and chunked_main.py: their columns, and a run's rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import results, simulate
from common.serving import Request
from common.serving_metrics import PERCENTILES, request_row
from common.step_loop import StepLoop

REQUEST_COLUMNS = (
    *("policy", "request", "arrival_s", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s", "max_itl_s"),
    *("latency_s", "preemptions", "finish_reason", "token_budget"),
)
ITERATION_COLUMNS = (
    *("policy", "iteration", "start_s", "time_us", "kind", "prefill_tokens", "decode_tokens", "running", "waiting"),
    *("pages_used", "token_budget", "replica", *simulate.WORK_COLUMNS[2:]),
)
SUMMARY_COLUMNS = (
    *("policy", "token_budget", "requests", "output_tokens", "time", "tokens_per_s"),
    *(f"{name}_p{p}_s" for name in ("ttft", "tpot", "itl") for p in PERCENTILES),
    *("goodput", "good_requests", "max_itl_s", *(f"latency_p{p}_s" for p in PERCENTILES)),
    *("preemptions", "refused", "mean_running", "pages_peak", "pages_total", "iterations", "rows_computed"),
    *("ceiling_tokens_per_s", "time_min", "time_max", "repeats", results.SUSPECT),
)
SLOT_COLUMNS = ("policy", "token_budget", "replica", "slot", "request", "start_s", "finish_s", "release_s")
MAX_ITERATION_ROWS = 50_000  # of one policy: a longer run is thinned, or the file would be gigabytes
MAX_SLOT_ROWS = 5_000  # of one policy: what a timeline can show


@dataclass(frozen=True)
class Policy:
    """A scheduler to be made: `make_loop(engine, on_step=...)`. `token_budget`: of the chunked ones, else None."""

    name: str
    make_loop: Callable[..., StepLoop]
    token_budget: int | None = None

    @property
    def label(self) -> str:
        return self.name if self.token_budget is None else f"{self.name}, budget {self.token_budget}"


@dataclass
class Run:
    """One policy's run: what its rows are made from."""

    policy: Policy
    requests: list[Request]
    loops: list[StepLoop]
    summary: dict = field(default_factory=dict)


class Files:
    """The CSVs of one script: requests, iterations, slots and, last and so the sign of a whole run, the summary."""

    def __init__(self, out: Path, name: str, suffix: str, provenance: dict, *, resume: bool, compare: bool):
        engine = ["engine"] if compare else []

        def file(kind: str, columns: Sequence[str], key: Sequence[str]) -> results.ResultFile:
            return results.ResultFile(
                out, f"{name}_{kind}{suffix}", [*columns, *engine], provenance, key=key, resume=resume
            )

        self.compare = compare
        self.requests = file("requests", REQUEST_COLUMNS, ["policy", "token_budget", "request"])
        self.iterations = file("iterations", ITERATION_COLUMNS, ["policy", "token_budget", "replica", "iteration"])
        self.slots = file("slots", SLOT_COLUMNS, ["policy", "token_budget", "replica", "slot", "request", "start_s"])
        self.summary = file("summary", SUMMARY_COLUMNS, ["policy", "token_budget"])

    @property
    def all(self) -> list[results.ResultFile]:
        return [self.requests, self.iterations, self.slots, self.summary]

    def has(self, policy: Policy) -> bool:
        return self.summary.has(policy=policy.name, token_budget=policy.token_budget)

    def write(self, run: Run, engine: str = "ours") -> None:
        """All rows of a run. A kill in the middle leaves rows without a summary: `--resume` measures the policy again
        and keeps those that are there."""
        extra = {"engine": engine} if self.compare else {}
        key = {"policy": run.policy.name, "token_budget": run.policy.token_budget}
        mine = {**key, **extra}
        self.requests.extend(
            {**mine, **request_row(r)} for r in run.requests if not self.requests.has(**key, request=r.request_id)
        )
        for replica, loop in enumerate(run.loops):
            self.iterations.extend(
                {**mine, **row}
                for row in _iteration_rows(loop, run.policy.label, replica)
                if not self.iterations.has(**key, replica=replica, iteration=row["iteration"])
            )
            self.slots.extend(
                {**mine, **row}
                for row in _slot_rows(loop, replica)
                if not self.slots.has(**key, **{name: row[name] for name in ("replica", "slot", "request", "start_s")})
            )
        self.summary.append(**{**extra, **run.summary})

    def close(self, **facts) -> None:
        for file in self.all:
            file.close(**facts)


def _iteration_rows(loop: StepLoop, label: str, replica: int) -> list[dict]:
    every = math.ceil(len(loop.iterations) / MAX_ITERATION_ROWS)
    if every > 1:
        print(f"{label}: every {every}th of {len(loop.iterations):,} iterations is written")
    return [
        {
            "iteration": i,
            "start_s": it.start_s,
            "time_us": it.time_us,
            "kind": it.work.kind,
            "running": it.running,
            "waiting": it.waiting,
            "pages_used": it.pages_used,
            "replica": replica,
            **{name: getattr(it.work, name) for name in simulate.WORK_COLUMNS},
        }
        for i, it in enumerate(loop.iterations)
        if i % every == 0
    ]


def _slot_rows(loop: StepLoop, replica: int) -> list[dict]:
    return [
        {
            "replica": replica,
            "slot": hold.slot,
            "request": hold.request_id,
            "start_s": hold.start_s,
            "finish_s": hold.finish_s,
            "release_s": hold.release_s,
        }
        for hold in sorted(loop.holds, key=lambda hold: hold.start_s)[:MAX_SLOT_ROWS]
    ]

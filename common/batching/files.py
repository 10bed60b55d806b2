"""The CSVs of continous_main.py and chunked_main.py: their columns, and a run's rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import results, simulate
from common.batching.metrics import PERCENTILES, request_row
from common.batching.step_loop import Hold, Iteration, StepLoop
from common.errors import UserError
from common.serving import Request

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
    *("ceiling_tokens_per_s", "time_min", "time_max", "repeats", "rate", results.SUSPECT),
)
SLOT_COLUMNS = ("policy", "token_budget", "replica", "slot", "request", "start_s", "finish_s", "release_s")
MAX_ROWS = 20_000  # of one policy in one file: a longer run, which only the simulator makes, is thinned
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
        whole = {(row["policy"], row["token_budget"]) for row in self.summary.rows}
        for each in self.all:
            if any((row["policy"], row["token_budget"]) not in whole for row in each.rows):
                raise UserError(f"--resume: {each.path} was cut off while a policy's rows were written; drop --resume")

    @property
    def all(self) -> list[results.ResultFile]:
        return [self.requests, self.iterations, self.slots, self.summary]

    def has(self, policy: Policy) -> bool:
        return self.summary.has(policy=policy.name, token_budget=policy.token_budget)

    def write(self, run: Run, engine: str = "ours") -> None:
        """All rows of a run."""
        mine = {"policy": run.policy.name, "token_budget": run.policy.token_budget}
        if self.compare:
            mine["engine"] = engine
        # What a peer does not tell of a run is not known of its requests.
        columns = {
            "ttft_s": "ttft_p50_s",
            "tpot_s": "tpot_p50_s",
            "latency_s": "latency_p50_s",
            "max_itl_s": "max_itl_s",
        }
        unknown = {mine: None for mine, of_all in columns.items() if run.summary[of_all] is None}
        rows = ({**mine, **request_row(r), **unknown} for r in thinned(run.requests, run.policy, "requests"))
        self.requests.extend(rows)
        for replica, loop in enumerate(run.loops):
            iterations = thinned(list(enumerate(loop.iterations)), run.policy, "iterations")
            self.iterations.extend({**mine, "replica": replica, **_iteration_row(i, it)} for i, it in iterations)
            holds = sorted(loop.holds, key=lambda hold: hold.start_s)[:MAX_SLOT_ROWS]
            self.slots.extend({**mine, "replica": replica, **_slot_row(hold)} for hold in holds)
        self.summary.append(**{**run.summary, **mine})

    def close(self, **facts) -> None:
        for file in self.all:
            file.close(**facts)


def thinned(rows: Sequence, policy: Policy, what: str) -> Sequence:
    """The rows, or every n-th of more than a file and a figure are good for."""
    every = math.ceil(len(rows) / MAX_ROWS)
    if every > 1:
        print(f"{policy.label}: one in {every} of {len(rows):,} {what} is written")
    return rows[:: max(1, every)]


def _iteration_row(number: int, iteration: Iteration) -> dict:
    work = iteration.work
    return {
        "iteration": number,
        "start_s": iteration.start_s,
        "time_us": iteration.time_us,
        "kind": work.kind,
        "running": iteration.running,
        "waiting": iteration.waiting,
        "pages_used": iteration.pages_used,
        **{name: getattr(work, name) for name in simulate.WORK_COLUMNS},
    }


def _slot_row(hold: Hold) -> dict:
    return {
        "slot": hold.slot,
        "request": hold.request_id,
        "start_s": hold.start_s,
        "finish_s": hold.finish_s,
        "release_s": hold.release_s,
    }

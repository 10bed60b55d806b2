"""Data parallel serving: every rank serves a share of the requests on a model of its own; rank 0 tells of them all.

The ranks exchange nothing while they serve. Afterwards each sends what its run's rows are made from, so the CSVs look
as if one process had had as many replicas. All ranks start a policy together, so their clocks may be compared.
"""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from common.batching.files import Run
from common.batching.step_loop import Hold, Iteration
from common.distributed import World
from common.errors import UserError
from common.serving import InputRequest, Request, Work


def check(args: Any, world: World) -> None:
    """The same options on every rank, and only those that several ranks can follow. Raises UserError."""
    for option in ("resume", "simulate"):
        if getattr(args, option):
            raise UserError(f"--{option}: not under torchrun; start the script plainly")
    if args.load:
        raise UserError("--load: not under torchrun, whose ranks do not know the measured throughput")
    if args.compare:
        raise UserError("--compare: not under torchrun; a peer would have one device, ours several")
    world.require_same("option", vars(args))


def share(requests: list[tuple[int, InputRequest]], world: World) -> list[tuple[int, InputRequest]]:
    """This rank's part of the numbered requests. UserError where there are more ranks than requests.

    Each in turn goes to the rank with the fewest tokens to generate so far: a request holds its slot for as many steps,
    and all wait for the rank that is done last.
    """
    if len(requests) < world.size:
        raise UserError(f"{len(requests)} requests cannot keep {world.size} ranks busy; start fewer")
    shares: list[list[tuple[int, InputRequest]]] = [[] for _ in range(world.size)]
    tokens = [0] * world.size
    for number, request in requests:
        rank = tokens.index(min(tokens))
        shares[rank].append((number, request))
        tokens[rank] += request.output_len
    return shares[world.rank]


def gather(run: Run, world: World) -> Run:
    """At rank 0 the run of all ranks, a loop each; elsewhere the rank's own."""
    parts = world.gather({"requests": [_to_plain(r) for r in run.requests], "loops": [_loop(x) for x in run.loops]})
    if parts is None:
        return run
    requests = [_from_plain(plain) for part in parts for plain in part["requests"]]
    loops = [
        SimpleNamespace(
            total_pages=loop["total_pages"],
            iterations=[Iteration(start, time, Work(**work), *rest) for start, time, work, *rest in loop["iterations"]],
            holds=[Hold(**hold) for hold in loop["holds"]],
        )
        for part in parts
        for loop in part["loops"]
    ]
    return Run(run.policy, sorted(requests, key=lambda r: r.request_id), loops)


def _loop(loop: Any) -> dict[str, Any]:
    return {
        "total_pages": loop.total_pages,
        "iterations": [[it.start_s, it.time_us, asdict(it.work), *it[3:]] for it in loop.iterations],
        "holds": [asdict(hold) for hold in loop.holds],
    }


def _to_plain(request: Request) -> dict[str, Any]:
    fields = ("request_id", "arrival_time", "output_len", "tokens", "token_times", "finish_reason", "refusal")
    return {name: getattr(request, name) for name in (*fields, "num_prompt_tokens", "preemptions")}


def _from_plain(plain: dict[str, Any]) -> Request:
    prompt = plain["tokens"][: plain["num_prompt_tokens"]]
    given = InputRequest("", plain["output_len"], prompt, plain["arrival_time"])
    request = Request(given, plain["request_id"])
    for name in ("tokens", "token_times", "finish_reason", "refusal", "preemptions"):
        setattr(request, name, plain[name])
    return request

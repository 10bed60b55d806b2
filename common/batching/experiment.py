"""What continous_main.py and chunked_main.py share: options, requests, one run by one policy, its rows, its checks.

The experiment itself (which policies, what is compared, what is drawn) stands in those scripts.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from common import cli, distributed, results, simulate
from common.batching import data_parallel, request_sets
from common.batching.files import Files, Policy, Run
from common.batching.metrics import summarise
from common.batching.peers import HuggingFace
from common.batching.progress import Progress
from common.batching.setup import Setup
from common.errors import CheckFailed, UserError
from common.scripts.start_up import KernelTimes
from common.serving import InputRequest, Request

AT_LOAD = " load"  # how the name of a policy ends whose requests arrive as `--load` says
BACKENDS = ("auto", "torch", "triton", "flashinfer")


def add_options(parser: argparse.ArgumentParser, default_set: str) -> None:
    """The options that both scripts have beside the shared ones."""
    sets = f"{request_sets.HELP} (default: {default_set})"
    parser.add_argument("--requests", type=cli.nonempty, metavar="NAME|FILE", help=sets)
    parser.add_argument("--num-requests", type=at_least_one, metavar="N", help="how many of them (default: all)")
    parser.add_argument("--req-batch-size", type=at_least_one, metavar="N", help="requests that run at once at most")
    parser.add_argument("--rate", type=positive_number, metavar="R", help="Poisson arrivals, R a second (else at once)")
    parser.add_argument(
        "--load", type=share, metavar="F", help="once more, arriving at this share of the measured throughput (0.8)"
    )
    parser.add_argument("--slo-ttft", type=positive_number, metavar="S", help="target for the first token, in seconds")
    parser.add_argument("--slo-tpot", type=positive_number, metavar="S", help="target for a later token, in seconds")
    parser.add_argument(
        "--hf-batch-size", type=at_least_one, metavar="N", help="requests in a batch of --compare hf (default: ours)"
    )
    parser.add_argument("--stop-at-eos", action="store_true", help="end at end-of-text (else by length alone)")
    parser.add_argument(
        "--dump-tokens", type=cli.a_path, metavar="FILE", help="write the token ids of the last policy as JSON lines"
    )
    parser.add_argument(
        "--page-size", type=at_least_one, metavar="N", default=16, help="tokens a KV page (default: 16)"
    )
    parser.add_argument("--kv-pages", type=at_least_one, metavar="N", help="KV pages (default: --kv-memory)")
    parser.add_argument(
        "--kv-memory", type=share, metavar="F", help="share of the free memory for KV pages (0.96, 0.25 on a CPU)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="attention over pages (default: auto)")
    parser.add_argument(
        "--simulate",
        type=cli.nonempty,
        metavar="MACHINE[:SHAPE]",
        help="step times from a roofline: h200, cpu2 or a roofline.json, :SHAPE",
    )
    parser.add_argument(
        "--replicas", type=at_least_one, metavar="N", default=1, help="simulated machines behind a router"
    )


def check_options(args: argparse.Namespace) -> None:
    """Refuse what can be refused before a model is loaded: a set that is not there or malformed, options that nothing
    would use.
    """
    if args.requests is not None:
        request_sets.check_source(args.requests)
        if args.requests not in request_sets.NAMES and not args.simulate:  # without a model nothing is gained by it
            request_sets.check_file(args.requests, count=args.num_requests)
    if "hf" not in args.compare:
        cli.refuse_unused(args, ["hf_batch_size"], "a size of --compare hf; add that or leave it out")
    if args.simulate and not distributed.is_rank():  # ranks are told that there is no simulation for them
        typed = [name for name in ("device", "dtype", "backend") if getattr(args, name) != "auto"]
        why = "goes with a real model, and --simulate has none; leave one of them out"
        cli.refuse_unused(args, [*typed, "model", "kv_memory", "dump_tokens"], why)


def at_least_one(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 10**12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    value = positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: above 0, at most 1")
    return value


# --- requests --------------------------------------------------------------------------------------------------------
def read_requests(
    args: argparse.Namespace, setup: Setup, default_set: str, shapes: Mapping[str, Mapping]
) -> list[InputRequest]:
    """The one fixed set that every policy gets: what `--requests` names, whole, or the script's own in a size that the
    preset allows (`shapes`: preset -> arguments of request_sets.load).

    A text past the context is refused here, a length in a trace only by the scheduler: no trace is made for one model.
    So is `--load` for requests that have arrival times.
    """
    config = setup.config
    shape = {} if args.requests else dict(shapes[args.preset])
    args.requests = args.requests or default_set
    shape["count"] = args.num_requests or shape.get("count")
    requests = request_sets.load(args.requests, vocab_size=config.vocab_size, seed=args.seed, **shape)
    for number, request in enumerate(requests):
        request.ignore_eos = not args.stop_at_eos
        if request.prompt_token_ids is None:
            request.prompt_token_ids = setup.encode(request.input_str)
            total = len(request.prompt_token_ids) + request.output_len
            if total > config.max_position_embeddings:
                raise UserError(
                    f"--requests {args.requests}: request {number} has {len(request.prompt_token_ids)} prompt and "
                    f"{request.output_len} output tokens, the context is {config.max_position_embeddings}: shorten it"
                )
    if args.rate:
        request_sets.poisson_arrivals(requests, args.rate, seed=args.seed)
    if args.load and any(r.arrival_time for r in requests):
        raise UserError(f"--load {args.load}: these requests arrive at times of their own; leave --rate out, or --load")
    prompt_tokens = sum(len(r.prompt_token_ids) for r in requests)
    output_tokens = sum(r.output_len for r in requests)
    arrivals = f"over {max(r.arrival_time for r in requests):.3g} s" if requests[-1].arrival_time else "at once"
    print(
        f"requests: {args.requests}, {len(requests)} of them, {prompt_tokens:,} tokens in, {output_tokens:,} out, "
        f"arriving {arrivals}"
    )
    return requests


# --- one run ---------------------------------------------------------------------------------------------------------
def serve(policy: Policy, setup: Setup, given: Sequence[InputRequest], args: argparse.Namespace) -> Run:
    """Serve the set once by one policy."""
    numbered = list(enumerate(given))
    if setup.world is not None:
        numbered = data_parallel.share(numbered, setup.world)
        setup.world.barrier()  # the ranks' clocks start together
    requests = [Request(r, i, eos_token_ids=setup.eos_token_ids) for i, r in numbered]
    progress = Progress(policy.label, len(requests))
    loops = [policy.make_loop(engine, on_step=progress) for engine in setup.engines]
    progress.begin(loops)
    try:
        if len(loops) == 1:
            for request in requests:
                loops[0].add_req(request)
            loops[0].run()
        else:
            simulate.serve_replicas(loops, sorted(requests, key=lambda r: r.arrival_time))
    finally:
        progress.close()
    if all(r.finish_reason == "refused" for r in requests):
        raise UserError(f"no request can be served; the first: {requests[0].refusal}; raise --kv-pages or take others")
    run = Run(policy, requests, loops)
    if setup.world is not None:
        run = data_parallel.gather(run, setup.world)
    run.summary = _summary(run, setup, args)
    return run


def serve_all(
    policies: Sequence[Policy],
    setup: Setup,
    given: Sequence[InputRequest],
    args: argparse.Namespace,
    files: Files,
    peer: HuggingFace | None = None,
) -> list[Run]:
    """Every policy, and the peer, `args.repeats` times, in turn, so that a machine that slows down slows all of them.
    The run of median time is the one whose rows are written; the summary has the spread. What `--resume` finds is left
    out. Returns the policies' runs."""
    todo: list[Policy | HuggingFace] = [policy for policy in policies if not files.has(policy)]
    if args.warmup and todo and not args.simulate:
        # On a GPU the first prompts of a shape compile kernels, so all of them are read once; on a CPU nothing does.
        count = len(given) if setup.device_type == "cuda" else 2 * (setup.world.size if setup.world else 1)
        few = [replace(r, output_len=min(4, r.output_len), arrival_time=0.0) for r in given[:count]]
        for policy in todo:
            serve(policy, setup, few, args)
    if peer is not None and not files.has(peer.policy):
        todo.append(peer)
    runs: list[list[Run]] = [[] for _ in todo]
    kernels = KernelTimes().listen() if setup.device_type == "cuda" else KernelTimes()
    for repeat in range(args.repeats):
        for one, mine in zip(todo, runs):
            before = replace(kernels)
            mine.append(one.serve(given, args) if one is peer else serve(one, setup, given, args))
            if one is not peer and (compiled := kernels.compiled - before.compiled):
                print(
                    f"{one.label}: {compiled} kernels were compiled while it served, which took "
                    f"{kernels.seconds - before.seconds:.1f} s of it; a second run finds them on the disk"
                )
            if repeat == args.repeats - 1 and setup.writes:
                files.write(median_run(mine), engine=peer.name if one is peer else "ours")
    return [median_run(mine) for one, mine in zip(todo, runs) if one is not peer]


def at_load(policy: Policy, rows: Sequence[Mapping], given: Sequence[InputRequest], args: argparse.Namespace):
    """(the policy under another label, its requests) for `--load`: arriving as a Poisson process at that share of the
    throughput that the summary `rows` have for the policy.
    """
    row = next(r for r in rows if (r["policy"], r["token_budget"]) == (policy.name, policy.token_budget))
    timed = [replace(r) for r in given]
    request_sets.poisson_arrivals(timed, args.load * row["requests"] / row["time"], seed=args.seed)
    return replace(policy, name=f"{policy.name} at {args.load:.0%}{AT_LOAD}"), timed


def is_at_load(row: Mapping) -> bool:
    """Whether a row of the summary is of `--load`."""
    return row["policy"].endswith(AT_LOAD)


def load_in_words(rows: Sequence[Mapping], policy: Policy) -> str:
    """What the summary says of the policy that `at_load` made; "" where it is not there."""
    row = next((r for r in rows if (r["policy"], r["token_budget"]) == (policy.name, policy.token_budget)), None)
    if row is None:
        return ""
    itl = "-" if row["itl_p99_s"] is None else f"{1e3 * row['itl_p99_s']:.3g} ms"
    return (
        f"{row['policy']} ({row['rate']:.3g} requests a second): p99 TTFT {row['ttft_p99_s']:.3g} s, p99 ITL {itl}, "
        f"{cli.format_value(row['tokens_per_s'])} tokens/s."
    )


def arrival_rate(given: Sequence[InputRequest | Request]) -> float | None:
    """Requests a second until the last one arrives; None where all arrive at once."""
    last = max(r.arrival_time for r in given)
    return len(given) / last if last else None


def median_run(runs: Sequence[Run]) -> Run:
    times = [run.summary["time"] for run in runs]
    run = runs[times.index(statistics.median_low(times))]
    run.summary |= {"time_min": min(times), "time_max": max(times), "repeats": len(runs)}
    return run


def _summary(run: Run, setup: Setup, args: argparse.Namespace) -> dict:
    iterations = [it for loop in run.loops for it in loop.iterations]
    rows = sum(it.running for it in iterations)
    busy_s = sum(it.time_us for it in iterations) / 1e6
    summary = summarise(run.requests, slo_ttft=args.slo_ttft or math.inf, slo_tpot=args.slo_tpot or math.inf)
    ceiling_s = max(sum(setup.ceiling.ceiling_s(it.work) for it in loop.iterations) for loop in run.loops)
    ceiling = summary["output_tokens"] / ceiling_s
    return {
        "policy": run.policy.name, "token_budget": run.policy.token_budget, **summary,
        # Time-weighted: rows of the steps, while steps ran.
        "mean_running": sum(it.running * it.time_us for it in iterations) / 1e6 / busy_s,
        "pages_peak": max(it.pages_used for it in iterations), "pages_total": run.loops[0].total_pages,
        "iterations": len(iterations), "rows_computed": rows, "ceiling_tokens_per_s": ceiling,
        "time_min": summary["time"], "time_max": summary["time"], "repeats": 1, "rate": arrival_rate(run.requests),
        results.SUSPECT: int(summary["tokens_per_s"] > 1.05 * ceiling),
    }  # fmt: skip


# --- afterwards ------------------------------------------------------------------------------------------------------
def compare_tokens(setup: Setup, runs: Sequence[Run], peer: HuggingFace | None = None) -> list[CheckFailed]:
    """Whatever the schedule, a request gives the same tokens: says so, or returns what failed, for `check` to raise
    when all is written. The peer's are held against the first run's.
    """
    failures = []
    try:
        _check_same_tokens(setup, runs)
        if peer is not None and peer.requests and runs:
            from common.equality import peer_sentence

            pairs = [(a, b) for a, b in zip(peer.requests, runs[0].requests) if b.token_times]  # none was refused
            prompts = [a.prompt_token_ids for a, _ in pairs]
            theirs, ours = ([r.output_token_ids for r in side] for side in zip(*pairs))
            print(peer_sentence(setup.model, prompts, theirs, ours, peer.policy.name))
    except CheckFailed as error:
        failures.append(error)
    return failures


def _check_same_tokens(setup: Setup, runs: Sequence[Run]) -> None:
    for run in runs[1:]:
        pairs = [(a, b) for a, b in zip(runs[0].requests, run.requests) if a.token_times]
        what = f"{run.policy.label} against {runs[0].policy.label}"
        prompts, expected, got = (
            [a.prompt_token_ids for a, _ in pairs],
            [a.output_token_ids for a, _ in pairs],
            [b.output_token_ids for _, b in pairs],
        )
        if setup.model is not None:
            from common.equality import require_equal

            print(require_equal(setup.model, prompts, expected, got, what))
        elif expected != got:
            raise CheckFailed(f"{what}: other tokens")


def say(*sentences: str) -> None:
    """A line each; what is empty has nothing to say."""
    for sentence in filter(None, sentences):
        print(sentence)


def say_refused(run: Run) -> None:
    refused = [r for r in run.requests if r.finish_reason == "refused"]
    for request in refused[:3]:
        print(f"request {request.request_id} refused: {request.refusal}")
    if len(refused) > 3:
        print(f"... and {len(refused) - 3} more refused")


def report(args: argparse.Namespace, setup: Setup, files: Files, runs: Sequence[Run], columns: Sequence[str]) -> None:
    """The table, the files, what was refused, the tokens: everything but what it means."""
    columns = [*columns, *(["engine"] if args.compare else [])]
    cli.print_table(files.summary.rows, [c for c in columns if any(row[c] is not None for row in files.summary.rows)])
    cli.print_written(*(file.path for file in files.all))
    if runs:
        say_refused(runs[-1])
        if args.dump_tokens:
            from common.scripts.text_run import dump_requests

            dump_requests(args.dump_tokens, runs[-1].requests)


def check(setup: Setup, files: Files, failures: Sequence[CheckFailed]) -> None:
    """What `compare_tokens` found, and no figure above the roofline of its own steps. Raises CheckFailed."""
    for failure in failures:
        raise failure
    for row in files.summary.rows:
        if row[results.SUSPECT]:
            ceiling = row["ceiling_tokens_per_s"]
            speed, roof = cli.format_value(row["tokens_per_s"]), cli.format_value(ceiling)
            what = f"{row['policy']}: {speed} tokens/s, the roofline allows {roof}"
            if setup.device_type == "cuda":
                raise CheckFailed(what)
            print(f"note: {what} (ceilings of a CPU wander)")

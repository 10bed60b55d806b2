"""What does a long prompt do to the requests that are running, and what helps?

With whole-prompt prefills a step takes as long as the prompts that enter in it, and everybody who decodes waits: a gap
between tokens. Chunked prefill (chunked_scheduler.py) computes at most --token-batch-size tokens in a step, decodes
first. Both serve the same requests with the same cap on running ones.

Then the budget is swept (--budgets). What it trades shows when requests do not queue, so they arrive as a Poisson
process at 70 % of the throughput just measured (or at --rate): small budgets give short gaps and late first tokens.

Writes results/chunked_{requests,iterations,slots,summary}.csv and chunked_iterations.png: every step's time, by what it
computed, and the gaps between tokens; chunked_budgets.{csv,png}: first tokens, gaps and throughput by budget. With
--load the chunked run once more, not all at once; with --scale chunked_scale.{csv,png}: throughput against requests in
flight and against context; with --trace FILE a timeline of one more run, and how busy the device was in it.

    python assignment4/Section1/chunked_main.py
    python assignment4/Section1/chunked_main.py --simulate h200:llama3-8b --req-batch-size 64 --scale
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assignment4.Section1.chunked_scheduler import Scheduler as ChunkedScheduler
from assignment4.Section1.continous_scheduler import Scheduler as ContinuousScheduler
from common import cli, results
from common.batching import experiment, peers, request_sets, scale
from common.batching.files import ITERATION_COLUMNS, REQUEST_COLUMNS, SUMMARY_COLUMNS, Files, Policy
from common.batching.setup import prepare
from common.errors import UserError

PRESETS = {
    "quick": {"req_batch_size": 3, "token_batch_size": 16, "budgets": [8, 32], "repeats": 1},
    "laptop": {"req_batch_size": 8, "token_batch_size": 64, "budgets": [32, 128, 256], "repeats": 1},
    "course": {"req_batch_size": 10, "token_batch_size": 512, "budgets": [2**e for e in range(5, 13)], "repeats": 1},
}
REQUESTS = "lognormal"
SET_SHAPES = {
    "quick": {"count": 6, "mean": 3.5, "max_output": 8},
    "laptop": {"count": 14, "mean": 4.7, "max_output": 48},
    "course": {"count": 100},
}
SWEEP_REQUESTS = 10_000  # more change no percentile, and a sweep is many runs
SWEEP_LOAD = 0.7  # of the throughput: near 1 everybody queues, far below nobody meets anybody
CONTINUOUS, CHUNKED = "continuous", "chunked"
BUDGET_KEY = ("policy", "token_budget", "rate")
BUDGET_COLUMNS = (*BUDGET_KEY, *(column for column in SUMMARY_COLUMNS if column not in BUDGET_KEY))
SHOWN_COLUMNS = (
    *("policy", "token_budget", "requests", "output_tokens", "time", "tokens_per_s", "ttft_p50_s", "ttft_p99_s"),
    *("tpot_p50_s", "itl_p50_s", "itl_p99_s", "max_itl_s", "goodput", "mean_running", "pages_peak", "preemptions"),
)


def main(args):
    experiment.check_options(args)
    if args.trace:
        cli.check_output_file(args.trace, "--trace")
        if args.simulate:
            raise UserError("--trace: a simulated machine runs no kernels; leave --simulate out")
    if not args.scale:
        cli.refuse_unused(args, ("batch_sizes", "kv_lens"), "a size of --scale; add --scale or leave it out")
    if args.scale and args.replicas != 1:
        raise UserError("--scale: counts the requests of one machine; leave --replicas out")
    sizes = {name: preset | (scale.PRESETS[name] if args.scale else {}) for name, preset in PRESETS.items()}
    setup = prepare(args, __file__, sizes)
    requests = experiment.read_requests(args, setup, REQUESTS, SET_SHAPES)
    points = scale.points(args, setup) if args.scale else []
    files = Files(setup.out, "chunked", setup.suffix, setup.facts, resume=args.resume, compare=bool(args.compare))
    budgets = result_file(args, setup, "budgets", BUDGET_COLUMNS, BUDGET_KEY)
    scaling = result_file(args, setup, "scale", scale.COLUMNS, scale.KEY)
    runs, failures, sentences = [], [], []
    with cli.keep_partial(args):
        measure(args, setup, requests, points, files, budgets, scaling, runs, failures, sentences)
    for file in (files, budgets, scaling):
        file.close()
    if not files.summary.rows:
        return
    experiment.report(args, setup, files, runs, SHOWN_COLUMNS)
    experiment.say(in_words(files.summary.rows), *sentences, peers.in_words(files.summary.rows, CHUNKED))
    show(args, files, budgets, scaling)
    experiment.check(setup, files, failures)


def measure(args, setup, requests, points, files, budgets, scaling, runs, failures, sentences):
    """All that is measured, into the files and the three lists, so that Ctrl-C keeps what there is."""
    whole, pieces = scheduler(CONTINUOUS, None, args.req_batch_size), chunked(args, args.token_batch_size)
    peer = peers.hugging_face(args, setup)
    runs += experiment.serve_all([whole, pieces], setup, requests, args, files, peer)
    if args.load:
        arriving_policy, timed = experiment.at_load(pieces, files.summary.rows, requests, args)
        runs += experiment.serve_all([arriving_policy], setup, timed, args, files)
        sentences.append(experiment.load_in_words(files.summary.rows, arriving_policy))
    failures += experiment.compare_tokens(setup, runs, peer)
    if args.trace:
        from common.batching.trace import trace

        serve = partial(experiment.serve, pieces, setup, requests, args)
        sentences.append(trace(args.trace, serve, setup.engines[0], setup.device_type))
        cli.print_written(args.trace)
    sweep = [whole, *(chunked(args, budget) for budget in args.budgets)]
    if len(requests) > SWEEP_REQUESTS:
        print(f"the sweep over budgets takes the first {SWEEP_REQUESTS:,} requests")
    some = requests[:SWEEP_REQUESTS]
    serve_arriving(sweep, setup, arriving(some, files.summary.rows, args), args, budgets)
    if points:
        measured = None if args.simulate else files.iterations.path
        scale.measure(args, setup, points, partial(scheduler, CHUNKED), scaling, measured)
    failures += peers.compare_vllm(args, setup, requests, files, peer, runs)


def show(args, files, budgets, scaling):
    """The sweeps' tables and what they mean; all pictures."""
    if budgets.rows:
        cli.print_table(budgets.rows, [c for c in BUDGET_KEY + SHOWN_COLUMNS[4:] if c != "preemptions"])
        cli.print_written(budgets.path)
        print(budgets_in_words(budgets.rows))
    if scaling.rows:
        cli.print_table(scaling.rows, [c for c in scale.COLUMNS if any(row[c] is not None for row in scaling.rows)])
        cli.print_written(scaling.path)
        print(scale.in_words(scaling.rows))
    if args.no_plot:
        return
    cli.print_written(draw_iterations(files.summary.path, files.requests.path, files.iterations.path))
    if budgets.rows:
        cli.print_written(draw_budgets(budgets.path))
    if scaling.rows:
        cli.print_written(scale.draw(scaling.path))


def result_file(args, setup, name, columns, key):
    return results.ResultFile(
        setup.out, f"chunked_{name}{setup.suffix}", columns, setup.facts, key=key, resume=args.resume
    )


def scheduler(policy, token_budget, req_batch_size):
    if token_budget is None:
        return Policy(policy, partial(ContinuousScheduler, req_batch_size=req_batch_size))
    make = partial(ChunkedScheduler, token_batch_size=token_budget, req_batch_size=req_batch_size)
    return Policy(policy, make, token_budget)


def chunked(args, budget):
    return scheduler(CHUNKED, budget, args.req_batch_size)


def arriving(requests, summary, args):
    """The same requests one after another. With --rate, or in a trace, they have their times already."""
    if any(r.arrival_time for r in requests):
        return requests
    row = next(r for r in summary if r["policy"] == CHUNKED)
    timed = [replace(r) for r in requests]
    request_sets.poisson_arrivals(timed, SWEEP_LOAD * row["requests"] / row["time"], seed=args.seed)
    return timed


def serve_arriving(policies, setup, requests, args, file):
    rate = experiment.arrival_rate(requests)
    for policy in policies:
        if not file.has(policy=policy.name, token_budget=policy.token_budget, rate=rate):
            runs = [experiment.serve(policy, setup, requests, args) for _ in range(args.repeats)]
            file.append(**experiment.median_run(runs).summary)


def in_words(rows):
    """What the summary means, for the policies that are in it."""
    by_name = {row["policy"]: row for row in rows}
    whole, ours = by_name.get(CONTINUOUS), by_name.get(CHUNKED)
    if not whole or not ours or not whole["itl_p99_s"]:
        return "both policies are needed to compare them."
    change = ours["time"] / whole["time"] - 1
    return (
        f"with a budget of {ours['token_budget']} tokens the largest gap between two tokens of a request was "
        f"{ours['max_itl_s']:.3g} s instead of {whole['max_itl_s']:.3g} s "
        f"({ours['max_itl_s'] / whole['max_itl_s']:.2f}x), the p99 gap {ours['itl_p99_s']:.3g} s instead of "
        f"{whole['itl_p99_s']:.3g} s ({ours['itl_p99_s'] / whole['itl_p99_s']:.2f}x), and all requests together took "
        f"{abs(change):.0%} {'longer' if change > 0 else 'less'}."
    )


def budgets_in_words(rows):
    chunked = sorted((r for r in rows if r["policy"] == CHUNKED), key=lambda r: r["token_budget"])
    if len(chunked) < 2 or not chunked[0]["itl_p99_s"]:
        return "two budgets are needed to compare them."
    small, large = chunked[0], chunked[-1]
    return (
        f"at {small['rate']:.3g} requests a second, going from a budget of {large['token_budget']} down to "
        f"{small['token_budget']} shortens the p99 gap between tokens from {large['itl_p99_s']:.3g} to "
        f"{small['itl_p99_s']:.3g} s and makes the median first token come after {small['ttft_p50_s']:.3g} s "
        f"instead of {large['ttft_p50_s']:.3g} s."
    )


# --- the figures, from the CSVs alone --------------------------------------------------------------------------------
KINDS = {"prefill": ("#D55E00", "^"), "mixed": ("#CC79A7", "s"), "decode": ("#0072B2", "o")}


def png_name(summary_csv, name):
    return summary_csv.with_name(summary_csv.name.replace("_summary", name)).with_suffix(".png")


def of_what(path, text=""):
    """What a title says in brackets."""
    facts = [*(["simulated"] if "_simulated" in path.name else []), *([text] if text else [])]
    return f" ({', '.join(facts)})" if facts else ""


def draw_iterations(summary_csv, requests_csv, iterations_csv):
    """Step times of both policies side by side, and the gaps between tokens below."""
    from common import plots

    summary = results.read_rows(summary_csv, SUMMARY_COLUMNS)
    wanted = shown_policies(summary)
    iterations = results.read_rows(iterations_csv, ITERATION_COLUMNS)
    requests = results.read_rows(requests_csv, REQUEST_COLUMNS)
    title = f"A long prompt, whole or in pieces: how long do the others wait?{of_what(summary_csv)}"
    fig, axes = plots.new_figure(title, panels=4)
    shown = [r for r in iterations if (r["policy"], r["token_budget"]) in wanted and r["replica"] == 0]
    scatters = axes[: len(wanted)]
    for key, ax in zip(wanted, scatters):
        draw_steps(ax, [r for r in shown if (r["policy"], r["token_budget"]) == key], key)
    plots.shared_y_axis(scatters, [r["time_us"] / 1e3 for r in shown])
    for ax in axes[len(wanted) : 2]:
        ax.remove()
    draw_largest_gaps(axes[2], requests, wanted)
    draw_gap_percentiles(axes[3], summary, wanted)
    return plots.save(fig, png_name(summary_csv, "_iterations"), plots.footer(summary_csv))


def shown_policies(summary):
    """Continuous, and the chunked run that was measured first: the one at --token-batch-size."""
    keys = [(row["policy"], row["token_budget"]) for row in summary]
    return [k for k in keys if k[0] == CONTINUOUS][:1] + [k for k in keys if k[0] == CHUNKED][:1]


def name(key):
    return key[0] if key[1] is None else f"{key[0]}, budget {key[1]}"


def draw_steps(ax, rows, key):
    for kind, (colour, marker) in KINDS.items():
        mine = [r for r in rows if r["kind"] == kind]
        ax.scatter(
            [r["iteration"] for r in mine],
            [r["time_us"] / 1e3 for r in mine],
            s=16,
            color=colour,
            marker=marker,
            linewidths=0,
            label=f"{kind} ({len(mine)})",
        )
    ax.set(xlabel="iteration", ylabel="time of the step, ms", title=name(key))


def draw_largest_gaps(ax, requests, wanted):
    """Share of the requests whose largest gap is at most so long."""
    from common.plots import COLOURS

    for i, key in enumerate(wanted):
        gaps = [r["max_itl_s"] for r in requests if (r["policy"], r["token_budget"]) == key]
        gaps = sorted(1e3 * gap for gap in gaps if gap is not None)
        shares = [100 * (n + 1) / len(gaps) for n in range(len(gaps))]
        ax.step([0, *gaps], [0, *shares], where="post", color=COLOURS[i], label=name(key))
    ax.set(xlabel="largest gap between two tokens of a request, ms", ylabel="requests, %", title="largest gaps")
    ax.set_ylim(0, 101)


def draw_gap_percentiles(ax, summary, wanted):
    from common.plots import COLOURS, log_axis

    columns = {"p50": "itl_p50_s", "p90": "itl_p90_s", "p99": "itl_p99_s", "largest": "max_itl_s"}
    for i, key in enumerate(wanted):
        row = next(r for r in summary if (r["policy"], r["token_budget"]) == key)
        values = [1e3 * (row[column] or 0) for column in columns.values()]
        xs = [x + 0.38 * (i - 0.5) for x in range(len(values))]
        ax.bar(xs, values, 0.36, color=COLOURS[i], label=name(key))
        for x, value in zip(xs, values):
            ax.annotate(
                f"{value:,.0f}" if value >= 100 else f"{value:.3g}", (x, value), ha="center", va="bottom", fontsize=10
            )
    ax.set_xticks(range(len(columns)), list(columns))
    ax.set(ylabel="gap between tokens, ms (log)", title="all gaps")
    log_axis(ax)
    ax.grid(axis="x", visible=False)


def draw_budgets(budgets_csv):
    """What the token budget trades: first tokens against later ones, and throughput."""
    from common import plots

    summary = results.read_rows(budgets_csv, BUDGET_COLUMNS)
    chunked = sorted((r for r in summary if r["policy"] == CHUNKED), key=lambda r: r["token_budget"])
    whole = next((r for r in summary if r["policy"] == CONTINUOUS), None)
    arrivals = f"requests arriving at {summary[0]['rate']:.3g} a second"
    title = f"What does the token budget trade?{of_what(budgets_csv, arrivals)}"
    fig, axes = plots.new_figure(title, panels=4)
    budgets = [r["token_budget"] for r in chunked]
    panels = (
        (axes[0], "first token (TTFT), s", ("ttft_p50_s", "ttft_p90_s"), 1),
        (axes[1], "gap between tokens (ITL), ms", ("itl_p50_s", "itl_p99_s"), 1e3),
    )
    for ax, label, columns, factor in panels:
        for column in columns:
            percentile = column.split("_")[1]
            values = [None if r[column] is None else factor * r[column] for r in chunked]
            plots.band(ax, budgets, values, None, None, percentile)
            if whole and whole[column] is not None:
                colour = ax.lines[-1].get_color()
                ax.axhline(factor * whole[column], color=colour, ls=":", label=f"{percentile}, whole prompts")
        plots.log2_axis(ax, budgets)
        plots.log_axis(ax)
        ax.set(xlabel="token budget", ylabel=f"{label} (log)")
    plots.band(axes[2], budgets, [r["tokens_per_s"] for r in chunked], None, None, "chunked")
    ceilings = [r["ceiling_tokens_per_s"] for r in chunked]
    style = {"linestyle": "--", "color": plots.CEILING_COLOUR, "marker": "_", "ms": 16, "mew": 2}  # or one is no line
    axes[2].plot(budgets, ceilings, label="roofline of the same steps", **style)
    if whole:
        axes[2].axhline(whole["tokens_per_s"], color=plots.COLOURS[0], ls=":", label="whole prompts")
    plots.log2_axis(axes[2], budgets)
    axes[2].set(xlabel="token budget", ylabel="output tokens/s", ylim=(0, None))
    draw_trade(axes[3], chunked, whole)
    return plots.save(fig, budgets_csv.with_suffix(".png"), plots.footer(budgets_csv))


def draw_trade(ax, chunked, whole):
    """First tokens against gaps: lower left is better on both."""
    from common.plots import COLOURS, log_axis

    rows = [r for r in chunked if r["itl_p99_s"] is not None]
    points = [(1e3 * r["itl_p99_s"], r["ttft_p50_s"]) for r in rows]
    ax.plot(*zip(*points), "o-", color=COLOURS[0], label="chunked, by budget")
    over_the_line = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    for point, budgets in apart(points, [str(r["token_budget"]) for r in rows]):
        ax.annotate(budgets, point, xytext=(4, 8), textcoords="offset points", fontsize=11, bbox=over_the_line)
    if whole and whole["itl_p99_s"] is not None:
        ax.plot(1e3 * whole["itl_p99_s"], whole["ttft_p50_s"], "X", ms=10, color=COLOURS[1], label="whole prompts")
    ax.set(xlabel="gap between tokens (ITL), p99, ms (log)", ylabel="first token (TTFT), p50, s (log)")
    ax.margins(0.15)
    log_axis(ax), log_axis(ax, "x")


def apart(points, texts, closer=1.06):
    """[(point, text)], where points that lie on one another (within 6 % in both directions) share one text."""
    groups = []
    for point, text in zip(points, texts):
        if groups and all(1 / closer < a / b < closer for a, b in zip(point, groups[-1][0])):
            groups[-1][1].append(text)
        else:
            groups.append((point, [text]))
    return [(point, ", ".join(near) if len(near) < 4 else f"{near[0]} to {near[-1]}") for point, near in groups]


if __name__ == "__main__":
    sweeps = {
        "--budgets": "token budgets to sweep",
        "--batch-sizes": "of --scale: requests in flight",
        "--kv-lens": "of --scale: tokens of context",
    }
    parser = cli.build_parser(__doc__, sweeps=sweeps, compare=("hf", "vllm"))
    experiment.add_options(parser, REQUESTS)
    parser.add_argument("--scale", action="store_true", help="sweep requests in flight and context too")
    parser.add_argument(
        "--trace",
        type=cli.a_path,
        metavar="FILE",
        help="write a timeline of one more run (JSON for ui.perfetto.dev)",
    )
    parser.add_argument(
        "--token-batch-size", type=experiment.at_least_one, metavar="N", help="tokens a step computes at most"
    )
    cli.run(main, parser)

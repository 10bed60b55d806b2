"""What is gained when a request may enter the batch as soon as another leaves it?

Three policies serve the same requests with the same number of slots: static batches whose finished rows go on computing
(naive), static batches whose finished rows are dropped, and continuous batching (continous_scheduler.py). The engine,
the weights and the tokens that come out are the same; only who is computed when differs. --policies takes some of them:
on a large set the naive ones need minutes.

Writes results/continous_{requests,iterations,slots,summary}.csv and continous_comparison.png: throughput beside what
the roofline allows for the steps of each policy, the distribution of latencies, and who holds which slot when.

    python assignment4/Section1/continous_main.py
    python assignment4/Section1/continous_main.py --simulate h200:llama3-8b --requests mix --req-batch-size 128
    python assignment4/Section1/continous_main.py --policies naive-dropped,continuous
    torchrun --nproc-per-node 2 assignment4/Section1/continous_main.py        each process serves a share of the
    requests
"""

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assignment4.Section1.continous_scheduler import NaiveScheduler, Scheduler
from common import cli, distributed, results
from common.batching import experiment, peers
from common.batching.files import SLOT_COLUMNS, SUMMARY_COLUMNS, Files, Policy
from common.batching.setup import prepare
from common.errors import UserError

PRESETS = {
    "quick": {"req_batch_size": 3, "repeats": 1},
    "laptop": {"req_batch_size": 10, "repeats": 1},
    "course": {"req_batch_size": 10, "repeats": 1},
}
REQUESTS = "handout"
SET_SHAPES = {"quick": {"count": 8, "max_output": 12}, "laptop": {"count": 30}, "course": {"count": 100}}
NAIVE, DROPPED, CONTINUOUS = "naive", "naive, rows dropped", "continuous"
POLICIES = {"naive": NAIVE, "naive-dropped": DROPPED, "continuous": CONTINUOUS}  # as typed; they run in this order
IDLE = {"facecolor": "#D9D9D9", "edgecolor": "#999999"}
SHOWN_COLUMNS = (
    *("policy", "requests", "output_tokens", "time", "tokens_per_s", "ttft_p50_s", "tpot_p50_s", "latency_p50_s"),
    *("latency_p99_s", "goodput", "mean_running", "pages_peak", "preemptions"),
)


def main(args):
    experiment.check_options(args)
    if args.load and "continuous" not in args.policies:
        raise UserError("--load: serves the continuous policy, which --policies leaves out; add it or leave --load out")
    if not distributed.is_rank():
        return run(args)
    with distributed.open_world(args) as world:  # torchrun: each rank serves a share on a model of its own
        run(args, world)


def run(args, world=None):
    setup = prepare(args, __file__, PRESETS, world)
    requests = experiment.read_requests(args, setup, REQUESTS, SET_SHAPES)
    slots = args.req_batch_size
    makers = {
        "naive": partial(NaiveScheduler, req_batch_size=slots, drop_finished=False),
        "naive-dropped": partial(NaiveScheduler, req_batch_size=slots, drop_finished=True),
        "continuous": partial(Scheduler, req_batch_size=slots),
    }
    policies = [Policy(POLICIES[name], makers[name]) for name in args.policies]
    record = setup.facts
    files = Files(setup.out, "continous", setup.suffix, record, resume=args.resume, compare=bool(args.compare))
    peer = peers.hugging_face(args, setup)
    runs, failures, at_load = [], [], ""
    # Several ranks cannot stop at different places and go on: there, Ctrl-C ends them all.
    with cli.keep_partial(args) if world is None else contextlib.nullcontext():
        runs += experiment.serve_all(policies, setup, requests, args, files, peer)
        if args.load:
            arriving, timed = experiment.at_load(policies[-1], files.summary.rows, requests, args)
            runs += experiment.serve_all([arriving], setup, timed, args, files)
            at_load = experiment.load_in_words(files.summary.rows, arriving)
        if setup.writes:
            failures += experiment.compare_tokens(setup, runs, peer)
        failures += peers.compare_vllm(args, setup, requests, files, peer, runs)
    files.close()
    if not files.summary.rows:
        return
    experiment.report(args, setup, files, runs, SHOWN_COLUMNS)
    experiment.say(in_words(files.summary.rows), at_load, peers.in_words(files.summary.rows, policies[-1].name))
    if not args.no_plot:
        cli.print_written(draw(files.summary.path, files.requests.path, files.slots.path))
    experiment.check(setup, files, failures)


def policy_names(text):
    """What --policies names, in the order in which they run; the first one's tokens are what the others' must be."""
    names = text.split(",") if text.strip() else []
    names = [name.strip() for name in names]
    known = ", ".join(POLICIES)
    if not names:
        raise argparse.ArgumentTypeError(f"no policy is named; take some of {known}")
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"{name!r} is no policy; take some of {known}")
        if names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name!r} is named twice")
    return [name for name in POLICIES if name in names]


def in_words(rows):
    """What the summary means: the last of the policies that are in it against those before it."""
    by_name = {row["policy"]: row for row in rows}
    *others, last = [by_name[name] for name in POLICIES.values() if name in by_name]
    sentences = [
        f"{last['policy']} served the {last['requests']} requests in {last['time']:.2f} s instead of "
        f"{before['time']:.2f} s ({before['policy']}): "
        f"{last['tokens_per_s'] / before['tokens_per_s']:.2f}x the throughput"
        for before in others
    ]
    if last["policy"] != NAIVE:  # whose rows are of ended requests too
        sentences.append(f"on average {last['mean_running']:.1f} requests were computed in a step")
    if before := by_name.get(NAIVE):
        wasted = 1 - before["output_tokens"] / before["rows_computed"]
        sentences.append(f"of the rows that naive computed, {wasted:.0%} belonged to requests that had ended")
    return "; ".join(sentences) + "."


# --- the figure, from the CSVs alone ---------------------------------------------------------------------------------
def draw(summary_csv, requests_csv, slots_csv):
    from common import plots

    summary = [row for row in results.read_rows(summary_csv, SUMMARY_COLUMNS) if not experiment.is_at_load(row)]
    requests = results.read_rows(requests_csv, ["policy", "latency_s"])
    holds = results.read_rows(slots_csv, SLOT_COLUMNS)
    simulated = " (simulated)" if "_simulated" in summary_csv.name else ""
    fig, axes = plots.new_figure(f"Who may enter the batch, and when?{simulated}", panels=4)
    bottom = axes[2].get_gridspec()[1, :]
    axes[2].remove(), axes[3].remove()
    colours = {row["policy"]: plots.COLOURS[i % len(plots.COLOURS)] for i, row in enumerate(summary)}
    draw_throughput(axes[0], summary, colours)
    draw_latency(axes[1], requests, colours)
    draw_timeline(fig.add_subplot(bottom), holds, list(colours))
    png = summary_csv.with_name(summary_csv.name.replace("_summary", "_comparison")).with_suffix(".png")
    return plots.save(fig, png, plots.footer(summary_csv))


def draw_throughput(ax, summary, colours):
    """Bars, each with the roofline of its own steps above it."""
    from common.plots import CEILING_COLOUR, number

    for i, row in enumerate(summary):
        ax.bar(i, row["tokens_per_s"], 0.6, color=colours[row["policy"]])
        ax.annotate(number(row["tokens_per_s"]), (i, row["tokens_per_s"]), ha="center", va="bottom")
        if row["ceiling_tokens_per_s"]:
            label = "roofline of the same steps" if i == 0 else None
            ceiling = row["ceiling_tokens_per_s"]
            ax.plot([i - 0.38, i + 0.38], [ceiling] * 2, "--", color=CEILING_COLOUR, label=label)
    ax.set_xticks(range(len(summary)), [row["policy"].replace(", ", ",\n") for row in summary])
    middle, half = (len(summary) - 1) / 2, max(len(summary), 3) / 2  # a single bar is not to fill the panel
    top = max(max(row["tokens_per_s"], row["ceiling_tokens_per_s"] or 0) for row in summary)
    ax.set(ylabel="output tokens/s", title="throughput", ylim=(0, 1.3 * top))
    ax.set_xlim(middle - half, middle + half)
    ax.grid(axis="x", visible=False)


def draw_latency(ax, requests, colours):
    """Share of the requests that have ended within a time after their arrival."""
    for policy, colour in colours.items():
        values = sorted(r["latency_s"] for r in requests if r["policy"] == policy and r["latency_s"] is not None)
        shares = [100 * (i + 1) / len(values) for i in range(len(values))]
        ax.step([0, *values], [0, *shares], where="post", color=colour, label=policy)
    ax.set(xlabel="latency: last token - arrival, seconds", ylabel="requests ended, %", title="latency", ylim=(0, 101))


def draw_timeline(ax, holds, policies):
    """A band of slots for each policy; colours tell neighbouring requests apart, grey is a slot that idles."""
    from matplotlib.patches import Patch

    from common.plots import COLOURS

    replicas = 1 + max(h["replica"] for h in holds)
    of_first = f" (the first of {replicas} replicas)" if replicas > 1 else ""
    holds = [h for h in holds if h["replica"] == 0]
    policies = [policy for policy in policies if any(h["policy"] == policy for h in holds)]  # a peer shows no slots
    slots = 1 + max(h["slot"] for h in holds)
    until = timeline_end(holds, slots)
    for band, policy in enumerate(policies):
        for h in holds:
            if h["policy"] != policy or h["start_s"] >= until:
                continue
            y = band * (slots + 1.5) + h["slot"]
            busy = min(h["finish_s"], until) - h["start_s"]
            ax.broken_barh([(h["start_s"], busy)], (y + 0.05, 0.9), color=COLOURS[h["request"] % 6])
            idle = min(h["release_s"], until) - h["finish_s"]
            if policy != CONTINUOUS and idle > 0:
                ax.broken_barh([(h["finish_s"], idle)], (y + 0.05, 0.9), **IDLE)
    middles = [band * (slots + 1.5) + slots / 2 for band in range(len(policies))]
    ax.set_yticks(middles, [policy.replace(", ", ",\n") for policy in policies])
    ax.invert_yaxis()
    ax.set(
        xlabel="seconds", xlim=(0, until), title=f"who holds which of the {slots} slots{of_first}: a colour a request"
    )
    if {NAIVE, DROPPED} & set(policies):
        # Below, beside the axis' name: of the slots none may be covered.
        idle = Patch(**IDLE, label="ended, but the slot is kept")
        ax.legend(handles=[idle], loc="upper right", bbox_to_anchor=(1, -0.07), borderaxespad=0)
    ax.grid(axis="y", visible=False)


def timeline_end(holds, slots):
    """The whole run, or as much of it as can be seen: about twelve requests a slot of the slowest policy."""
    end = max(h["release_s"] for h in holds)
    starts = sorted(h["start_s"] for h in holds)
    most = 12 * slots * len({h["policy"] for h in holds})
    return end if len(starts) <= most else starts[most]


if __name__ == "__main__":
    parser = cli.build_parser(__doc__, compare=("hf", "vllm"))
    experiment.add_options(parser, REQUESTS)
    parser.add_argument(
        "--policies",
        type=policy_names,
        default=list(POLICIES),
        metavar="NAMES",
        help=f"which to run, with commas between (default: {','.join(POLICIES)})",
    )
    cli.run(main, parser)

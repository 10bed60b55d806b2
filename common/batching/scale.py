"""How does throughput grow with the requests in flight, and what does a long context cost? Measured and simulated.

Two sweeps, every request of a point alike, all at once:

    in flight   --batch-sizes requests of a short prompt: the weights are read once a step for all of them
    context     a few requests of --kv-lens tokens each: each decode reads its own context, and nobody shares it

A point has the throughput of the whole run, of its decode steps alone (those with all requests in them) and of its
steps with pieces of prompts. The simulated curve is the same requests through the same scheduler on `common.simulate`,
whose fitted figures, the overheads of a step and of a request in it, come from another run: the one that the script
has measured before.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from common import cli, results
from common.batching import experiment, request_sets
from common.batching.files import Policy
from common.batching.setup import Setup
from common.batching.step_loop import Iteration
from common.errors import UserError
from common.pages import pages_for
from common.serving import InputRequest
from common.simulate import SimulatedEngine, StepModel, fit_overhead, read_measured

# scale_in_flight: requests of the context sweep. scale_budget: tokens a step computes at most: throughput, not latency,
# is asked for.
PRESETS = {
    "quick": {
        "batch_sizes": [1, 2, 4], "kv_lens": [32, 64],
        "scale_prompt": 8, "scale_output": 6, "scale_in_flight": 2, "scale_budget": 32,
    },
    "laptop": {
        "batch_sizes": [1, 2, 4, 8, 16], "kv_lens": [64, 256, 1024],
        "scale_prompt": 16, "scale_output": 16, "scale_in_flight": 2, "scale_budget": 256,
    },
    "course": {
        "batch_sizes": [1 << e for e in range(10)], "kv_lens": [1 << e for e in range(10, 16)],
        "scale_prompt": 128, "scale_output": 128, "scale_in_flight": 8, "scale_budget": 4096,
    },
}  # fmt: skip

KEY = ("sweep", "in_flight", "context")
RATES = ("tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s")
COLUMNS = (
    *(*KEY, "prompt_tokens", "output_tokens", "time", *RATES, "ceiling_tokens_per_s", "preemptions"),
    *(f"simulated_{name}" for name in RATES),
)


def points(args: argparse.Namespace, setup: Setup) -> list[tuple[str, int, int, int]]:
    """(sweep, requests in flight, prompt tokens, output tokens) of each point, as far as context and pool allow."""
    engine, prompt, output = setup.engines[0], args.scale_prompt, args.scale_output
    pages, page_size = engine.num_free_pages, engine.page_size
    most = pages // pages_for(prompt + output - 1, page_size)
    what = "requests that the pool of pages holds:"
    sizes = cli.clip_option(args, "batch_sizes", most, typed=setup.typed, what=what)
    context = min(engine.max_context, pages // args.scale_in_flight * page_size)
    what = "tokens that context and pool of pages hold:"
    lengths = cli.clip_option(args, "kv_lens", context, typed=setup.typed, what=what)
    shortest = min(lengths)
    if shortest <= output:
        raise UserError(f"--kv-lens: {shortest} tokens hold no prompt beside {output} output tokens; give longer ones")
    growing = [("in flight", size, prompt, output) for size in sizes]
    return growing + [("context", args.scale_in_flight, length - output, output) for length in lengths]


def measure(
    args: argparse.Namespace,
    setup: Setup,
    wanted: Sequence[tuple[str, int, int, int]],
    make_policy: Callable[[int, int], Policy],
    file: results.ResultFile,
    iterations_csv: Path | None,
) -> None:
    """Measure the points that are `wanted` and not in `file`. make_policy(token budget, requests at once);
    iterations_csv: the steps of a measured run, which the simulation's overhead is fitted to (None: nothing is
    simulated beside it).
    """
    model = setup.ceiling
    if iterations_csv is not None:
        model = fit_overhead(model, read_measured(iterations_csv))
        step_us, request_us = 1e6 * model.machine.overhead_s, 1e6 * model.machine.request_overhead_s
        print(
            f"--scale: simulated beside it, with {step_us:,.0f} us a step and {request_us:.3g} us a request in it "
            "besides the roofline"
        )
    for sweep, in_flight, prompt, output in wanted:
        keys = {"sweep": sweep, "in_flight": in_flight, "context": prompt + output}
        if file.has(**keys):
            continue
        given = alike(in_flight, prompt, output, setup.config.vocab_size, args.seed)
        # Twice the requests at least, so that those who decode leave room for prompts.
        policy = make_policy(max(args.token_batch_size, args.scale_budget, 2 * in_flight), in_flight)
        simulated = dict.fromkeys(f"simulated_{name}" for name in RATES)
        if iterations_csv is not None:
            there = _simulated(setup, model)
            simulated = {f"simulated_{name}": rate for name, rate in _rates(args, there, policy, given)[0].items()}
        rates, summary = _rates(args, setup, policy, given)
        sizes = {"prompt_tokens": in_flight * prompt, "output_tokens": in_flight * output}
        measured = {name: summary[name] for name in ("time", "ceiling_tokens_per_s", "preemptions")}
        file.append(**keys, **sizes, **measured, **rates, **simulated)


def alike(count: int, prompt: int, output: int, vocab_size: int, seed: int) -> list[InputRequest]:
    """`count` requests of one shape, each with ids of its own."""
    draw = random.Random(seed)
    return [
        InputRequest(prompt_token_ids=request_sets.random_prompt(draw, prompt, vocab_size), output_len=output)
        for _ in range(count)
    ]


def _simulated(setup: Setup, model: StepModel) -> Setup:
    real = setup.engines[0]
    engine = SimulatedEngine(model, num_pages=real.num_free_pages, page_size=real.page_size)
    return replace(setup, engines=[engine], model=None)


def _rates(
    args: argparse.Namespace, setup: Setup, policy: Policy, given: Sequence[InputRequest]
) -> tuple[dict[str, float | None], dict]:
    """RATES of the run of median time, and its summary."""
    repeats = args.repeats if setup.model is not None else 1
    run = experiment.median_run([experiment.serve(policy, setup, given, args) for _ in range(repeats)])
    return {"tokens_per_s": run.summary["tokens_per_s"], **step_rates(run.loops[0].iterations)}, run.summary


def step_rates(iterations: Sequence[Iteration]) -> dict[str, float | None]:
    """Decode tokens a second of the fullest steps of decodes alone, prompt tokens a second of the steps with prompts;
    None without such steps.
    """
    decodes = [it for it in iterations if it.work.kind == "decode"]
    fullest = max((it.running for it in decodes), default=0)
    decodes = [it for it in decodes if it.running == fullest]
    prompts = [it for it in iterations if it.work.prefill_tokens]

    def rate(tokens: int, steps: Sequence[Iteration]) -> float | None:
        seconds = sum(it.time_us for it in steps) / 1e6
        return tokens / seconds if seconds else None

    return {
        "decode_tokens_per_s": rate(sum(it.work.decode_tokens for it in decodes), decodes),
        "prefill_tokens_per_s": rate(sum(it.work.prefill_tokens for it in prompts), prompts),
    }


def in_words(rows: Sequence[dict]) -> str:
    """What the sweeps say."""
    texts = []
    growing = [r for r in rows if r["sweep"] == "in flight" and r["decode_tokens_per_s"]]
    if len(growing) > 1:
        first, last = growing[0], growing[-1]
        times = last["decode_tokens_per_s"] / first["decode_tokens_per_s"]
        texts.append(
            f"{last['in_flight']} requests in flight decode {cli.format_value(last['decode_tokens_per_s'])} tokens/s, "
            f"{times:.3g} times as many as {first['in_flight']}"
        )
    longer = [r for r in rows if r["sweep"] == "context" and r["decode_tokens_per_s"]]
    if len(longer) > 1:
        first, last = longer[0], longer[-1]
        share = last["decode_tokens_per_s"] / first["decode_tokens_per_s"]
        texts.append(
            f"with {last['context']} tokens of context {last['in_flight']} requests decode {share:.0%} of what they do "
            f"with {first['context']}"
        )
    return "; ".join(texts) + "." if texts else "two sizes of a sweep are needed to compare them."


# --- the figure, from the CSV alone ----------------------------------------------------------------------------------
PANELS = (  # sweep, x, what is drawn, title
    ("in flight", "in_flight", ("tokens_per_s", "decode_tokens_per_s"), "more requests in flight"),
    ("context", "context", ("decode_tokens_per_s",), "decoding with a longer context"),
    ("context", "context", ("prefill_tokens_per_s",), "reading longer prompts"),
)
NAMES = {"tokens_per_s": "whole run", "decode_tokens_per_s": "decode steps", "prefill_tokens_per_s": "prompt tokens"}


def draw(csv_path: Path) -> Path:
    """Throughput against requests in flight and against context, the simulated curves over it."""
    from common import plots

    rows = results.read_rows(csv_path, COLUMNS)
    only_simulated = "_simulated" in csv_path.name
    title = f"How does throughput scale?{' (simulated)' if only_simulated else ''}"
    panels = [panel for panel in PANELS if any(row["sweep"] == panel[0] for row in rows)]
    fig, axes = plots.new_figure(title, panels=len(panels))
    for ax, (sweep, x, names, panel_title) in zip(axes if len(panels) > 1 else [axes], panels):
        mine = sorted((row for row in rows if row["sweep"] == sweep), key=lambda row: row[x])
        xs = [row[x] for row in mine]
        for name in names:
            plots.band(ax, xs, [row[name] for row in mine], None, None, NAMES[name])
            simulated = [row[f"simulated_{name}"] for row in mine]
            if any(simulated):
                ax.plot(xs, simulated, ":", color=ax.lines[-1].get_color(), label=f"{NAMES[name]}, simulated")
        if sweep == "in flight":
            ceilings = [row["ceiling_tokens_per_s"] for row in mine]
            ax.plot(xs, ceilings, "--", color=plots.CEILING_COLOUR, label="roofline of the whole run")
        plots.log2_axis(ax, xs)
        plots.log_axis(ax) if sweep == "in flight" else ax.set_ylim(0, None)
        beside = "" if sweep == "in flight" else f", {mine[0]['in_flight']} in flight"
        xlabel = "requests in flight" if x == "in_flight" else "tokens of context"
        ax.set(xlabel=xlabel, title=f"{panel_title}{beside}")
        ax.set(ylabel="prompt tokens/s" if names == ("prefill_tokens_per_s",) else "output tokens/s")
    return plots.save(fig, csv_path.with_suffix(".png"), plots.footer(csv_path))

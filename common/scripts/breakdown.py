"""Where does the time of a step go? The decoder's own operations, one after the other, with the clock read in between.

The step is the same as `Llama.forward` computes, part by part: on a GPU an event stands between the parts (and the host
gets a head start, so that launching is not what is measured), on a CPU the clock is read. `whole step` is the step as
the engine runs it, timed in the running loop. `host gaps` is what that takes beyond the parts: launching, Python,
copies, the embedding. It may also take less: in a CUDA graph a kernel starts while the one before it ends, and what a
fused neighbour would do is not done twice; then there are no gaps, and the difference is what running as one saves.

Two parts are measured twice, alone and inside what they are fused into, and the first is taken out of the second: the
norms (inside qkv and gate_up) and rope+append (inside attention). Where a fused kernel gives them for less than they
cost alone, the product or the attention looks that much cheaper than it is; their sum is right.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from common import cli
from common.engine import Packed
from common.kernels.argmax import argmax
from common.kernels.linear import head_product, linear_add, norm_gate_up_silu, norm_linear
from common.kernels.rms_norm import rms_norm
from common.llama import Llama
from common.pages import pages_for
from common.results import ResultFile
from common.scripts.experiment import Experiment
from common.serving import Chunk, InputRequest, Request, Work
from common.step_cost import parts_seconds
from common.timing import summarise

NAME = "pipeline_breakdown"
COLUMNS = ("phase", "part", "time_us", "ceiling_us")
PARTS = ("qkv", "rope+append", "attention", "o_proj", "gate_up", "down", "norms", "head", "sampling")
GAPS, WHOLE = "host gaps", "whole step"
HEAD_START_CYCLES = 100_000_000  # some 50 ms: longer than it takes to launch a step kernel by kernel
LOOP_STEPS = 8


class Marks:
    """Seconds between marks, added up by name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def __call__(self, name: str) -> None:
        """What was done since the last mark was `name`."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def totals(self) -> dict[str, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        totals: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:]):
            seconds = before.elapsed_time(after) / 1e3 if self._device.type == "cuda" else after - before
            totals[name] = totals.get(name, 0.0) + seconds
        return totals


@torch.inference_mode()
def time_parts(model: Llama, packed: Packed) -> dict[str, float]:
    """Seconds of each of PARTS in one step. Storing the same K and V once more changes nothing."""
    mark = Marks(model.device)
    if model.device.type == "cuda":
        torch.cuda._sleep(HEAD_START_CYCLES)
    x, rows = model.embed(packed.tokens), packed.batch.last_tokens
    mark("start")
    for i, w in enumerate(model.layers):
        rms_norm(x, w.input_norm)
        mark("input norm alone")
        qkv = norm_linear(x, w.input_norm, w.qkv)
        mark("norm and qkv")
        copy = qkv.clone()  # rotating may be in place
        mark("copy")
        packed.attend.append(i, copy)
        mark("rope+append")
        a = packed.attend(i, qkv)
        mark("rope+append and attention")
        if i == len(model.layers) - 1:
            a, x = a[rows], x[rows]
            mark("rows")
        x = linear_add(a, w.o_proj, x)
        mark("o_proj")
        rms_norm(x, w.post_norm)
        mark("post norm alone")
        g = norm_gate_up_silu(x, w.post_norm, w.gate_up)
        mark("norm and gate_up")
        x = linear_add(g, w.down_proj, x)
        mark("down")
    hidden = rms_norm(x, model.norm)
    mark("final norm")
    logits = head_product(hidden, model.lm_head)
    mark("head")
    argmax(logits)
    mark("sampling")
    t = mark.totals()
    return {
        "qkv": max(t["norm and qkv"] - t["input norm alone"], 0.0),
        "rope+append": t["rope+append"],
        "attention": max(t["rope+append and attention"] - t["rope+append"], 0.0),
        "o_proj": t["o_proj"],
        "gate_up": max(t["norm and gate_up"] - t["post norm alone"], 0.0),
        "down": t["down"],
        "norms": t["input norm alone"] + t["post norm alone"] + t["final norm"],
        "head": t["head"],
        "sampling": t["sampling"],
    }


def measure(exp: Experiment, engine: Any) -> ResultFile:
    """A prefill (the longest of the sweep that one step computes) and a decode step (the decode sweep's batch)."""
    args, steps = exp.args, engine.steps
    most = min(engine.max_step_tokens, exp.model.config.max_position_embeddings - 1)
    most = min(most, steps.pool.capacity * steps.page_size)
    prompt = max((n for n in args.seq_lens if n <= most), default=most)
    context = args.input_length
    batch = min(args.decode_batch, steps.pool.capacity // pages_for(context + 2 * LOOP_STEPS, steps.page_size))
    phases = {f"prefill 1x{prompt}": (1, prompt, _prefill_step)}
    if batch:
        phases[f"decode {batch}x{context}"] = (batch, context, _decode_step)
    in_graph = steps.graphs is not None
    record = exp.provenance(backend=steps.backend.name, page_size=steps.page_size, decode_in_graph=in_graph)
    with ResultFile(exp.out, NAME, COLUMNS, record, key=("phase", "part"), resume=args.resume) as file:
        with cli.keep_partial(args):
            for phase, (size, length, step) in phases.items():
                if not file.has(phase=phase, part=WHOLE):
                    file.extend(_phase_rows(exp, steps, phase, size, length, step))
    return file


def _phase_rows(exp: Experiment, steps: Any, phase: str, batch: int, length: int, step: Any) -> list[dict[str, Any]]:
    prompts = [exp.tokenizer.prompt_of_length(length, 31 * row) for row in range(batch)]
    wall_s, parts, work = step(exp, steps, prompts)
    ceilings = parts_seconds(exp.model.config, exp.model.dtype.itemsize, work, exp.ceilings, exp.dtype_name)
    rows = [
        {"phase": phase, "part": name, "time_us": parts[name] * 1e6, "ceiling_us": ceilings[name] * 1e6}
        for name in PARTS
    ]
    gaps = max(wall_s - sum(parts.values()), 0.0)
    rows.append({"phase": phase, "part": GAPS, "time_us": gaps * 1e6, "ceiling_us": 0.0})
    bound = sum(row["ceiling_us"] for row in rows)
    return [*rows, {"phase": phase, "part": WHOLE, "time_us": wall_s * 1e6, "ceiling_us": bound}]


def _prefill_step(exp: Experiment, steps: Any, prompts: list[list[int]]) -> tuple[float, dict[str, float], Work]:
    """Seconds of the step as the loop runs it, seconds of its parts, and what it computes."""
    walls, parts, work, warmup = [], [], Work(), _warmup(exp)
    for _ in range(exp.args.repeats + warmup):
        requests = [Request(InputRequest("", 1, prompt), i) for i, prompt in enumerate(prompts)]
        with _released(steps, requests):
            start = time.perf_counter()
            steps.launch(chunks := [Chunk(r, 0, r.num_prefill) for r in requests]).tokens()
            walls.append(time.perf_counter() - start)
            work = Work.of(chunks)
        requests = [Request(InputRequest("", 1, prompt), i) for i, prompt in enumerate(prompts)]
        with _released(steps, requests):
            parts.append(time_parts(exp.model, steps.pack([Chunk(r, 0, r.num_prefill) for r in requests])))
    return summarise(walls[warmup:]).median_s, _medians(parts[warmup:]), work


def _warmup(exp: Experiment) -> int:
    """Parts that only a breakdown runs alone have kernels to compile on a GPU; on a CPU the sweeps have warmed up."""
    return int(exp.model.device.type == "cuda")


def _decode_step(exp: Experiment, steps: Any, prompts: list[list[int]]) -> tuple[float, dict[str, float], Work]:
    requests = [Request(InputRequest("", 2 * LOOP_STEPS, prompt), i) for i, prompt in enumerate(prompts)]
    with _released(steps, requests):
        for request in requests:  # one at a time: no step is larger than the longest prompt
            steps.launch([Chunk(request, 0, request.num_prefill)])
        in_flight, stamps = None, []
        for _ in range(LOOP_STEPS + 1):  # each launched before the one before it is read, as in the running loop
            step = steps.launch([Chunk(r, r.num_computed, 1) for r in requests])
            if in_flight:
                in_flight.tokens()
                stamps.append(time.perf_counter())
            in_flight = step
        in_flight.tokens()
        walls = [after - before for before, after in zip(stamps, stamps[1:])]
        chunks = [Chunk(r, r.num_computed, 1) for r in requests]
        work, packed = Work.of(chunks), steps.pack(chunks)
        parts = [time_parts(exp.model, packed) for _ in range(exp.args.repeats + _warmup(exp))]
    return summarise(walls).median_s, _medians(parts[_warmup(exp) :]), work


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: summarise([run[name] for run in runs]).median_s for name in PARTS}


class _released:
    """Whatever happens inside, the requests hold no pages afterwards."""

    def __init__(self, steps: Any, requests: Sequence[Request]) -> None:
        self._steps, self._requests = steps, requests

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._steps.model.device.type == "cuda":
            torch.cuda.synchronize()
        for request in self._requests:
            self._steps.release(request)


def conclusion(rows: Sequence[dict[str, Any]]) -> str:
    """Each phase's step beside its ceiling, its largest part, and what the step saves by running as one, in words."""
    texts = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        whole = next(row for row in rows if row["phase"] == phase and row["part"] == WHOLE)
        part = [row for row in rows if row["phase"] == phase and row["part"] != WHOLE]
        largest = max(part, key=lambda r: r["time_us"])
        apart = sum(row["time_us"] for row in part)
        whole_ms, ceiling, largest_ms, apart_ms, saved = (
            cli.format_value(us / 1e3)
            for us in (whole["time_us"], whole["ceiling_us"], largest["time_us"], apart, apart - whole["time_us"])
        )
        text = f"{phase}: {whole_ms} ms a step ({ceiling} ms at the ceilings), the largest part {largest['part']} with "
        text += f"{largest_ms} ms"
        if apart > whole["time_us"] * (1 + 1e-9):  # by more than rounding: sums and gaps are equal otherwise
            text += f"; one by one its parts take {apart_ms} ms, the step as one saves {saved} ms"
            text += f" ({1 - whole['time_us'] / apart:.0%})"
        texts.append(text)
    return ". ".join(texts) + "."

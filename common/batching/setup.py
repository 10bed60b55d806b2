"""The machine under the schedulers of one script: a real model and its engine, or simulated ones; what is known of it.

setup = prepare(args, __file__, PRESETS)
setup.engines, setup.config, setup.ceiling, setup.facts, ...
"""

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import cli, results, simulate
from common.batching import data_parallel
from common.batching.files import Run
from common.batching.step_loop import MAX_PROMPT_TOKENS
from common.config import SHAPES, ModelConfig
from common.distributed import World
from common.errors import UserError
from common.pages import check_page_size
from common.serving import StepEngine

MAX_SIMULATED_PAGES = 20_000_000  # of all replicas: the book of a page takes some 40 bytes


@dataclass
class Setup:
    """What the schedulers run on. `facts` go into the provenance, `suffix` into the names of the files."""

    out: Path
    engines: list[StepEngine]
    config: ModelConfig
    ceiling: simulate.StepModel
    facts: dict
    encode: Callable[[str], list[int]]
    dtype: str
    device_type: str
    eos_token_ids: tuple[int, ...] = ()
    suffix: str = ""
    typed: set[str] = field(default_factory=set)  # the sizes that the user gave
    model: object = None  # the real one, to judge tokens by and for --compare
    world: World | None = None  # the ranks of a data parallel run, each with an engine of its own

    @property
    def writes(self) -> bool:
        """Whether this process writes files: of several ranks the first one alone."""
        return self.world is None or self.world.is_first

    def free_memory(self, runs: Sequence[Run]) -> None:
        """Give back the model and the pages, so that a peer may have the device: nothing can be served afterwards.

        runs: what was served; their loops hold the engine too.
        """
        self.engines, self.model = [], None
        for loop in (loop for run in runs for loop in run.loops):
            loop.engine = None
        gc.collect()
        if self.device_type == "cuda":
            import torch

            torch.cuda.empty_cache()


def prepare(
    args: argparse.Namespace, script_file: str, presets: Mapping[str, Mapping], world: World | None = None
) -> Setup:
    """Everything before the first measurement: a Setup with the real engine, or with simulated ones.

    Presets give the sizes that were not typed; a simulation costs next to nothing and has the course's. world: the
    ranks among which the requests are shared, if this process is one of several.
    """
    if world is not None:
        data_parallel.check(args, world)
        args.device = str(world.device)
    if args.simulate:
        return _open_simulated(args, script_file, presets)
    if args.replicas != 1:
        raise UserError(f"--replicas {args.replicas} needs --simulate: one real machine serves as one replica")
    setup = _open_real(args, script_file, presets)
    setup.world = world
    if world is not None:
        setup.facts["world"] = world.size
    return setup


def _open_simulated(args: argparse.Namespace, script_file: str, presets: Mapping[str, Mapping]) -> Setup:
    machine, shape = simulate.parse(args.simulate)
    check_page_size(args.page_size)
    out = cli.output_dir(args, script_file)
    typed = cli.apply_preset(args, presets, "cuda")
    config = SHAPES[shape] if args.context is None else SHAPES[shape].with_context(args.context)
    model = simulate.StepModel(machine, config)
    pages = args.replicas * (args.kv_pages or model.num_pages(args.page_size))
    if pages > MAX_SIMULATED_PAGES:
        raise UserError(
            f"--replicas {args.replicas}: {pages:,} pages in all, {MAX_SIMULATED_PAGES:,} can be simulated; take fewer "
            "replicas or --kv-pages, or a larger --page-size"
        )
    engines: list[StepEngine] = [
        simulate.SimulatedEngine(model, num_pages=args.kv_pages, page_size=args.page_size) for _ in range(args.replicas)
    ]
    print(
        f"simulated: {shape} in {machine.dtype} on {machine.name} ({machine.memory_gb_per_s:,.0f} GB/s, "
        f"{machine.tflops:g} TFLOP/s, {machine.overhead_s * 1e6:,.0f} us a step), {args.replicas} of it, "
        f"{engines[0].num_free_pages:,} pages of {args.page_size} tokens"
    )
    # A long simulation makes millions of objects and no cycles: looking for those is a seventh of its time.
    gc.disable()
    facts = {
        "model": shape,
        "device": "cpu",
        "device_name": f"simulated: {machine.name} x{args.replicas}",
        "dtype": machine.dtype,
        "backend": "simulated",
        "shapes": config,
        "machine": machine,
        "page_size": args.page_size,
        "kv_pages": engines[0].num_free_pages,
    }
    return Setup(
        out=out,
        engines=engines,
        config=config,
        ceiling=model,
        facts=results.provenance(args, **facts),
        # Without a tokenizer only the length of a text matters: about four characters a token.
        encode=lambda text: [0] * max(1, len(text) // 4),
        dtype=machine.dtype,
        device_type="simulated",
        suffix="_simulated",
        typed=typed,
    )


def _open_real(args: argparse.Namespace, script_file: str, presets: Mapping[str, Mapping]) -> Setup:
    from common.engine import Engine
    from common.scripts.experiment import prepare as prepare_model

    ready = prepare_model(args, script_file, presets)
    running = largest(args, "req_batch_size", "batch_sizes")
    engine = Engine(
        ready.model,
        backend=args.backend,
        page_size=args.page_size,
        num_pages=args.kv_pages,
        kv_memory=args.kv_memory,
        max_requests=2 * running,  # those of a step, and those whose last token is still to be read
        max_step_tokens=max(MAX_PROMPT_TOKENS, largest(args, "token_batch_size", "budgets", "scale_budget")) + running,
    )
    captured = engine.capture_graphs(running)
    if captured:
        print(captured)
    engine.warm_up(running)
    print(engine.describe_pool())
    machine = simulate.machine_of(ready.ceilings, ready.dtype_name)
    facts = ready.provenance(backend=engine.backend.name, page_size=engine.page_size, kv_pages=engine.num_free_pages)
    return Setup(
        out=ready.out,
        engines=[engine],
        config=ready.model.config,
        ceiling=simulate.StepModel(machine, ready.model.config),
        facts=facts,
        encode=ready.tokenizer.chat,
        dtype=ready.dtype_name,
        device_type=ready.model.device.type,
        eos_token_ids=ready.tokenizer.eos_token_ids,
        typed=ready.typed,
        model=ready.model,
    )


def largest(args: argparse.Namespace, *names: str) -> int:
    """The largest of these sizes, as far as the script has them; 0 without any. A sweep counts by its largest."""
    found = [getattr(args, name, None) or 0 for name in names]
    return max(max(value) if isinstance(value, list) else value for value in found)

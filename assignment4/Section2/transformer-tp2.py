"""How much faster is a decode step on two devices, and what do the all-reduces cost?

Tensor parallelism: every rank holds a part of every weight matrix (whole KV groups of qkv, a part of gate_up's columns,
the matching columns of o_proj and down_proj, some vocabulary rows of the head) and reads only that part from the
checkpoint. Two products a layer leave partial sums, which an all-reduce adds up; the decoder is the same as on one
device. The rules are in common/tensor_parallel/sharding.py, the sums in common/tensor_parallel/collectives.py.

Method: started plainly it first runs transformer-w3l1.py (left out with --skip-reference), then itself as --world
processes through torch's launcher; `torchrun --nproc-per-node N` works too. In float32 the tokens must be those of one
device; in every dtype the logits must, as far as its rounding goes (common/tensor_parallel/check.py). The all-reduces
of a step are timed too; the ideal is the step on one device divided by N, plus them. On GPUs NCCL, or one of four
all-reduces over symmetric memory, chosen by a measurement at the start (--allreduce); on CPUs gloo. Output:
results/transformer_tp2.csv (world, batch_size, time_us, tokens_per_s, allreduce_share, memory_bytes and bytes_read of
the rank with the most, ...), .json, .png; also where a check fails, which ends with exit code 1. With --prompt it
answers instead.

    python assignment4/Section2/transformer-tp2.py
    torchrun --nproc-per-node 3 assignment4/Section2/transformer-tp2.py --prompt "What is the capital of France?"
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import cli

NAME = "transformer_tp2"
# Options that may differ from rank to rank: where and how results are shown, which is rank 0's business.
OWN_OPTIONS = {"out", "debug", "no_plot", "dump_tokens", "resume", "prompts"}


def main(args):
    from common import distributed

    if not distributed.is_rank():
        raise SystemExit(start(args))
    with distributed.open_world(args, world_size=args.world) as world:
        run(args, world)


def start(args):
    """Started plainly: the reference on one device, then this script as `--world` ranks. Returns the exit code."""
    import subprocess

    from common import distributed

    cli.output_dir(args, __file__)
    size, extra = args.world or 2, []
    if args.device == "auto" and distributed.visible_gpus() < size:
        print(f"fewer than {size} GPUs here: {size} processes on the CPU instead")
        args.device, extra = "cpu", ["--device", "cpu"]
    if cli.typed_prompts(args) is None and not args.skip_reference:
        script = Path(__file__).with_name("transformer-w3l1.py")
        print(f"[1/2] one device: {script.name}", flush=True)
        code = subprocess.run([sys.executable, str(script), *reference_options(args)], check=False).returncode
        if code:
            return code
        print(f"\n[2/2] {size} processes", flush=True)
    return distributed.launch(__file__, size, [*sys.argv[1:], *extra])


def reference_options(args):
    """The options that both scripts have, as they were typed."""
    names = ("model", "context", "device", "dtype", "preset", "out", "seed", "repeats", "warmup")
    options = []
    for name in (*names, "batch_sizes", "input_length", "output_lengths"):
        value = getattr(args, name)
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            options += [cli.option_name(name), text]
    return options + [f"--{name}" for name in ("resume", "debug") if getattr(args, name)]


def run(args, world):
    """What every rank does; rank 0 alone writes and prints."""
    from common import checkpoint
    from common.allreduce.timing import choose_algorithms
    from common.results import ResultFile
    from common.scripts import text_run
    from common.tensor_parallel import check, collectives
    from common.tensor_parallel import experiment as tp_experiment
    from common.tensor_parallel.sharding import shard_of

    options = {cli.option_name(n): v for n, v in vars(args).items() if n not in OWN_OPTIONS}
    world.require_same("option", options)
    out = cli.output_dir(args, __file__) if world.is_first else None
    prompts = world.broadcast(cli.typed_prompts(args) if world.is_first else None)
    args.dump_tokens = args.dump_tokens if world.is_first else None

    dtype = checkpoint.pick_dtype(args.dtype, world.device)
    ranks = collectives.make_tensor_parallel(world, dtype, args.allreduce)
    loaded = tp_experiment.prepare(
        args, out, world.device, world, tp=lambda config: shard_of(config, world.rank, world.size, ranks)
    )
    exp, config = loaded.exp, loaded.config
    parts = describe_ranks(world, config, exp.model)
    if prompts is not None:
        return text_run.answer(exp, prompts, max(args.output_lengths), tp_experiment.one_by_one(exp))

    n1, n2 = tp_experiment.n1_n2(exp)
    rows = [tp_experiment.rows_of(batch_size, world.device.type) for batch_size in args.batch_sizes]
    for line in choose_algorithms(ranks, world, rows, config.hidden_size, insist=args.allreduce == "symm"):
        print(line)
    record = loaded.provenance(prompt_length=args.input_length, n1=n1, n2=n2, world=world.size)
    reference = check.read_reference(out, record) if world.is_first else check.Reference()
    reference = check.share_reference(world, reference)
    logits = check.LogitCheck(world, reference.saved)
    columns = collective_columns(world, ranks, config, reference.step_us)
    parallel = tp_experiment.Parallel(world, lambda: ranks.spent_s, columns)
    file, tokens = None, {}
    if world.is_first:
        names, key = (*tp_experiment.COLUMNS, "one_device_us", "speed_up"), ["world", "batch_size"]
        file = ResultFile(out, NAME, names, record, key=key, resume=args.resume)
    with world.interrupts_at_once(args):
        tp_experiment.measure(loaded, file, tokens, logits.look, parallel)
    prompts_of = functools.partial(tp_experiment.prompts_of, exp)
    verdict = check.judge(exp.model, tokens, prompts_of, reference.tokens, logits.share())
    if world.is_first:
        file.close(ranks=parts, check=verdict)
        finish(exp, file, tokens, verdict)
    world.barrier()  # a rank that raised now would end rank 0 while it draws
    verdict.raise_problems()


def describe_ranks(world, config, model):
    """A table of what each rank holds and has read; the same list on every rank."""
    from common.tensor_parallel.sharding import shard_of

    parts = []
    for rank, bytes_read in enumerate(world.exchange(model.bytes_read)):
        shard = shard_of(config, rank, world.size)
        sizes = {name: len(getattr(shard, name)) for name in ("q_heads", "kv_heads", "ffn", "vocab")}
        parts.append({"rank": rank, **sizes, "bytes_read": bytes_read})
    cli.print_table(parts, list(parts[0]))
    return parts


def collective_columns(world, ranks, config, one_device_us):
    """The columns of a row that need the other ranks. Between CPU processes the all-reduces are timed inside the steps;
    inside a CUDA graph nobody can look, so there they are timed alone, in a graph of their own.
    """
    import torch

    from common.allreduce.timing import time_in_graph
    from common.tensor_parallel.experiment import rows_of

    def columns(batch_size, step_s, all_reduce_s):
        rows = rows_of(batch_size, world.device.type)
        x = torch.zeros(rows, config.hidden_size, dtype=ranks.dtype, device=world.device)
        if world.device.type == "cuda" and world.size > 1:
            each_s = time_in_graph(world, ranks.all_reduce, x, repeats=10).median_s
            all_reduce_s = 2 * config.num_hidden_layers * each_s
        one = one_device_us.get(batch_size)
        return {
            "allreduce_share": all_reduce_s / step_s,
            "allreduce_us": 1e6 * all_reduce_s,
            "allreduce": ranks.name_of(x),
            "one_device_us": one,
            "speed_up": one / (1e6 * step_s) if one else None,
        }

    return columns


def finish(exp, file, tokens, verdict):
    from common.tensor_parallel import experiment as tp_experiment

    if not file.rows:
        raise KeyboardInterrupt
    cli.print_table(file.rows, file.columns)
    if verdict.agreed:
        print(verdict)
    print(conclusion(file.rows, exp.model.device.type))
    tp_experiment.dump_tokens(exp, tokens)
    cli.print_written(file.path, file.json_path)
    if not exp.args.no_plot:
        from common.tensor_parallel.plot import draw

        cli.print_written(draw(exp.out))


def conclusion(rows, device_type):
    """What the rows say, in words."""
    row = min(rows, key=lambda row: row["batch_size"])  # --resume appends what was missing
    text = (
        f"on {row['world']} processes a step of batch {row['batch_size']} took {row['time_us'] / 1e3:.3g} ms; its "
        f"all-reduces take {row['allreduce_share']:.0%} of that"
    )
    if row["speed_up"]:
        ideal = row["one_device_us"] / row["world"] + row["allreduce_us"]
        text += (
            f". One device took {row['one_device_us'] / 1e3:.3g} ms: {row['speed_up']:.2f}x, where "
            f"{row['one_device_us'] / ideal:.2f}x would be ideal"
        )
    if device_type == "cpu":
        text += ". Processes on one CPU share its cores and its memory: what this shows is the mechanism, not a gain"
    return text + "."


if __name__ == "__main__":
    from common.distributed import add_options
    from common.tensor_parallel.options import SWEEPS

    parser = cli.build_parser(__doc__, sweeps=SWEEPS, text=True)
    add_options(parser)
    parser.add_argument("--allreduce", choices=("auto", "nccl", "symm"), default="auto", help="how GPUs sum")
    parser.add_argument("--skip-reference", action="store_true", help="do not run transformer-w3l1.py first")
    cli.run(main, parser)

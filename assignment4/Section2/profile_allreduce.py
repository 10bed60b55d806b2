"""What does an all-reduce cost, and on what does it depend: latency or bandwidth?

A tensor-parallel decoder sums its activations over the ranks twice a layer. A decode step's are kilobytes, where the
time is latency; a prefill's are megabytes, where it is bandwidth. t = alpha + bytes / beta says both.

Method: sizes 2^10 to 2^30 bytes (2^26 on a CPU), then the activations of Llama-3-8B by batch size (4,096 elements a
sequence). Every algorithm's sum is checked before it is timed. All ranks start together, a sample is many calls, and
the slowest rank counts; median, p10 and p90 over --repeats. NCCL launched call by call and in a CUDA graph; over
symmetric memory, in a graph, torch's one-shot and two-shot (backend symm) and our low_latency and push (backend triton:
common/tensor_parallel/push_all_reduce.py); gloo on CPUs. algbw = bytes / time; busbw = algbw * 2 (n - 1) / n, which
a link's speed bounds. Started plainly: a process for each visible GPU, or two on the CPU where there are fewer.
Output: results/profile_allreduce.csv (backend, algorithm, world, batch_size, bytes, time_us, time_us_p10, time_us_p90,
algbw_gb_per_s, busbw_gb_per_s; batch_size is empty for plain sizes), .json and .png.

    python assignment4/Section2/profile_allreduce.py
    torchrun --nproc-per-node 4 assignment4/Section2/profile_allreduce.py --device cpu --bytes 2^10..2^20
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import cli

NAME = "profile_allreduce"
COLUMNS = (
    "backend", "algorithm", "world", "batch_size", "bytes", "time_us", "time_us_p10", "time_us_p90", "algbw_gb_per_s",
    "busbw_gb_per_s",
)  # fmt: skip
HIDDEN_SIZE = 4096  # Llama-3-8B's
MAX_CPU_BYTES = 1 << 26
PRESETS = {
    "quick": {"bytes": [1 << e for e in range(10, 21, 2)], "batch_sizes": [1, 8], "repeats": 3},
    "laptop": {"bytes": [1 << e for e in range(10, 27)], "batch_sizes": [1 << e for e in range(7)], "repeats": 11},
    "course": {"bytes": [1 << e for e in range(10, 31)], "batch_sizes": [1 << e for e in range(9)], "repeats": 21},
}


def main(args):
    from common import distributed

    if not distributed.is_rank():
        raise SystemExit(start(args))
    with distributed.open_world(args, world_size=args.world) as world:
        profile(args, world)


def start(args):
    """Started plainly: one rank per visible GPU, or two on the CPU. Returns the exit code."""
    from common import distributed

    cli.output_dir(args, __file__)
    gpus = 0 if args.device == "cpu" else distributed.visible_gpus()
    size, extra = args.world or max(gpus, 2), []
    if args.device == "auto" and gpus < size:
        print(f"{gpus} GPU(s) here, {size} processes: profiling gloo between {size} CPU processes instead")
        extra = ["--device", "cpu"]
    return distributed.launch(__file__, size, [*sys.argv[1:], *extra])


def profile(args, world):
    """What every rank does; rank 0 alone writes and prints."""
    import torch

    from common import results
    from common.allreduce import profile as allreduce_profile

    options = {cli.option_name(n): v for n, v in vars(args).items() if n not in ("out", "debug", "no_plot")}
    world.require_same("option", options)
    typed = cli.apply_preset(args, PRESETS, world.device.type)
    if world.device.type == "cpu":
        what = "the largest size profiled between CPU processes:"
        args.bytes = cli.clip_option(args, "bytes", MAX_CPU_BYTES, typed=typed, what=what)
    dtype = getattr(torch, args.dtype) if args.dtype != "auto" else allreduce_profile.default_dtype(world.device)
    points = [(None, num_bytes) for num_bytes in args.bytes]
    points += [(batch_size, batch_size * HIDDEN_SIZE * dtype.itemsize) for batch_size in args.batch_sizes]
    points = allreduce_profile.points_that_fit(points, world, dtype)
    variants, skipped = allreduce_profile.make_variants(world, dtype, max(num_bytes for _, num_bytes in points))
    for line in skipped:
        print(line)
    file = None
    if world.is_first:
        out = cli.output_dir(args, __file__)
        facts = allreduce_profile.facts(world, dtype, skipped)
        record = results.provenance(args, dtype=args.dtype, world=world.size, **facts)
        key = ["backend", "algorithm", "batch_size", "bytes"]
        file = results.ResultFile(out, NAME, COLUMNS, record, key=key, resume=args.resume)
    with world.interrupts_at_once(args):
        for batch_size, num_bytes in points:
            for variant in variants:
                if world.stop_requested():
                    break
                measure(args, world, file, variant, batch_size, num_bytes, dtype)
    if world.is_first:
        file.close()
        finish(args, file)


def measure(args, world, file, variant, batch_size, num_bytes, dtype):
    """One point of one algorithm: checked, timed, written."""
    from common.allreduce.profile import check_sum

    key = {"backend": variant.backend, "algorithm": variant.algorithm, "batch_size": batch_size, "bytes": num_bytes}
    if not variant.takes(num_bytes) or world.broadcast(file is not None and file.has(**key)):
        return
    world.heartbeat.expect_within(120, f"{variant.algorithm} of {num_bytes} bytes")
    check_sum(world, variant, num_bytes, dtype)
    timing = variant.time(num_bytes, args.repeats)
    world.heartbeat.expect_within(None)
    algbw = num_bytes / timing.median_s / 1e9
    if file is not None:
        file.append(
            **key,
            world=world.size,
            time_us=1e6 * timing.median_s,
            time_us_p10=1e6 * timing.p10_s,
            time_us_p90=1e6 * timing.p90_s,
            algbw_gb_per_s=algbw,
            busbw_gb_per_s=algbw * 2 * (world.size - 1) / world.size,
        )


def finish(args, file):
    if not file.rows:
        raise KeyboardInterrupt
    cli.print_table(file.rows, file.columns)
    print(conclusion(file.rows))
    cli.print_written(file.path, file.json_path)
    if not args.no_plot:
        from common.allreduce.plot import draw

        cli.print_written(draw(file.path))


def conclusion(rows):
    """The fit of each algorithm, the size from which bandwidth counts more than latency, and who is fastest."""
    from common.allreduce.plot import fit, leaders_in_words, series

    parts = []
    for name, points in series(rows).items():
        fitted = fit(points)
        if fitted:
            alpha, beta = fitted
            parts.append(
                f"{name}: {cli.format_value(1e6 * alpha)} us + bytes / {beta / 1e9:.3g} GB/s; above "
                f"{alpha * beta / 1024:,.0f} KiB the bytes take longer than the latency"
            )
    leads = leaders_in_words(series(rows))
    parts += [f"fastest: {', '.join(leads)}"] if leads else []
    return "\n".join(parts) or "too few sizes for a fit of latency and bandwidth"


if __name__ == "__main__":
    from common.distributed import add_options

    sweeps = {"--bytes": "sizes in bytes", "--batch-sizes": "sequences in a step, 4,096 activations each"}
    parser = cli.build_parser(__doc__, sweeps=sweeps, model=False)
    add_options(parser)
    cli.run(main, parser)

"""How near do our kernels come to what the machine allows, and to what others offer?

Each kernel at Llama-3-8B's sizes, beside the peers that are installed (torch, torch.compile, FlashInfer, Liger) and,
for elementwise work, a copy of the same bytes. Every engine's output is compared with a float64 or float32 reference
before it is timed. A figure is the time of one call in a CUDA graph of at least 20 over distinct inputs and outputs, 4x
the L2 cache in all, the engines in turn; the time of a single launch stands in a column of its own. The share of the
ceiling: elementwise work against the measured copy, decode against the measured read, prefill against the measured
product.

Writes kernels.csv and kernels.json. Needs a CUDA device.

    python -m common.kernels.bench
    python -m common.kernels.bench --kernels rms_norm,silu_mul --repeats 20
"""

from __future__ import annotations

from dataclasses import asdict

from common import cli, results, timing
from common.errors import CheckFailed, UserError

COLUMNS = ("kernel", "shape", "engine", "time_us", "time_us_p10", "time_us_p90", "single_launch_us", "gb_per_s")
COLUMNS += ("tflops", "percent_of_ceiling", "error", "suspect")
TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}  # relative, of the whole output
SUSPECT_PERCENT = 105


def main(args) -> None:
    import torch

    typed = ["preset"] if args.preset != "auto" else []
    cli.refuse_unused(args, [*typed, "warmup", "no_plot"], "the bench has its own sizes and no picture; leave it out")
    if not torch.cuda.is_available() or args.device == "cpu":
        raise UserError("common.kernels.bench measures CUDA kernels: no CUDA device is visible (or --device cpu)")
    from common import roofline
    from common.kernels import bench_cases

    out = cli.output_dir(args, __file__)
    device = torch.device("cuda" if args.device == "auto" else args.device)
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    wanted = bench_cases.CASES if args.kernels is None else chosen(args.kernels, bench_cases.CASES)
    torch.manual_seed(args.seed)
    known = roofline.ceilings(device, dtype)
    record = results.provenance(args, device=str(device), dtype=str(dtype), ceilings=asdict(known))
    file = results.ResultFile(out, "kernels", COLUMNS, record, key=["kernel", "shape", "engine"], resume=args.resume)
    with cli.keep_partial(args), torch.inference_mode():
        for name in wanted:
            for case in bench_cases.CASES[name](device, dtype):
                if not all(file.has(kernel=case.kernel, shape=case.shape, engine=e) for e in case.engines):
                    file.extend(measure(case, known, dtype, args.repeats or 15))
    file.close()
    cli.print_table(file.rows, [c for c in COLUMNS if c != "suspect"])
    cli.print_written(file.path, file.json_path)
    roofline.report_suspects(file.rows, "cuda")


def chosen(text: str, known: dict) -> list[str]:
    """The names in a comma-separated list; UserError names the first that is unknown."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"--kernels {name}: unknown; there are {', '.join(known)}")
    if not names:
        raise UserError(f"--kernels is empty; there are {', '.join(known)}")
    return names


def measure(case, known, dtype, repeats: int) -> list[dict]:
    """The rows of one case: every engine checked, then all timed in turn."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    errors = checked(case, TOLERANCE[str(dtype).removeprefix("torch.")])
    engines = {name: case.engines[name] for name in errors}
    samples = {
        name: timing.graph_sample([lambda i=i, run=run: run(i) for i in range(case.copies)])
        for name, run in engines.items()
    }
    timed = timing.interleaved({name: replay for name, (replay, _) in samples.items()}, device=device, repeats=repeats)
    single = timing.interleaved({n: lambda run=run: run(0) for n, run in engines.items()}, device=device, repeats=20)
    rows = []
    for name, (_, count) in samples.items():
        time = timed[name]
        rate = case.amount / (time.median_s / count) / 1e9
        product = case.ceiling == "product"
        top = known.peak_tflops(dtype) * 1e3 if product else known.memory_gb_per_s(case.ceiling)
        rows.append({
            "kernel": case.kernel, "shape": case.shape, "engine": name,
            "time_us": round(time.median_s / count * 1e6, 3), "time_us_p10": round(time.p10_s / count * 1e6, 3),
            "time_us_p90": round(time.p90_s / count * 1e6, 3),
            "single_launch_us": round(single[name].median_s * 1e6, 2),
            "gb_per_s": None if product else round(rate, 1), "tflops": round(rate / 1e3, 1) if product else None,
            "percent_of_ceiling": round(100 * rate / top, 1), "error": errors[name],
            "suspect": 100 * rate / top > SUSPECT_PERCENT,
        })  # fmt: skip
        print(*(f"{k}={v}" for k, v in rows[-1].items() if k in COLUMNS[:4] + COLUMNS[6:10] and v is not None))
    return rows


def checked(case, limit: float) -> dict[str, float | None]:
    """The error of each engine that is within `limit`. CheckFailed if ours is not; a peer is left out, and said so."""
    want, errors = case.want(), {}
    for name, run in case.engines.items():
        try:
            error = relative_error(run(0), want)
            problem = f"differs from the reference by {error:.2g} (limit {limit:g})" if (error or 0) >= limit else None
        except Exception as failure:
            if name == "ours":
                raise
            error, problem = None, f"{type(failure).__name__}: {failure}"
        if problem is None:
            errors[name] = error
        elif name == "ours":
            raise CheckFailed(f"{case.kernel} {case.shape}: ours {problem}")
        else:
            print(f"left out: {case.kernel} {case.shape}: {name} {problem}")
    return errors


def relative_error(got, want) -> float | None:
    """||got - want|| / ||want||; infinity where anything is not finite; None for nothing to compare."""
    if got is None:
        return None
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    return error if error == error else float("inf")


def build_parser():
    parser = cli.build_parser(__doc__, model=False)
    parser.add_argument("--kernels", metavar="NAMES", help="comma-separated: which kernels (default: all)")
    return parser


if __name__ == "__main__":
    cli.run(main, build_parser())

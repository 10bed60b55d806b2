"""What does this machine allow? Its memory bandwidth and its matrix-product speed: the ceilings of every plot.

Method. Memory: a copy (bytes read + written) and a read-only pass over buffers of at least four times the last-level
cache; on a GPU with kernels of our own in a CUDA graph, on a CPU with several torch operations, of which the best
counts. Compute: matrix products of several sizes; the best of short runs (`burst`), then the best size run on for
seconds (`sustained`: under load a power limit lowers the clock).

Writes roofline.csv, roofline.json and roofline.png: attainable TFLOP/s against arithmetic intensity, and products by
size. A GPU's roof for decode is the read-only ceiling, for elementwise work the copy ceiling; a CPU's the larger.

    python -m common.roofline
    python -m common.roofline --device cpu --dtype float32 --out /tmp/roofline
"""

import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common import cli, machine, paths, results
from common.errors import CheckFailed, UserError

COLUMNS = ("kind", "name", "dtype", "m", "n", "k", "gb_per_s", "tflops")
MAX_AGE_S = 24 * 3600
SUSPECT_RATIO = 1.05  # a point above this share of its ceiling is measured again with it (see `gate`)
FORMAT = 1  # of the cached file
FULL_DTYPES = {"cuda": ("bfloat16", "float16", "float32"), "cpu": ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to allow. GB are 10^9 bytes, TFLOP 10^12 operations (a multiply-add is two)."""

    device_name: str
    device_type: str  # "cuda" or "cpu"
    copy_gb_per_s: float  # bytes read + written
    read_gb_per_s: float
    cache_bytes: int  # last-level cache: points whose bytes fit are labelled so and not gated
    tflops: dict[str, dict[str, float]] = field(default_factory=dict)  # dtype name -> {"burst": .., "sustained": ..}
    utc_time: str = ""

    def memory_gb_per_s(self, kind: str = "read") -> float:
        """Ceiling of "read" work (decode) or "copy" work (elementwise). On a CPU the larger of both is used for both:
        which of torch's operations reaches the real bandwidth there differs from machine to machine."""
        if kind not in ("read", "copy"):
            raise ValueError(f'memory ceiling {kind!r} is neither "read" nor "copy"')
        if self.device_type == "cpu":
            return max(self.read_gb_per_s, self.copy_gb_per_s)
        return self.read_gb_per_s if kind == "read" else self.copy_gb_per_s

    def peak_tflops(self, dtype: Any, kind: str = "burst") -> float:
        """The compute ceiling in a dtype (torch's or its name): "burst" or "sustained"."""
        return self.tflops[dtype_name(dtype)][kind]

    def fits_in_cache(self, num_bytes: float) -> bool:
        return num_bytes <= self.cache_bytes


def dtype_name(dtype: Any) -> str:
    """ "float32" for torch.float32 or "float32"."""
    return str(dtype).removeprefix("torch.")


# --- the ceilings that scripts use -----------------------------------------------------------------------------------
def ceilings(device: Any, dtype: Any, *, fresh: bool = False) -> Ceilings:
    """The ceilings of a device for one dtype: measured in some 5 s, or reused when measured here within a day.

    device: "cpu", "cuda", "cuda:1" or a torch.device. fresh: measure again whatever is cached.
    """
    device, wanted = _device(device), dtype_name(dtype)
    path = _cache_path(device)
    known = None if fresh else _load(path)
    if known is None or wanted not in known.tflops:
        print(f"measuring what {device} allows in {wanted} (kept for a day)", flush=True)
    if known is None:
        known = _measure(device, (wanted,), quick=True, record=_ignore)
    elif wanted not in known.tflops:
        tflops = known.tflops | _compute(device, (wanted,), quick=True, record=_ignore)
        known = replace(known, tflops=tflops)
    else:
        return known
    _store(path, known)
    return known


def gate(
    value: float,
    again: Callable[[], float],
    ceiling: Callable[[Ceilings], float],
    known: Ceilings,
    device: Any,
    dtype: Any,
) -> tuple[float, Ceilings, bool]:
    """Hold a measured figure against its ceiling. Returns (figure, ceilings, suspect).

    A figure above 105 % of the ceiling is measured again, together with the ceiling. If it is still above, it is
    `suspect`: the caller marks the row, and calls `report_suspects` when all rows are written.
    value: the figure (GB/s or TFLOP/s); `again` measures it once more. ceiling: picks its ceiling, as in `lambda c:
    c.memory_gb_per_s()`.
    """
    if value <= SUSPECT_RATIO * ceiling(known):
        return value, known, False
    known = _higher(known, ceilings(device, dtype, fresh=True))
    value = again()
    return value, known, value > SUSPECT_RATIO * ceiling(known)


def report_suspects(rows: Sequence[Mapping[str, Any]], device_type: str) -> None:
    """After the last row: CheckFailed on CUDA if any row is `suspect`; on a CPU a note, for its ceilings wander."""
    count = sum(bool(row.get(results.SUSPECT)) for row in rows)
    if not count:
        return
    message = f"{count} of {len(rows)} points stayed above 105 % of their ceiling, measured twice: column suspect"
    if device_type == "cuda":
        raise CheckFailed(message)
    print(f"note: {message}; on a CPU that others use, ceilings wander")


def _higher(a: Ceilings, b: Ceilings) -> Ceilings:
    """The higher of two measurements in each figure: a ceiling is what was reached, ever."""
    tflops = {dtype: dict(rates) for dtype, rates in a.tflops.items()}
    for dtype, rates in b.tflops.items():
        tflops[dtype] = {kind: max(rate, tflops.get(dtype, {}).get(kind, 0.0)) for kind, rate in rates.items()}
    return replace(
        b,
        copy_gb_per_s=max(a.copy_gb_per_s, b.copy_gb_per_s),
        read_gb_per_s=max(a.read_gb_per_s, b.read_gb_per_s),
        tflops=tflops,
    )


def _cache_path(device: Any) -> Path | None:
    """One file for each thing that would change the figures: host, card, libraries, threads, clocks' power limit."""
    facts = machine.machine_facts(str(device))
    key = [platform.node(), str(device), facts["cpu_model"], facts["device_name"], facts["cpu_cores"]]
    key += [facts.get("threads"), facts.get("power_limit_w"), machine.library_versions().get("torch"), FORMAT]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    try:
        return paths.cache_dir() / f"ceilings-{device.type}-{digest}.json"
    except UserError:  # no folder to write: that only costs the next script its seconds
        return None


def _load(path: Path | None) -> Ceilings | None:
    """What was measured here within the day, or None. Anything unreadable counts as nothing."""
    value = results.read_json(path) if path else None
    if value is None:
        return None
    try:
        age_s = time.time() - value.pop("unix_time")
        known = Ceilings(**value)
        rates = [known.copy_gb_per_s, known.read_gb_per_s, *(r for d in known.tflops.values() for r in d.values())]
        return known if 0 <= age_s < MAX_AGE_S and all(rate > 0 for rate in rates) else None
    except (KeyError, TypeError, AttributeError):
        return None


def _store(path: Path | None, known: Ceilings) -> None:
    """Keep them for a day, where there is a place to."""
    try:
        if path:
            results.write_json(path, asdict(known) | {"unix_time": time.time()})
    except OSError:
        pass


def _device(device: Any) -> Any:
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: no CUDA device is visible; use --device cpu")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


# --- measuring -------------------------------------------------------------------------------------------------------
def _ignore(**row: Any) -> None:
    pass


def _measure(device: Any, dtypes: tuple[str, ...], *, quick: bool, record: Callable[..., None]) -> Ceilings:
    """Everything. `record(**row)` is called for each thing measured, with the keys of COLUMNS that apply."""
    from common import roofline_measure as on

    memory: list[tuple[str, str, float]] = []

    def measure_memory(suffix: str = "") -> None:
        for kind, name, rate in on.memory(device, quick=quick):
            record(kind=kind, name=name + suffix, gb_per_s=rate)
            memory.append((kind, name, rate))

    measure_memory()
    tflops = _compute(device, dtypes, quick=quick, record=record)
    if device.type == "cpu":  # others use a CPU too: a second look, seconds later, finds what the first was denied
        measure_memory(", again")
    best = {kind: max(rate for k, _, rate in memory if k == kind) for kind in ("copy", "read")}
    return Ceilings(
        device_name=machine.machine_facts(str(device))["device_name"],
        device_type=device.type,
        copy_gb_per_s=best["copy"],
        read_gb_per_s=best["read"],
        cache_bytes=on.cache_bytes(device),
        tflops=tflops,
        utc_time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _compute(
    device: Any, dtypes: tuple[str, ...], *, quick: bool, record: Callable[..., None]
) -> dict[str, dict[str, float]]:
    from common import roofline_measure as on

    found = {}
    for dtype in dtypes:
        best, best_shape = 0.0, None
        for name, shape, rate in on.products(device, dtype, quick=quick):
            record(kind="product", name=name, dtype=dtype, **dict(zip("mnk", shape)), tflops=rate)
            if rate > best:
                best, best_shape = rate, (name, shape)
        assert best_shape is not None
        name, shape = best_shape
        sustained = on.sustained_product(device, dtype, name, shape, quick=quick)
        record(kind="sustained", name=name, dtype=dtype, **dict(zip("mnk", shape)), tflops=sustained)
        found[dtype] = {"burst": max(best, sustained), "sustained": sustained}
    on.release(device)
    return found


# --- the script ------------------------------------------------------------------------------------------------------
def main(args) -> None:
    out = cli.output_dir(args, __file__)
    device = _device(args.device if args.device != "auto" else _auto_device())
    dtypes = FULL_DTYPES[device.type] if args.dtype == "auto" else (args.dtype,)
    record = results.provenance(args, device=str(device), dtype=",".join(dtypes), backend="torch")
    file = results.ResultFile(out, "roofline", COLUMNS, record, key=["kind", "name", "dtype"])
    blank = dict.fromkeys(COLUMNS)
    found = None
    with cli.keep_partial(args):
        found = _measure(device, dtypes, quick=False, record=lambda **row: file.append(**(blank | row)))
        _store(_cache_path(device), found)
    file.close(**({"ceilings": asdict(found)} if found else {}))
    cli.print_table(file.rows, [c for c in COLUMNS if any(row[c] is not None for row in file.rows)])
    if file.rows:
        cli.print_written(file.path, file.json_path)
    if found is None:
        return
    if not args.no_plot:
        cli.print_written(draw(file.path))
    memory, dtype = found.memory_gb_per_s("read"), dtypes[0]
    peak = found.peak_tflops(dtype, "sustained")
    copy, read = cli.format_value(found.copy_gb_per_s), cli.format_value(found.read_gb_per_s)
    print(
        f"{found.device_name}: copy {copy} GB/s, read {read} GB/s, {dtype} "
        f"{found.peak_tflops(dtype):.4g} TFLOP/s in a burst and {peak:.4g} sustained. Work with fewer than "
        f"{peak * 1e3 / memory:.3g} operations for each byte it reads waits for memory."
    )


def _auto_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def draw(csv_path: Path) -> Path:
    """The roofline and the products by size, from the CSV alone."""
    from common import plots

    rows = results.read_rows(csv_path, COLUMNS)
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows if row["dtype"]))
    memory = {kind: max((r["gb_per_s"] for r in rows if r["kind"] == kind), default=None) for kind in ("read", "copy")}
    if not dtypes or None in memory.values():
        raise UserError(f"{csv_path}: no memory or product rows to draw; measure again")
    fig, (roof, by_size) = plots.new_figure("What does this machine allow?", panels=2)
    _draw_roof(roof, rows, dtypes, max(memory.values()))
    roof.set_title(f"roofline: memory {plots.number(memory['read'])} GB/s read, {plots.number(memory['copy'])} copied")
    _draw_products(by_size, rows, dtypes)
    by_size.set_title("square products by size")
    return plots.save(fig, csv_path.with_suffix(".png"), plots.footer(csv_path))


def _draw_roof(ax, rows: list[dict[str, Any]], dtypes: list[str], gb_per_s: float) -> None:
    """Attainable TFLOP/s = min(peak, intensity x bandwidth), one roof a dtype; the ridge is where they meet."""
    from common import plots

    peaks = {dtype: max(row["tflops"] for row in rows if row["dtype"] == dtype) for dtype in dtypes}
    intensities = [2.0**e for e in range(-2, 13)]
    for index, (dtype, peak) in enumerate(peaks.items()):
        ridge, colour = peak * 1e3 / gb_per_s, plots.COLOURS[index % len(plots.COLOURS)]
        xs = sorted([*intensities, ridge])
        ax.plot(
            xs,
            [min(peak, x * gb_per_s / 1e3) for x in xs],
            color=colour,
            label=f"{dtype}: {plots.number(peak, 3)} TFLOP/s",
        )
        ax.plot([ridge], [peak], "o", color=colour)
        ax.annotate(f"ridge {plots.number(ridge, 3)}", (ridge, peak), xytext=(8, -16), textcoords="offset points")
    plots.log2_axis(ax, intensities)
    plots.log_axis(ax)
    ax.set(xlabel="arithmetic intensity (FLOP per byte)", ylabel="attainable TFLOP/s")


def _draw_products(ax, rows: list[dict[str, Any]], dtypes: list[str]) -> None:
    """The better layout at each size, and the sustained rate."""
    from common import plots

    squares = [row for row in rows if row["kind"] == "product" and row["m"] == row["n"] == row["k"]]
    for index, dtype in enumerate(dtypes):
        colour = plots.COLOURS[index % len(plots.COLOURS)]
        sizes = sorted({row["m"] for row in squares if row["dtype"] == dtype})
        best = [max(r["tflops"] for r in squares if r["dtype"] == dtype and r["m"] == size) for size in sizes]
        plots.band(ax, sizes, best, None, None, f"{dtype}, short runs", color=colour)
        for row in rows:
            if row["kind"] == "sustained" and row["dtype"] == dtype:
                label = f"{dtype}, sustained: {plots.number(row['tflops'], 3)} TFLOP/s"
                ax.axhline(row["tflops"], color=colour, linestyle="--", linewidth=1.5, label=label)
    plots.log2_axis(ax, [row["m"] for row in squares])
    plots.log_axis(ax)
    ax.set(xlabel="n of an n x n by n x n product", ylabel="TFLOP/s")


if __name__ == "__main__":
    cli.run(main, cli.build_parser(__doc__, model=False))

"""Speed on a GPU: runs speed_worker.py in a process of its own, gives points, draws the figure."""

import json
import subprocess
import sys
from pathlib import Path

from common.errors import UserError
from common.grading import build
from common.grading.lab import Lab
from common.grading.outcome import Lesson, Outcome, Report, Speed

LIMIT_S = 300
SUSPECT_ABOVE = 1.05  # of the copy's speed


def copy_library(work: Path) -> Path | None:
    """The copy kernel as a shared library; None without nvcc."""
    if build.nvcc() is None:
        return None
    target = work / "copy.so"
    source = build.HARNESS / "copy_kernel.cu"
    command = [
        str(build.nvcc()),
        "-O3",
        "-arch=native",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-o",
        str(target),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"nvcc cannot build {source.name}: {done.stderr.splitlines()[0] if done.stderr else 'no message'}"
        )
    return target


def run_worker(lab: Lab, artefact: Path, work: Path) -> dict:
    """What speed_worker.py printed: seconds by name, bytes moved, device. UserError with its last line if it failed."""
    worker = Path(__file__).with_name("speed_worker.py")
    library = copy_library(work)
    command = [sys.executable, str(worker), lab.name, str(artefact), str(library or "-")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"timing {lab.name} did not end within {LIMIT_S} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"timing {lab.name} failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def as_speed(measured: dict) -> Speed:
    moved = measured["bytes"]
    own, copy = measured["own"], measured["copy"]
    return Speed(
        time_us=own * 1e6,
        gb_per_s=moved / own * 1e-9,
        copy_gb_per_s=moved / copy * 1e-9 if copy else 0.0,
        share=copy / own if copy else 0.0,
        device=measured["device"],
        peers={name: moved / t * 1e-9 for name, t in measured["peers"].items()},
    )


def measure_speed(lab: Lab, artefact: Path, report: Report, work: Path) -> None:
    """Adds speed, its points, and `correct but slow` or `suspect` to the report of a correct file."""
    try:
        measured = run_worker(lab, artefact, work)
    except UserError as error:
        report.notes.append(f"speed: not measured ({error})")
        return
    speed = report.speed = as_speed(measured)
    _, table = lab.points()
    if "full_us" in table:
        quality, slow = table["full_us"] / speed.time_us, speed.time_us > table["slow_us"]
        text = f"{speed.time_us:.0f} us: the course asks for {table['full_us']:g}"
    else:
        quality, slow = speed.share / table["full_share"], speed.share < table["slow_share"]
        text = f"{speed.share:.0%} of a copy of the same bytes: full points from {table['full_share']:.0%} on"
    report.points["speed"] = (table["points"] * min(1.0, quality), float(table["points"]))
    if speed.share > SUSPECT_ABOVE:
        report.outcome = Outcome.SUSPECT
        report.points["speed"] = (0.0, float(table["points"]))
        report.lesson = Lesson(
            "suspect", f"{speed.share:.0%} of a copy of the same bytes: faster than the memory allows"
        )
    elif slow:
        report.outcome, report.lesson = Outcome.CORRECT_BUT_SLOW, Lesson("slow", text)
    draw(lab, speed)
    report.notes.append(f"wrote {lab.folder / 'results' / 'speed.png'}")


def draw(lab: Lab, speed: Speed) -> None:
    """results/speed.png in the lab's folder: the file, the peers, and the copy as the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = {"yours": speed.gb_per_s} | speed.peers
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.5 * len(bars)))
    axes.barh(list(bars), list(bars.values()), color=["tab:blue", *["tab:grey"] * len(speed.peers)])
    if speed.copy_gb_per_s:
        axes.axvline(
            speed.copy_gb_per_s, color="tab:red", label=f"copy of the same bytes: {speed.copy_gb_per_s:,.0f} GB/s"
        )
        axes.legend(loc="lower right")
    axes.invert_yaxis()
    axes.set(xlabel="GB/s", title=lab.name)
    figure.text(0.01, 0.01, speed.device, fontsize=7)
    folder = lab.folder / "results"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "speed.png", dpi=150, bbox_inches="tight")
    plt.close(figure)

"""Speed on a GPU: runs speed_worker.py in a process of its own, gives points, draws the figure."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from common.errors import UserError
from common.grading import build, run
from common.grading.lab import Lab
from common.grading.outcome import Lesson, Outcome, Report, Speed

LIMIT_S, MEMORY_LIMIT_MB = 300, 32_000
SUSPECT_ABOVE = 1.05  # of the copy's speed
WORKER = Path(__file__).with_name("speed_worker.py")


def present(need_nvcc: bool = True) -> bool:
    """A GPU that programs may use, and nvcc. The driver's own tool tells, so that nothing heavy is imported."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):  # hidden on purpose
        return False
    if (need_nvcc and build.nvcc() is None) or shutil.which("nvidia-smi") is None:
        return False
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def run_worker(lab: Lab, files: dict[str, Path], work: Path, *, peers: bool = True) -> dict:
    """What speed_worker.py measured for `files` (name -> library, or Triton source). UserError if it failed twice:
    with CUDA graphs, and without (a file may end the program when its call cannot be captured)."""
    library = build.timing_library(work) if build.nvcc() and lab.name != "host_GPU" else None
    if library is None and lab.name != "host_GPU":
        raise UserError("the copy that speed is compared with needs nvcc, which is not on this machine")
    job = {"lab": lab.name, "files": {n: str(p) for n, p in files.items()}, "library": str(library), "peers": peers}
    try:
        return _run_once(job | {"graph": True}, work)
    except UserError:
        if lab.name == "host_GPU":
            raise
        return _run_once(job | {"graph": False}, work)


def _run_once(job: dict, work: Path) -> dict:
    job_file, result_file = work / "speed-job.json", work / "speed-result.json"
    job_file.write_text(json.dumps(job))
    result_file.unlink(missing_ok=True)
    with (work / "speed.log").open("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(job_file), str(result_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            start_new_session=True,
        )
        try:
            if stopped := run.wait_within(process, LIMIT_S, MEMORY_LIMIT_MB):
                raise UserError(f"timing {job['lab']}: {stopped} (limits: {LIMIT_S} s, {MEMORY_LIMIT_MB} MB)")
        finally:
            run.end_group(process)
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.strip()] or ["no message"]
    try:
        return json.loads(result_file.read_text())
    except (OSError, ValueError):
        raise UserError(f"timing {job['lab']} failed (exit code {process.returncode}): {lines[-1][:300]}") from None


def as_speed(measured: dict, name: str) -> Speed:
    """The figures of one file, beside the copy's and the peers'."""
    moved, rows = measured["bytes"], measured["rows"]
    speed = {n: moved / row["time_us"] * 1e-3 for n, row in rows.items()}
    copy = speed.get("copy", 0.0)
    return Speed(
        time_us=rows[name]["time_us"],
        gb_per_s=speed[name],
        copy_gb_per_s=copy,
        share=speed[name] / copy if copy else 0.0,
        device=measured["device"],
        form=rows[name]["form"],
        single_launch_us=rows[name]["single_launch_us"],
        peers={n: value for n, value in speed.items() if n not in (name, "copy")},
        left_out=measured["left_out"],
    )


def measure_speed(lab: Lab, artefact: Path, report: Report, work: Path) -> None:
    """Adds speed, its points, and `correct but slow`, `suspect` or `wrong` to the report of a correct file."""
    try:
        measured = run_worker(lab, {"yours": artefact}, work)
    except UserError as error:
        report.notes.append(f"speed: not measured ({error})")
        return
    _, table = lab.points()
    if wrong := measured["wrong"].get("yours"):
        report.outcome, report.lesson = Outcome.WRONG, Lesson("timed-calls-wrong", wrong)
        report.points["speed"] = (0.0, float(table["points"]))
        return
    speed = report.speed = as_speed(measured, "yours")
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
    target = draw(lab, speed)
    report.notes.append(f"wrote {target}" if target else "speed.png: the lab's folder cannot be written")


def draw(lab: Lab, speed: Speed) -> Path | None:
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
    target = lab.folder / "results" / "speed.png"
    try:
        target.parent.mkdir(exist_ok=True)
        figure.savefig(target, dpi=150, bbox_inches="tight")
    except OSError:
        return None
    finally:
        plt.close(figure)
    return target

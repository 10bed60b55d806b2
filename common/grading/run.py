"""Runs a built program on cases, in a process of its own with limits, and reads what happened.

A crash or an endless loop ends one case, not the grading: the program is started again from the next case.
"""

import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from common.grading.lab import Case, Lab

FILLS = {"nan": 0xFF, "large": 0x4B}  # bytes: 0xFFFFFFFF is a NaN, 0x4B4B4B4B is 13,323,083.0
CASE_LIMIT_S, HEAVY_LIMIT_S = 6, 20
GPU_LIMIT_S, GPU_HEAVY_LIMIT_S = 30, 60  # the largest cases move gigabytes through the host
MEMORY_LIMIT_MB, GPU_MEMORY_LIMIT_MB = 3000, 12_000
MOST_CRASHES = 4  # then the remaining cases count as failed without being run; an endless call counts twice


@dataclass(frozen=True)
class Schedule:
    """One way to run all cases: the order of threads and blocks, and what memory holds that was never written."""

    order: str = "ascending"
    fill: str = "nan"
    variant: str = "checked"
    seed: int = 0

    @property
    def name(self) -> str:
        return self.order if self.fill == "nan" else f"{self.order}, memory filled with {self.fill} values"


FIRST = Schedule()
SCHEDULES = (
    FIRST,
    Schedule(fill="large"),
    Schedule(order="descending"),
    Schedule(order="shuffled", seed=1),
    Schedule(order="interleaved", variant="interleaved", seed=2),
)
# On a GPU the order is the device's own, so the second run is a chance for another one.
GPU_SCHEDULES = (FIRST, Schedule(order="again"), Schedule(fill="large"))


@dataclass(frozen=True)
class Crash:
    """How a case ended early. `kind`: a finding of the emulation, `asan-…`, `misaligned`, `timeout`, `signal-…`."""

    kind: str
    text: str


@dataclass
class CaseRun:
    """One case under one schedule."""

    output: np.ndarray | None = None
    crash: Crash | None = None
    findings: list[tuple[str, str]] = field(default_factory=list)  # (kind, text): launch errors, changed inputs, leaks
    buffers: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> address, bytes
    work: int = 0  # launches and copies; 0: the function did nothing, or ran on a GPU, where nobody counts
    launches: int = 0  # in the emulation
    ran: bool = False


def write_jobs(lab: Lab, cases: Sequence[Case], inputs: Sequence[Sequence[np.ndarray]], work: Path) -> None:
    """Input files for all cases, once for all schedules."""
    folder = work / "inputs"
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    for number, arrays in enumerate(inputs):
        with (folder / f"{number}.in").open("wb") as file:
            for array in arrays:
                file.write(np.ascontiguousarray(array, dtype=np.float32).tobytes())


def _limit_resources(limit_address_space: bool) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    if limit_address_space:
        limit = (MEMORY_LIMIT_MB + 2000) << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# Programs under AddressSanitizer, and those that use a GPU, reserve terabytes of address space: for them it is the
# memory in use that counts.
def memory_in_use_mb(pid: int) -> float:
    """Of a process, without what it maps from files; 0 where the system does not say (macOS)."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(fields.get("RssAnon", fields.get("VmRSS", "0")).split()[0]) / 1024
    except (OSError, ValueError):
        return 0.0


def wait_within(process: subprocess.Popen, seconds: float, memory_mb: float) -> str | None:
    """Waits for the program's end. None, or what it ran into, still running: `timeout` or `out-of-memory`."""
    end, pause = time.monotonic() + seconds, 0.002
    while True:
        try:
            process.wait(timeout=pause)
            return None
        except subprocess.TimeoutExpired:
            pause = min(0.05, 2 * pause)
        if time.monotonic() > end:
            return "timeout"
        if memory_in_use_mb(process.pid) > memory_mb:
            return "out-of-memory"


def end_group(process: subprocess.Popen) -> None:
    """Ends the program and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


_KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR", "CC")
_KEPT_PREFIXES = ("CUDA_", "NVIDIA_", "TRITON_")


def environment(schedule: Schedule, progress: Path) -> dict[str, str]:
    asan = f"detect_leaks=0:detect_stack_use_after_return=0:exitcode=99:hard_rss_limit_mb={MEMORY_LIMIT_MB}"
    kept = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
    kept.pop("TRITON_INTERPRET", None)  # the Triton grader decides
    return kept | {
        "TLAB_PROGRESS": str(progress),
        "EMU_ORDER": schedule.order,
        "EMU_SEED": str(schedule.seed),
        "EMU_FILL": str(FILLS[schedule.fill]),
        "ASAN_OPTIONS": asan,
    }


def run_cases(
    command: Sequence[str | Path],
    cases: Sequence[Case],
    schedule: Schedule,
    work: Path,
    chosen: Sequence[int] | None = None,
    *,
    gpu: bool = False,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> list[CaseRun]:
    """The cases (or those with the numbers `chosen`) under one schedule. Inputs are those of `write_jobs`.

    gpu: limits are a GPU program's. variables: of the program's environment, beside those of `environment`.
    """
    name = f"{schedule.order}-{schedule.fill}"
    outputs = work / name
    outputs.mkdir(exist_ok=True)
    runs = [CaseRun() for _ in cases]
    pending = list(range(len(cases))) if chosen is None else list(chosen)
    crashes = 0
    while pending and crashes < MOST_CRASHES:
        last = _run_once(command, cases, pending, schedule, work, outputs, runs, gpu, variables)
        if last is None:
            break
        crash = runs[last].crash
        crashes += 2 if crash and crash.kind == "timeout" else 1
        pending = [i for i in pending if i > last]
    return runs


def limit_s(case: Case, gpu: bool) -> int:
    usual, heavy = (GPU_LIMIT_S, GPU_HEAVY_LIMIT_S) if gpu else (CASE_LIMIT_S, HEAVY_LIMIT_S)
    return heavy if case.is_large else usual


def job_lines(cases: Sequence[Case], chosen: Sequence[int], gpu: bool) -> str:
    """The job file of harness.h: a line a case."""
    lines = []
    for i in chosen:
        case, sizes = cases[i], list(cases[i].sizes.values())
        numbers = " ".join(map(str, sizes))
        lines.append(f"{i} {case.calls} {limit_s(case, gpu)} {case.epsilon!r} {len(sizes)} {numbers}\n")
    return "".join(lines)


def _run_once(command, cases, pending, schedule, work, outputs, runs, gpu, variables) -> int | None:
    """One start of the program. Returns the case that it died in, or None when it did all."""
    jobs, progress, log = outputs / "jobs", outputs / "progress", outputs / "log"
    jobs.write_text(job_lines(cases, pending, gpu))
    progress.write_text("")
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*map(str, command), str(jobs), str(work / "inputs"), str(outputs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**environment(schedule, progress), **variables},
            cwd=outputs,
            preexec_fn=lambda: _limit_resources(not gpu and schedule.variant != "checked"),
        )
        # The program's own alarm ends a case; this limit also holds when the learner's code turns the alarm off.
        longest = max(limit_s(cases[i], gpu) for i in pending)
        try:
            stopped = wait_within(
                process, 2 * longest + 3 * len(pending), GPU_MEMORY_LIMIT_MB if gpu else MEMORY_LIMIT_MB
            )
        finally:
            end_group(process)
    current = _read_progress(progress, runs)
    for i in pending:
        path = outputs / f"{i}.out"
        if runs[i].ran and path.exists():
            runs[i].output = np.fromfile(path, dtype=np.float32)
            path.unlink()
    if current is None and process.returncode == 0:
        return None
    if current is None:
        current = pending[0]
    runs[current].crash = _crash(process.returncode, stopped, log, runs[current], limit_s(cases[current], gpu), gpu)
    return current


def _read_progress(path: Path, runs: list[CaseRun]) -> int | None:
    """Fills `runs`; returns the case that began and did not end."""
    current = None
    for line in path.read_text(errors="replace").splitlines():
        word, _, rest = line.partition(" ")
        if word == "begin":
            current = int(rest)
            runs[current] = replace(runs[current], ran=False)
        elif word == "end" and current is not None:
            runs[current].ran = True
            current = None
        elif current is not None and word == "work":
            runs[current].work += int(rest)
        elif current is not None and word == "launches":
            runs[current].launches += int(rest)
        elif current is not None and word == "finding":
            kind, _, text = rest.partition(" ")
            if kind == "buffer":
                buffer, address, size = text.split()
                runs[current].buffers[buffer] = (int(address, 16), int(size))
            elif (kind, text) not in runs[current].findings and len(runs[current].findings) < 20:
                runs[current].findings.append((kind, text))
    return current


_FRAME = re.compile(r"#\d+ 0x[0-9a-f]+ in (?P<function>.+?) (?P<file>[^ ]+\.cu):(?P<line>\d+)")
_REGION = re.compile(
    r"is located (?P<by>\d+) bytes (?P<side>to the right of|after|to the left of|before|inside of)"
    r" (?P<size>\d+)-byte region \[0x(?P<start>[0-9a-f]+)"
)
_FATAL = (
    "divergent-barrier",
    "warp-hang",
    "shuffle-mask",
    "grid-sync-without-cooperative-launch",
    "device-code-on-host",
    "kernel-arguments",
    "host-pointer",
    "caller-memory",
    "out-of-memory",
    "blocked",
    "launch-error",
    # What the harness makes of an error code, on a GPU
    "launch-shape",
    "cooperative-too-large",
    "out-of-bounds",
    "misaligned",
    "kernel-trap",
)


def _crash(code: int, stopped: str | None, log: Path, run: CaseRun, limit: int, gpu: bool) -> Crash:
    text = log.read_text(errors="replace")[:200_000]
    fatal = [(kind, detail) for kind, detail in run.findings if kind in _FATAL]
    most_mb = GPU_MEMORY_LIMIT_MB if gpu else MEMORY_LIMIT_MB
    if code in (77, 78) and fatal:
        return Crash(*fatal[-1])
    if stopped == "out-of-memory":
        return Crash("out-of-memory", f"the call needs more than {most_mb} MB")
    if stopped or code == -signal.SIGALRM:
        return Crash("timeout", f"the call did not end within {limit} s")
    if match := re.search(r"([^\s/]+\.cu):(\d+):\d+: runtime error: (.*misaligned address.*)", text):
        if re.search(r"0x(fefe|aaaa)", match[3]):  # what a variable holds that nobody set (build.py)
            return Crash("unset-pointer", f"line {match[2]}")
        what = re.sub(r" 0x[0-9a-f]+", "", match[3])
        return Crash("misaligned", f"line {match[2]}: {what}")
    if match := re.search(r"ERROR: AddressSanitizer:? ([\w-]+)", text):
        return _asan_crash(match[1], text, run)
    if "hard rss limit exhausted" in text:
        return Crash("out-of-memory", f"the call needs more than {most_mb} MB")
    if code < 0:
        return Crash(f"signal-{signal.Signals(-code).name}", f"the program was ended by {signal.Signals(-code).name}")
    return Crash("exit", f"the program ended itself with exit code {code} inside the call")


def _asan_crash(kind: str, text: str, run: CaseRun) -> Crash:
    frame = _FRAME.search(text)
    where = f"line {frame['line']}: " if frame else ""
    access = re.search(r"(READ|WRITE) of size (\d+)", text)
    verb = {"READ": "reads", "WRITE": "writes"}[access[1]] if access else "accesses"
    region = _REGION.search(text)
    if kind == "use-after-poison" and "is located" in text and region and region["side"] == "inside of":
        if "fiber_main" in text:
            return Crash("asan-device-touches-host", f"{where}a kernel {verb} memory of malloc, new or a vector")
        return Crash("asan-host-touches-device", f"{where}host code {verb} device memory through its pointer")
    if region is None:
        return Crash(f"asan-{kind}", f"{where}{verb} memory that is not there ({kind})")
    start, size = int(region["start"], 16), int(region["size"])
    allocated = text.split("allocated by")[-1]
    if "dynamic_shared_memory" in allocated or "fill_block" in allocated:
        have = 0 if "dynamic_shared_memory" in allocated else size
        return Crash("asan-dynamic-shared", f"{where}{verb} past its end; the launch asks for {have} bytes")
    names = [n for n, (address, _) in run.buffers.items() if address == start]
    what = f"`{names[0]}`" if names else "shared memory" if "shared_memory" in allocated else "an allocation"
    if "Launch" not in text and "launch" not in text and "fiber_main" not in text:
        verb = "(host code) " + verb
    side = "before the start" if region["side"] in ("to the left of", "before") else "past the end"
    distance = "directly next to it" if region["by"] == "0" else f"{region['by']} bytes away"
    return Crash("asan-out-of-bounds", f"{where}{verb} {side} of {what} ({size} bytes long; {distance})")

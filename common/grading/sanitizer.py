"""NVIDIA's compute-sanitizer over a program built for the GPU: memory errors and races in shared memory, by case.

It is part of the CUDA toolkit. Where it is missing, or does not run (some virtual machines hide what it needs), the
grader says so and goes on.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from common.grading.run import GPU_MEMORY_LIMIT_MB, end_group, wait_within

LIMIT_S = 90  # a tool
TOOLS = ("memcheck", "racecheck")

# What a report's headline means: a kind of lessons.FINDINGS.
_HEADLINES = (
    (re.compile(r"Invalid __(?:global|shared|local)__ .*"), "out-of-bounds"),
    (re.compile(r"Misaligned .*"), "misaligned"),
    (re.compile(r"Error: (?:Potential )?.*hazard detected.*|Error: Race reported.*"), "race-hazard"),
)
_PLACE = re.compile(r"in (?:.*/)?([^/\s:]+\.cuh?):(\d+)|([^/\s:()]+\.cuh?):(\d+)")


def find() -> str | None:
    """compute-sanitizer on the PATH or beside nvcc."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def run(tool: str, command: list[str], environment: dict[str, str], folder: Path) -> str | None:
    """What the tool printed, the program's own `case N` lines in between; None when it did not end in time."""
    log = folder / f"{tool}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(find()), "--tool", tool, "--print-limit", "20", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        try:
            if wait_within(process, LIMIT_S, GPU_MEMORY_LIMIT_MB):
                return None
        finally:
            end_group(process)
    return log.read_text(errors="replace")


def usable(text: str) -> bool:
    """Whether the tool itself worked: it ends with a summary, and did not refuse the device."""
    return "ERROR SUMMARY" in text or "RACECHECK SUMMARY" in text


def parse(text: str) -> list[tuple[int, str, str]]:
    """(case number, kind, text) of each report, in order; one of a kind a case."""
    found: list[tuple[int, str, str]] = []
    case, open_report = 0, None
    for line in text.splitlines():
        if match := re.fullmatch(r"case (\d+)", line.strip()):
            case, open_report = int(match[1]), None
            continue
        if not line.startswith("========="):
            continue
        body = line.removeprefix("=========").strip()
        for pattern, kind in _HEADLINES:
            if pattern.fullmatch(body):
                place = _PLACE.search(body)
                open_report = (case, kind, body)
                if not any(f[:2] == open_report[:2] for f in found):
                    found.append((case, kind, _sentence(body, place)))
                    open_report = None if place else open_report
                else:
                    open_report = None
                break
        else:
            if open_report and (place := _PLACE.search(body)) and "Host Frame" not in body:
                found[-1] = (*open_report[:2], _sentence(open_report[2], place))
                open_report = None
    return found


def _sentence(headline: str, place: re.Match | None) -> str:
    text = re.sub(r"\s+", " ", headline.removeprefix("Error: "))
    text = re.sub(r"\b(at|by) (?:void )?[\w:<>,()* ]*\+0x[0-9a-f]+ in (?:\S*/)?(\S+:\d+)", r"\1 \2", text)
    if place is None:
        return f"compute-sanitizer: {text}"
    name, line = place[1] or place[3], place[2] or place[4]
    return f"{name}:{line}: compute-sanitizer: {text[:200]}"

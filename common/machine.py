"""Facts about this machine and this checkout, for provenance and the ceilings. Imports no torch.

Nothing here fails: a fact that cannot be had is left out.
"""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

# distribution name -> name under which the version is recorded
LIBRARIES = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "flashinfer-python": "flashinfer",
    "flash-attn": "flash_attn",
    "vllm": "vllm",
}
DEFAULT_CACHE_BYTES = 32 << 20  # assumed where the machine does not tell


def machine_facts(device: str) -> dict[str, Any]:
    """device_name, cpu_model, cpu_cores, platform, threads; on CUDA driver, clocks and power limit too."""
    facts: dict[str, Any] = {"device_name": cpu_model(), "cpu_model": cpu_model(), "cpu_cores": cpu_cores()}
    facts["platform"] = f"{platform.system()} {platform.machine()}"
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
    return facts | (gpu_facts(device) if device.startswith("cuda") else {})


def gpu_facts(device: str) -> dict[str, Any]:
    """device_name, driver, clocks (MHz) and power_limit_w of a CUDA device, as nvidia-smi tells them."""
    index = int(device.partition(":")[2] or 0)
    fields = ["name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit"]
    text = _output(
        ["nvidia-smi", f"--id={_smi_id(index)}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    )
    values = [value.strip() for value in text.split("\n")[0].split(",")]
    if len(values) != len(fields):
        return {}
    told = dict(zip(fields, values))
    clocks = {name: _number(told[name]) for name in fields if name.startswith("clocks")}
    return {
        "device_name": told["name"],
        "driver": told["driver_version"],
        "clocks": {name.removeprefix("clocks.").replace(".", "_") + "_mhz": value for name, value in clocks.items()},
        "power_limit_w": _number(told["power.limit"]),
    }


def _smi_id(index: int) -> str:
    """nvidia-smi numbers all cards of the machine, torch only the visible ones: name the card by its UUID if we can."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and index < torch.cuda.device_count():
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
        if uuid is not None:
            return f"GPU-{uuid}"
    visible = [item for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item]
    return visible[index] if index < len(visible) else str(index)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


@functools.cache
def cpu_model() -> str:
    if sys.platform == "darwin":
        name = _output(["sysctl", "-n", "machdep.cpu.brand_string"])
    else:
        match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
        name = match[1].strip() if match else ""
    return name or platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def last_level_cache_bytes() -> int:
    """The CPU's last-level cache, summed over the pieces that separate groups of cores have."""
    if sys.platform == "darwin":
        sizes = [
            _output(["sysctl", "-n", name])
            for name in ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize")
        ]
        return max((int(size) for size in sizes if size.isdigit()), default=DEFAULT_CACHE_BYTES)
    pieces: dict[tuple[int, str], int] = {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        level, size = _read(folder / "level").strip(), _read(folder / "size").strip()
        match = re.fullmatch(r"([0-9]+)([KMG]?)", size)
        if level.isdigit() and match:
            scale = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]]
            pieces[int(level), _read(folder / "shared_cpu_list").strip()] = int(match[1]) * scale
    if not pieces:
        return DEFAULT_CACHE_BYTES
    last = max(level for level, _ in pieces)
    return sum(size for (level, _), size in pieces.items() if level == last)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that change figures, of those that are installed."""
    versions = {}
    for distribution, name in LIBRARIES.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def git_commit() -> str | None:
    """The commit of this clone, with "+changes" where tracked files differ from it; None outside git."""
    root = str(Path(__file__).resolve().parent)
    commit = _output(["git", "-C", root, "rev-parse", "HEAD"])
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return None
    changed = _output(["git", "-C", root, "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+changes" if changed else "")


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _output(command: list[str]) -> str:
    """What a command prints, or "" where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

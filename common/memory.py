"""How much memory is free, asked before a model or a cache is made rather than after it failed."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that a new allocation on `device` could take: on a CPU what the system and this process's cgroup allow."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [_system_available()]
    try:
        maximum = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)$", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
        used -= int(cached[1]) if cached else 0  # file pages that the kernel drops on demand
        if maximum != "max":
            limits.append(int(maximum) - used)
    except (OSError, ValueError):
        pass  # no cgroup v2 here: the system's own figure stands
    return max(min(limits), 0)


def _system_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KB"; decimal units, as disks and bandwidths are counted."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class MemoryUse:
    """How much memory this process took since this was made: at most, on a GPU; on a CPU, now.

    On a CPU only what it has for itself counts: the mapped pages of checkpoint files are the system's cache, which goes
    when memory is wanted. Where the system does not tell them apart (not Linux), the peak of all that is resident.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._before = 0 if device.type == "cuda" else _own_bytes()

    @property
    def num_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _own_bytes() - self._before


def _own_bytes() -> int:
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB

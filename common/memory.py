"""How much memory is free, asked before a model or a cache is made rather than after it failed."""

from __future__ import annotations

import os
import re
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

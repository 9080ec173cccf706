"""When and on what a figure was measured; how many cores there are.

What processes take of this machine: how much memory at most, and how much of its cores.
"""

import os
import platform
import re
import resource
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """When and on what a figure was measured."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _cpu_model() or platform.processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
    }


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str | None:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        return None
    return names[0] if names else None


PROC = Path("/proc")


COUNTED = (0, 1, 2, 7)  # user, nice, system and steal in the first line of /proc/stat


def peak_bytes(pid: int | None = None) -> int:
    """The most memory that a process has had, this one unless told; 0 for one that is gone.

    What it shares with others counts in full. getrusage would count this process's parent in.
    """
    try:
        status = (PROC / str(pid or os.getpid()) / "status").read_text()
    except OSError:  # not Linux, or gone
        return 0 if pid else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[0]) * 1024 if found else 0


def others_seconds() -> float:
    """Seconds of the cores that went to anybody but this process and those it started.

    Counts up from an unknown time; always 0 where the system does not say.
    """
    try:
        ticks = [int(part) for part in (PROC / "stat").read_text().splitlines()[0].split()[1:]]
    except OSError:  # not Linux
        return 0.0
    taken = sum(ticks[place] for place in COUNTED if place < len(ticks))
    return (taken - _own_ticks()) / os.sysconf("SC_CLK_TCK")


def _own_ticks() -> int:
    """Ticks of the clock that this process and its descendants have had."""
    parents, ticks = {}, {}
    for entry in PROC.glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        parents[int(entry.name)] = int(fields[1])
        ticks[int(entry.name)] = int(fields[11]) + int(fields[12])
    ours = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= grown
    return sum(ticks.get(pid, 0) for pid in ours)

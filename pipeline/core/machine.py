"""When and on what a figure was measured; how many cores there are.

What processes take of this machine: how much memory at most, and how much of its cores.
"""

import contextlib
import os
import platform
import re
import resource
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """When and on what a figure was measured."""
    models = []
    with contextlib.suppress(OSError):
        models = re.findall(r"^model name\s*: *(.*?) *$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": models[0] if models else platform.processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
    }


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_bytes(pid: int | None = None) -> int:
    """The most memory that a process has had, this one unless told; 0 for one that is gone.

    What it shares with others counts in full. getrusage would count this process's parent in.
    """
    try:
        status = Path(f"/proc/{pid or os.getpid()}/status").read_text()
    except OSError:  # not Linux, or gone
        return 0 if pid else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kibibytes = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes[0]) * 1024 if kibibytes else 0


def others_seconds() -> float:
    """Seconds of the cores that went to anybody but this process and those it started.

    Counts up from an unknown time.
    """
    import psutil  # slow to import, and few commands measure

    times, own = psutil.cpu_times(), psutil.Process()
    taken = sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "steal"))
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it ended while we looked
            used = process.cpu_times()
            taken -= used.user + used.system
    return float(taken)

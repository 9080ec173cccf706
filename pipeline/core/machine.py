"""The machine: its description for measurements, its cores, and what processes use of it."""

import contextlib
import os
import platform
import re
import resource
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Return the time and a description of the machine, to store with a measurement."""
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
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_bytes(pid: int | None = None) -> int:
    """Return the peak memory of process `pid` (default: this one), in bytes; 0 if it has ended.

    Shared memory counts in full. getrusage is only the fallback, because it may include the memory
    of this process's parent.
    """
    try:
        status = Path(f"/proc/{pid or os.getpid()}/status").read_text()
    except OSError:  # not Linux, or gone
        return 0 if pid else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kibibytes = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes[0]) * 1024 if kibibytes else 0


def others_seconds() -> float:
    """Return the core seconds used by all processes except this one and its descendants.

    Time that a hypervisor took (steal) counts too. The count starts at an unknown time, so that
    only differences have a meaning.
    """
    import psutil  # slow to import, and few commands measure

    times, own = psutil.cpu_times(), psutil.Process()
    taken = sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "steal"))
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            used = process.cpu_times()
            taken -= used.user + used.system
    return float(taken)

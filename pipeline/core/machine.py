"""The machine: its description for measurements, its cores, and what processes use of it."""

import contextlib
import math
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Return the time and a description of the machine, to store with a measurement."""
    models = []
    with contextlib.suppress(OSError):
        models = re.findall(
            r"^model name\s*: *(.*?) *$", Path("/proc/cpuinfo").read_text("utf-8"), re.M
        )
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
    """Return how many cores this process may use: those that it may run on, within its quota."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    allowed = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(allowed, quota_cores() or allowed)


def quota_cores(root: Path = Path("/")) -> int:
    """Return the cores that the quota of this process's cgroups pays for, rounded up; 0: no quota.

    A container may run on every core of its host, but is paused as soon as its quota (`docker run
    --cpus`, a limit of Kubernetes) is spent: more threads than that only wait for each other.
    """
    quotas = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top, names = root / "sys/fs/cgroup", ["cpu.max"]  # version 2: "QUOTA PERIOD"
            if controllers:
                top, names = top / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            parts = group.strip("/").split("/")
            for folder in (top.joinpath(*parts[:count]) for count in range(len(parts) + 1)):
                with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                    text = " ".join((folder / name).read_text("utf-8") for name in names)
                    quota, period = map(int, text.split())
                    quotas += [math.ceil(quota / period)] if quota > 0 else []
    return min(quotas, default=0)


def peak_bytes(pid: int | None = None) -> int:
    """Return the peak memory of process `pid` (default: this one), in bytes; 0 if it has ended.

    Shared memory counts in full. macOS tells only what this process uses now.
    """
    try:
        status = Path(f"/proc/{pid or os.getpid()}/status").read_text("utf-8")
    except OSError:  # not Linux, or gone
        import psutil  # slow to import

        memory = psutil.Process().memory_info()
        return 0 if pid else int(getattr(memory, "peak_wset", memory.rss))
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

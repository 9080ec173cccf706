"""Print the package index to install torch from; nothing for pip's own.

    python tools/torch_index.py CPU_INDEX

That is CPU_INDEX on Linux without an NVIDIA driver, since pip's own index has builds for CUDA,
which are gigabytes; and pip's own where CPU_INDEX does not answer in time. Runs before the
project's environment is there, with the standard library only.
"""

import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

SECONDS = 5.0  # for the whole request: a slow name server or proxy ends it as well
DRIVER = Path("/proc/driver/nvidia")


def has_driver() -> bool:
    """Return whether this machine has an NVIDIA driver."""
    if DRIVER.exists():
        return True
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def answers(index: str, seconds: float = SECONDS) -> bool:
    """Return whether the package index has a page about torch, and answers within `seconds`."""
    statuses: list[int] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{index}/torch/", timeout=seconds) as response:
                statuses.append(response.status)
        except (OSError, ValueError):  # no connection, no such page, not a URL
            pass

    # A thread that nobody waits for, since a time-out of urlopen is that of one step of many.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return statuses == [200]


def choose_index(cpu_index: str, seconds: float = SECONDS) -> str:
    """Return the index of CPU builds, or "" for pip's own, which has others as well."""
    if sys.platform != "linux" or has_driver():
        return ""
    if answers(cpu_index, seconds):
        return cpu_index
    print(f"note: {cpu_index} does not answer: torch comes from pip's own index", file=sys.stderr)
    return ""


if __name__ == "__main__":
    print(choose_index(sys.argv[1].rstrip("/")))

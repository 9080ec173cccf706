"""The pipeline in processes of its own, without the seconds that each takes to import torch.

They are forked from one process that did. A fork has the environment of that process, and is
killed, interrupted and waited for as any other.
"""

import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from pipeline.cli.main import main

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.run", "pipeline.cli.train", "pipeline.training.run"]
)


def run_pipeline(*arguments: str) -> None:
    """Run the command line."""
    main(arguments)


def run_torchrun(*arguments: str) -> None:
    """Run torchrun, whose processes are not forked from ours: each imports torch."""
    from torch.distributed.run import main as torchrun

    torchrun(list(arguments))


@dataclass(frozen=True)
class Forked:
    """A process with the methods of `subprocess.Popen` that the tests use."""

    process: ForkServerProcess

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self, seconds: float | None = None) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode


def start(
    run: Callable[..., Any], *arguments: Any, log: Path, largest_file: int | None = None
) -> Forked:
    """Start `run` in a process of its own, whose output and errors go to `log`.

    It may write no file of more than `largest_file` bytes, as on a disk that is full.
    """
    process = CONTEXT.Process(target=_run_logged, args=(run, arguments, log, largest_file))
    process.start()
    return Forked(process)


def start_two(run: Callable[..., Any], *arguments: Any, log: Path) -> list[ForkServerProcess]:
    """Start `run` in two processes with torchrun's variables; the errors of both go to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_run_rank, args=(rank, port, log, run, arguments))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes: list[ForkServerProcess]) -> list[int | None]:
    """Wait for the processes, and return how each one ended."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _run_logged(
    run: Callable[..., Any], arguments: tuple[Any, ...], log: Path, largest_file: int | None
) -> None:
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    run(*arguments)


def _run_rank(
    rank: int, port: int, log: Path, run: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sys.stderr = log.open("a", buffering=1)
    run(*arguments)

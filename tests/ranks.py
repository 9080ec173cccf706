"""The pipeline in two processes that train together, without the seconds that torchrun costs.

torchrun and both of its processes import torch; these are forked from one process that did.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from pipeline.cli.main import main

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "pipeline.cli.main", "pipeline.training.run"])


def run_pipeline(*arguments: str) -> None:
    """Run the command line."""
    main(arguments)


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

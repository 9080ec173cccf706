"""Connection to Ray: a local instance, quiet and on loopback, or an existing cluster."""

import contextlib
import importlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError, ServerError
from pipeline.core.files import locked, remove

STORE_BYTES = 256 * 2**20  # of the object store, through which images reach the workers on GPUs
SCRATCH = f"pipeline-ray-{os.getuid() if hasattr(os, 'getuid') else 0}"
MAX_SCRATCH_BYTES = 48  # of a path; Ray puts sockets below it, whose paths have 107 at most
CONNECT_SECONDS = 10
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves the machine
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray Data's own actors cause harmless warnings
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # requested by a warning of Ray
}
# Without it Ray listens on every interface, whatever its address argument is (services.py,
# resolve_ip_for_localhost); the name refers to systems where loopback is the default.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def load(address: str | None) -> None:
    """Import Ray, after setting the environment variables that it reads on import.

    Raises ModuleNotFoundError if Ray is not installed.
    """
    os.environ |= QUIET
    if not address:
        # With a password, so that no other user of this machine can send it work.
        os.environ |= {**LOOPBACK, "RAY_AUTH_MODE": "token"}
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    importlib.import_module("ray.data")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def connect(address: str | None, cpus: int) -> Iterator[None]:
    """Connect to Ray until the end of the block: the cluster at `address`, or a local instance.

    The local instance has `cpus` CPUs. An existing connection of this process is used, and is not
    closed. Raises ServerError if there is no cluster at `address`.
    """
    load(address)
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as stack:
        if address:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            try:
                if port.isdigit():  # not "auto"; Ray itself would try to connect for minutes
                    place = (host.strip("[]"), int(port))
                    socket.create_connection(place, CONNECT_SECONDS).close()
                with _silence_stderr():
                    ray.init(address, **quiet)
            except (OSError, OverflowError, RuntimeError, ValueError) as error:
                message = f"no Ray cluster at {address} ({error}): check 'ray status' there"
                raise ServerError(message) from error
        else:
            options = {"num_cpus": cpus, "object_store_memory": STORE_BYTES, **quiet}
            folder = str(stack.enter_context(_scratch_folder()))
            with _silence_stderr():
                ray.init(include_dashboard=False, _temp_dir=folder, **options)
        stack.callback(ray.shutdown)
        yield


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
    """Discard what Ray's C++ code prints about its log level; failures are raised as exceptions."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Make a folder for Ray's sockets and logs, and remove those left by killed processes."""
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) + len(SCRATCH) > MAX_SCRATCH_BYTES:
        parent = Path("/tmp")
    with contextlib.ExitStack() as stack:
        with locked(parent / f"{SCRATCH}.lock"):  # so that no other process removes a new folder
            for left in parent.glob(f"{SCRATCH}-*"):
                held = left / "held"
                with contextlib.suppress(PipelineError), locked(held, busy="held"):
                    remove(left)
            folder = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}-", dir=parent))
            stack.enter_context(locked(folder / "held"))
        try:
            yield folder
        finally:
            remove(folder)

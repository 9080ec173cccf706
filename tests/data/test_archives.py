"""KMNIST and EMNIST, made here: what cannot be downloaded is checked on small files."""

import gzip
import hashlib
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import sha256
from pipeline.data import archives
from pipeline.data.archives import fetch_archives
from pipeline.data.catalog import DATASETS, NAMES, Dataset
from pipeline.data.splits import load_split, verify
from tests.data.test_splits import idx


def published(dataset: str, train: int = 60, test: int = 24) -> dict[str, bytes]:
    """The four uncompressed files by the publisher's names; each image has one bright column 0."""
    row = DATASETS[dataset]
    files = {}
    for name in NAMES:
        count = train if name.startswith("train") else test
        images = np.zeros((count, 28, 28))
        images[:, :, 0] = 200
        if row.emnist:
            images = images.transpose(0, 2, 1)
        labels = np.arange(count) % len(row.classes) + row.first_label
        file = f"emnist-{row.emnist}-{name.replace('t10k', 'test')}" if row.emnist else name
        files[file] = idx(images if "images" in name else labels)
    return files


def downloads(dataset: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files as they are downloaded: each gzipped, or all in a zip."""
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}
    if not DATASETS[dataset].emnist:
        return packed
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in packed.items():
            archive.writestr(f"gzip/{name}", content)
    return {"gzip.zip": buffer.getvalue()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def with_md5s(dataset: str, packed: dict[str, bytes]) -> Dataset:
    """The row of the data set, as if these downloads were the published ones."""
    row = DATASETS[dataset]
    right = (
        replace(file, md5=hashlib.md5(packed[file.name], usedforsecurity=False).hexdigest())
        for file in row.downloads
    )
    return replace(row, downloads=tuple(right))


SETS = ["kmnist", "emnist-balanced", "emnist-letters", "emnist-digits"]


@pytest.mark.parametrize("dataset", SETS)
def test_downloads_with_the_right_md5_become_upright_splits_labelled_from_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    files = published(dataset)
    packed = downloads(dataset, files)
    monkeypatch.setitem(DATASETS, dataset, with_md5s(dataset, packed))
    cache = fetch_archives(dataset, tmp_path / "cache", write(tmp_path / "from", packed))
    train, validation, test = (
        load_split(dataset, cache, name) for name in ("train", "validation", "test")
    )
    assert [len(split) for split in (train, validation, test)] == [55, 5, 24]
    assert train.classes == DATASETS[dataset].classes
    np.testing.assert_array_equal(test.labels, np.arange(24) % len(test.classes))
    assert (test.images[:, 0, :, 0] == 200).all()
    assert not test.images[..., 1:].any()
    record = json.loads((cache / "dataset.json").read_text())
    assert record["md5_checked"] is True
    assert record["fetched_sha256"] == {name: sha256(files[name]) for name in files}


@pytest.mark.parametrize("dataset", SETS)
@pytest.mark.parametrize("is_packed", [False, True])
def test_loose_files_are_taken_with_a_word_that_no_digest_is_published(
    tmp_path: Path, dataset: str, is_packed: bool
) -> None:
    files = published(dataset)
    if is_packed and not DATASETS[dataset].emnist:
        return  # KMNIST's .gz are its downloads
    if is_packed:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    lines: list[str] = []
    source = write(tmp_path / "from", files)
    cache = fetch_archives(dataset, tmp_path / "cache", source, lines.append)
    assert any("have no published digest" in line for line in lines)
    verify(dataset, cache)
    (cache / NAMES[0]).write_bytes(b"changed")
    with pytest.raises(CorruptError, match=NAMES[0]):
        load_split(dataset, cache, "train")
    fetch_archives(dataset, cache, source)
    verify(dataset, cache)


@pytest.mark.parametrize("dataset", ["kmnist", "emnist-letters"])
def test_a_download_with_another_md5_is_corrupt_and_leaves_nothing(
    tmp_path: Path, dataset: str
) -> None:
    source = write(tmp_path / "from", downloads(dataset, published(dataset)))
    with pytest.raises(CorruptError, match="has MD5 .* published MD5 is"):
        fetch_archives(dataset, tmp_path / "cache", source)
    assert not list((tmp_path / "cache").glob("[a-z]*"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("emnist-letters-train-labels-idx1-ubyte", idx(np.zeros(60)), "labels 0 to 0"),
        ("emnist-letters-train-labels-idx1-ubyte", idx(np.full(60, 27)), "labels 27 to 27"),
        ("emnist-letters-train-labels-idx1-ubyte", idx(np.ones(59)), "shapes that differ"),
        ("emnist-letters-test-images-idx3-ubyte", idx(np.ones((24, 28, 27))), "shapes that differ"),
        ("emnist-letters-test-images-idx3-ubyte", b"hello", "first two bytes"),
        ("emnist-letters-test-images-idx3-ubyte", b"\x1f\x8bhello", "cannot be unpacked"),
    ],
)
def test_loose_files_that_make_no_sense_are_corrupt(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    source = write(tmp_path / "from", published("emnist-letters") | {name: content})
    with pytest.raises(CorruptError, match=said):
        fetch_archives("emnist-letters", tmp_path / "cache", source)


def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 100_000)
    files = {f"{name}.gz": gzip.compress(bytes(2**20)) for name in published("emnist-digits")}
    with pytest.raises(CorruptError, match="unpacks to more than"):
        fetch_archives("emnist-digits", tmp_path / "cache", write(tmp_path / "from", files))


def test_a_zip_without_the_part_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = downloads("emnist-digits", published("emnist-digits"))
    row = replace(with_md5s("emnist-digits", packed), emnist="letters")
    monkeypatch.setitem(DATASETS, "emnist-letters", row)
    with pytest.raises(CorruptError, match="cannot be unpacked"):
        fetch_archives("emnist-letters", tmp_path / "cache", write(tmp_path / "from", packed))


def test_what_cannot_be_downloaded_is_named_with_the_way_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(DATASETS["emnist-digits"], mirrors=("http://127.0.0.1:9/",))
    monkeypatch.setitem(DATASETS, "emnist-digits", row)
    with pytest.raises(PipelineError, match="cannot get gzip.zip") as caught:
        fetch_archives("emnist-digits", tmp_path / "cache")
    assert "pipeline data fetch --dataset emnist-digits --from DIR" in str(caught.value)
    with pytest.raises(PipelineError, match="has neither"):
        fetch_archives("emnist-digits", tmp_path / "cache", tmp_path)
    with pytest.raises(PipelineError, match="is not a folder"):
        fetch_archives("emnist-digits", tmp_path / "cache", tmp_path / "gone")


def test_what_was_not_fetched_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="pipeline data fetch --dataset kmnist"):
        load_split("kmnist", tmp_path, "train")


def test_the_classes_are_the_publishers() -> None:
    sizes = {name: len(DATASETS[name].classes) for name in SETS}
    assert sizes == dict(zip(SETS, (10, 47, 26, 10), strict=True))
    assert DATASETS["emnist-balanced"].classes[36:] == tuple("abdefghnqrt")

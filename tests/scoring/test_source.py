"""Sources, their shards and the images in them; without Ray and without a model."""

import gzip
import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.scoring.parquet import Columns
from pipeline.scoring.source import Cut, cut, read_shard

SHAPE = (1, 28, 28)
IMAGES = np.random.default_rng(0).integers(0, 256, (50, *SHAPE), np.uint8)
FLAT = IMAGES.reshape(-1)


def idx(images: np.ndarray) -> bytes:
    head = struct.pack(f">4B{images.ndim}I", 0, 0, 8, images.ndim, *images.shape)
    return head + images.tobytes()


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[0]).save(buffer, format="PNG")
    return buffer.getvalue()


PICTURES = [png(image) for image in IMAGES]
COLUMNS: dict[str, Callable[[], pa.Array]] = {  # pyarrow imports pandas to make one
    "flat": lambda: pa.FixedSizeListArray.from_arrays(pa.array(FLAT), 784),
    "lists": lambda: pa.array(IMAGES.reshape(-1, 784).tolist(), pa.list_(pa.int64())),
    "nested": lambda: pa.array(IMAGES[:, 0].tolist(), pa.list_(pa.list_(pa.uint8()))),
    "tensor": lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES),
    "pictures": lambda: pa.array(PICTURES, pa.binary()),
    "datasets": lambda: pa.array([{"bytes": p, "path": "x.png"} for p in PICTURES]),
}


def cut_(path: Path, rows: int = 16, columns: Columns | None = None) -> Cut:
    """As a model takes it that gets whole pictures, 28 x 28 ones as they are."""
    return cut(path, SHAPE, "whole", rows, path.parent / "_unpacked", columns or Columns())


def everything(source: Cut) -> tuple[list[object], np.ndarray, list[str]]:
    found = [read_shard(source, shard) for shard in source.shards]
    return (
        [one for rows in found for one in rows.ids.tolist()],
        np.concatenate([rows.images for rows in found]),
        [one for rows in found for one in rows.reasons],
    )


def made(folder: Path, kind: str) -> Path:
    path = folder / kind
    if kind in COLUMNS:
        pq.write_table(pa.table({"picture": COLUMNS[kind]()}), path, row_group_size=7)
    elif kind == "folder":
        for index, picture in enumerate(PICTURES):
            (path / f"{index // 10}").mkdir(parents=True, exist_ok=True)
            (path / f"{index // 10}" / f"{index:02}.png").write_bytes(picture)
    elif kind == "idx":
        path.write_bytes(idx(IMAGES[:, 0]))
    elif kind == "gz":
        path.write_bytes(gzip.compress(idx(IMAGES[:, 0]), mtime=0))
    else:
        with path.open("wb") as file:
            np.save(file, {"npy3": IMAGES[:, 0], "npy4": IMAGES}[kind])
    return path


@pytest.mark.parametrize("kind", [*COLUMNS, "folder", "idx", "gz", "npy3", "npy4"])
def test_a_source_of_any_kind_shows_the_same_images_once_each(tmp_path: Path, kind: str) -> None:
    source = cut_(made(tmp_path, kind))
    ids, images, reasons = everything(source)
    assert source.rows == 50
    assert set(reasons) == {""}
    np.testing.assert_array_equal(images, IMAGES)
    if kind == "folder":
        assert ids[:2] == ["0/00.png", "0/01.png"]
    else:
        assert ids == list(range(50))


@pytest.mark.parametrize("group", [1, 7, 16, 50])
@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_row_groups_of_any_size_are_cut_into_shards_that_miss_nothing(
    tmp_path: Path, group: int, rows: int
) -> None:
    table = pa.table({"id": [f"n{i}" for i in range(50)], "image": COLUMNS["flat"]()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=group)
    source = cut_(tmp_path / "a.parquet", rows)
    ids, images, _ = everything(source)
    assert ids == [f"n{i}" for i in range(50)]
    np.testing.assert_array_equal(images, IMAGES)
    assert [shard.index for shard in source.shards] == list(range(len(source.shards)))
    assert all(shard.rows <= 8 * rows for shard in source.shards)
    assert source == cut_(tmp_path / "a.parquet", rows)


READ = """
import sys, pyarrow
from collections.abc import Callable
from pathlib import Path
from pipeline.scoring.parquet import Columns
from pipeline.scoring.source import cut, read_shard
source = cut(Path(sys.argv[1]), (1, 28, 28), "whole", 100, Path("unused"), Columns())
rows = read_shard(source, source.shards[-1])
print(len(source.shards), rows.images[-1].sum(), pyarrow.default_memory_pool().max_memory())
"""


@pytest.mark.slow
def test_a_large_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, 784 * 30_000, np.uint8)
    column = pa.FixedSizeListArray.from_arrays(pa.array(noise), 784)
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    command = [sys.executable, "-c", READ, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shards, last, held = map(int, done.stdout.split())
    assert (shards, last) == (38, noise[-784:].sum())
    assert held < noise.nbytes


def test_a_folder_of_parquet_names_each_row_by_its_file(tmp_path: Path) -> None:
    for name in ("b", "a", "_hidden"):
        table = pa.table({"image": COLUMNS["flat"]().slice(0, 2)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    ids, _, _ = everything(cut_(tmp_path))
    assert ids == ["a.parquet:0", "a.parquet:1", "b.parquet:0", "b.parquet:1"]


def test_files_of_one_name_in_several_folders_have_different_ids(tmp_path: Path) -> None:
    for name in ("one", "two/_hidden", "two", ".hidden", "two/.hidden"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        table = pa.table({"image": COLUMNS["flat"]().slice(0, 1)})
        pq.write_table(table, tmp_path / name / "a.parquet")
    ids, _, _ = everything(cut_(tmp_path))
    assert ids == ["one/a.parquet:0", "two/a.parquet:0"]


@pytest.mark.parametrize("content", [PICTURES[0], idx(IMAGES[:, 0]), b"\x93NUMPY"])
def test_parquet_beside_something_else_to_score_is_refused(tmp_path: Path, content: bytes) -> None:
    pq.write_table(pa.table({"image": COLUMNS["flat"]()}), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("About these digits")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    assert cut_(tmp_path).rows == 50
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "more").write_bytes(content)
    with pytest.raises(PipelineError, match=r"Parquet and .*a.parquet, .*below/more\): sep"):
        cut_(tmp_path)


def test_a_part_of_a_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.listdir

    def refusing(path: str) -> list[str]:  # to root, rights are none
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    (made(tmp_path, "folder") / "closed").mkdir()
    monkeypatch.setattr(os, "listdir", refusing)
    with pytest.raises(PipelineError, match="folder/closed .Permission denied.: check its"):
        cut_(tmp_path / "folder")


def test_a_link_to_nowhere_and_a_name_that_is_no_utf_8_do_not_stop_the_others(
    tmp_path: Path,
) -> None:
    folder = made(tmp_path, "folder")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / os.fsdecode(b"day\xe9.png")).write_bytes(PICTURES[0])
    (folder / os.fsdecode(b"no\xe9.png")).write_text("no picture")
    source = cut_(folder)
    ids, images, reasons = everything(source)
    assert ids[:3] == ["day\\xe9.png", "gone.png", "no\\xe9.png"]
    np.testing.assert_array_equal(images[3:], IMAGES)
    assert (reasons[0], set(reasons[3:])) == ("", {""})
    assert "is not a file" in reasons[1]
    assert "no\\xe9.png cannot be read as an image" in pa.array(reasons)[2].as_py()
    (folder / "gone.png").unlink()
    assert cut_(folder).digest != source.digest


def test_a_picture_that_the_system_refuses_has_that_as_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cut_(made(tmp_path, "folder"))

    def refused(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    assert "Permission denied" in read_shard(source, source.shards[0]).reasons[0]


def test_ids_that_are_whole_numbers_stay_what_they_are(tmp_path: Path) -> None:
    values = [2**64 - 1, None, 2**53 + 1]
    table = pa.table({"id": pa.array(values, pa.uint64()), "image": COLUMNS["flat"]().slice(0, 3)})
    pq.write_table(table, tmp_path / "a.parquet")
    ids, _, reasons = everything(cut_(tmp_path / "a.parquet"))
    assert ids == [2**64 - 1, 1, 2**53 + 1]
    assert reasons == ["", "its id is null", ""]


def test_what_is_no_image_has_a_reason_and_the_others_are_read(tmp_path: Path) -> None:
    good = IMAGES[0, 0].tolist()
    values = [
        good,
        None,
        [[1] * 28],
        [[300] * 28] * 28,
        [[None] * 28] * 28,
        [[1], [1, 2]],
        [],
        good,
    ]
    table = pa.table({"id": [*"abcdefg", None], "image": pa.array(values)})
    pq.write_table(table, tmp_path / "a.parquet")
    ids, images, reasons = everything(cut_(tmp_path / "a.parquet"))
    np.testing.assert_array_equal(images[0], IMAGES[0])
    assert ids == [*"abcdefg", "row 7"]
    assert reasons == [
        "",
        "its image is null",
        "its shape is [1, 28], the model takes [1, 28, 28]",
        "its pixels are 300 to 300, outside 0 to 255",
        "one of its pixels is null",
        "its rows differ in length",
        "its shape is [0], the model takes [1, 28, 28]",
        "its id is null",
    ]


def test_a_picture_that_cannot_be_read_has_the_reason_that_query_gives(tmp_path: Path) -> None:
    pictures = [PICTURES[0], PICTURES[1][:60], b"no picture", None, png(np.zeros(SHAPE, np.uint8))]
    pq.write_table(pa.table({"image": pa.array(pictures)}), tmp_path / "a.parquet")
    _, images, reasons = everything(cut_(tmp_path / "a.parquet"))
    np.testing.assert_array_equal(images[0], IMAGES[0])
    assert reasons[0] == ""
    assert "1 cannot be read as an image" in reasons[1]
    assert "2 cannot be read as an image (its format is unknown)" in reasons[2]
    assert reasons[3] == "its image is null"
    assert "4 shows no ink" in reasons[4]


def test_the_columns_can_be_named(tmp_path: Path) -> None:
    flat = COLUMNS["flat"]()
    table = pa.table({"one": flat, "two": flat, "key": list(range(100, 150))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(PipelineError, match="2 columns that can hold images.*--image-column"):
        cut_(tmp_path / "a.parquet")
    ids, _, _ = everything(cut_(tmp_path / "a.parquet", columns=Columns("two", "key")))
    assert ids == list(range(100, 150))
    with pytest.raises(PipelineError, match="no column 'three'. Its columns are .'one', 'two', 'k"):
        cut_(tmp_path / "a.parquet", columns=Columns("three"))
    with pytest.raises(PipelineError, match="has no column 'name'"):
        cut_(tmp_path / "a.parquet", columns=Columns("one", "name"))


def damaged(content: bytes, index: int) -> bytes:
    """The same with another byte there."""
    changed = bytearray(content)
    changed[index] ^= 0xFF
    return bytes(changed)


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message", "kind"),
    [
        (b"", "cannot be scored: give", PipelineError),
        (b"hello", "cannot be scored: give", PipelineError),
        (PICTURES[0], "pipeline query", PipelineError),
        (idx(np.zeros(5, np.uint8)), r"arrays of shape \[\], the model takes", PipelineError),
        (idx(IMAGES[:0, 0]), "holds no images", PipelineError),
        (idx(IMAGES[:, 0])[:-1], "39,199 bytes of images, not 39,200", CorruptError),
        (b"\0\0\x08\x03\0", "ends inside its header", CorruptError),
        (gzip.compress(idx(IMAGES[:, 0]), mtime=0)[:-20], "cannot be decompressed", CorruptError),
        (
            damaged(gzip.compress(FLAT.tobytes(), mtime=0), -8),
            "cannot be decompressed.*CRC",
            CorruptError,
        ),
        (
            damaged(gzip.compress(bytes(9999), mtime=0), 12),
            "cannot be decompressed.*-3",
            CorruptError,
        ),
        (saved(IMAGES)[:-1], "bytes of images, not", CorruptError),
        (saved(IMAGES.astype(np.float32)), "holds <f4", PipelineError),
        (saved(np.asfortranarray(IMAGES[:, 0])), "save uint8 in C order", PipelineError),
        (saved(IMAGES)[:20], "header of .* is damaged", CorruptError),
        (b"PAR1 and no more", "is not a readable Parquet file", CorruptError),
    ],
)
def test_what_is_no_source_is_refused_in_a_line(
    tmp_path: Path, content: bytes, message: str, kind: type[PipelineError]
) -> None:
    (tmp_path / "source").write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        cut_(tmp_path / "source")
    assert "source" in str(caught.value)


def test_no_source_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="nowhere does not exist: check the name"):
        cut_(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError, match="empty has no files: name a folder"):
        cut_(tmp_path / "empty")


def test_another_source_under_the_same_name_has_another_digest(tmp_path: Path) -> None:
    path = made(tmp_path, "idx")
    before = cut_(path).digest
    os.utime(path, (1, 1))
    assert cut_(path).digest != before

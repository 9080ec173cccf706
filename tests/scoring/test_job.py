"""Offline classification on Ray: the answers, what is rejected, what a kill leaves."""

import gzip
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet as pq

from pipeline.cli.main import main
from pipeline.cli.score import format_reader_command
from pipeline.client.prediction import to_prediction
from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.evaluate import predict
from pipeline.core.files import locked
from pipeline.export.runtime import onnx_predictor
from pipeline.images.read import read_image
from pipeline.repository import config_pbtxt
from pipeline.scoring import worker
from pipeline.scoring.cluster import SCRATCH, connect
from pipeline.scoring.job import score_source
from pipeline.scoring.parquet import Columns, Rows
from pipeline.scoring.settings import ScoreConfig
from pipeline.scoring.source import cut
from pipeline.scoring.worker import (
    Counts,
    Folder,
    Reader,
    Scorer,
    ScoringModel,
    begin_job,
    read_counts,
    read_selected_model,
    score_rows,
    write,
)
from tests.conftest import Chain, error_line
from tests.scoring.test_source import damaged, idx, png

CLASSES = ("a", "b", "c")
MODEL = ScoringModel(
    "net", "3", "", "f" * 64, CLASSES, "log_probabilities", "digit", (1, 2, 2), 0.6
)
OUTPUTS = np.log([[0.7, 0.2, 0.1], [0.1, 0.4, 0.5], [0.05, 0.9, 0.05]]).astype(np.float32)
TOP_2 = ScoreConfig(top=2, batch_size=2)
RECORD = {"source": "there", "digest": "f" * 64}


def rows_like(outputs: np.ndarray, reasons: list[str]) -> Rows:
    """Rows that `by_number` answers with these outputs."""
    numbers = np.arange(len(outputs))
    images = np.zeros((len(outputs), 1, 2, 2), np.uint8)
    images[:, 0, 0, 0] = numbers
    return Rows(numbers + 100, images, np.array(reasons, object))


def scored_rows(outputs: np.ndarray, reasons: list[str], top: int = 2) -> tuple[Any, Any, Counts]:
    return score_rows(
        rows_like(outputs, reasons),
        MODEL,
        lambda images: outputs[images[:, 0, 0, 0]],
        replace(TOP_2, top=top),
    )


def test_a_row_says_what_query_would_say() -> None:
    table, rejected, counts = scored_rows(OUTPUTS, ["", "", ""])
    config = config_pbtxt.ModelConfig()
    config_pbtxt.set_parameter(config, config_pbtxt.MIN_PROBABILITY, "0.6")
    for row, output in zip(table.to_pylist(), OUTPUTS, strict=True):
        said = to_prediction(output, config, CLASSES, "3", 2)
        assert (row["label"], row["sure"], row["version"]) == (said.label, said.is_sure, "3")
        assert row["probability"] == np.float32(said.probability)
        assert [(t["label"], t["probability"]) for t in row["top"]] == [
            (label, np.float32(chance)) for label, chance in said.top
        ]
        assert row["digest"] == "f" * 64
    assert table["id"].to_pylist() == [100, 101, 102]
    assert (len(rejected), counts) == (0, Counts(3, 0, 1))


def test_without_a_threshold_the_column_of_sureness_is_null() -> None:
    model = replace(MODEL, min_probability=None)
    rows = rows_like(OUTPUTS, ["", "", ""])
    table, _, counts = score_rows(rows, model, lambda images: OUTPUTS[images[:, 0, 0, 0]], TOP_2)
    assert table["sure"].to_pylist() == [None] * 3
    assert table.schema.field("sure").type == "bool"
    assert counts == Counts(3, 0, 0)


def test_what_is_rejected_has_a_row_in_the_side_table_and_none_among_the_answers() -> None:
    outputs = OUTPUTS.copy()
    outputs[2, 0] = np.nan
    table, rejected, counts = scored_rows(outputs, ["", "its image is null", ""])
    assert table["id"].to_pylist() == [100]
    assert rejected.to_pylist() == [
        {"id": "101", "reason": "its image is null"},
        {"id": "102", "reason": "the model's answer is not finite"},
    ]
    assert counts == Counts(1, 2, 0)


def test_a_row_without_an_id_is_rejected_by_its_number() -> None:
    _, rejected, _ = scored_rows(OUTPUTS, ["", "its id is null", "its image is null"])
    assert rejected["id"].to_pylist() == ["row 101", "102"]


def test_ids_beyond_63_bits_are_written_as_they_are() -> None:
    rows = rows_like(OUTPUTS, ["", "", "bad"])
    rows = replace(rows, ids=rows.ids.astype(np.uint64) + np.uint64(2**63))
    table, rejected, _ = score_rows(rows, MODEL, lambda images: OUTPUTS[: len(images)], TOP_2)
    assert table["id"].to_pylist() == [2**63 + 100, 2**63 + 101]
    assert rejected["id"].to_pylist() == [str(2**63 + 102)]


@pytest.mark.parametrize("at_once", [1, 3, 2**24])
@pytest.mark.parametrize(
    "ids",
    [
        np.array([4, 5, -1, 5, 7, 4, 5, 8, -1]),
        np.array([4, 5, 2**64 - 1, 5, 7, 4, 5, 8, 2**64 - 1], np.uint64),
        np.array(["d", "e", "ü", "e", "", "d", "e", "E", "ü"], object),
    ],
    ids=["whole", "large", "text"],
)
def test_ids_that_repeat_are_counted_over_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: np.ndarray, at_once: int
) -> None:
    monkeypatch.setattr(worker, "HASHES_AT_ONCE", at_once)
    for index in range(3):
        rows = replace(rows_like(OUTPUTS, ["", "", ""]), ids=ids[3 * index : 3 * index + 3])
        write(
            Folder(tmp_path),
            index,
            *score_rows(rows, MODEL, lambda images: OUTPUTS[: len(images)], TOP_2),
        )
    assert worker.count_repeated_ids(Folder(tmp_path), range(3), len(ids)) == 3
    assert worker.count_repeated_ids(Folder(tmp_path), [0], 3) == 0
    assert worker.count_repeated_ids(Folder(tmp_path), [], 0) == 0


def test_a_shard_without_any_image_has_an_empty_file_of_the_same_columns() -> None:
    full, _, _ = scored_rows(OUTPUTS, ["", "", ""])
    table, rejected, counts = scored_rows(OUTPUTS, ["bad", "bad", "bad"], top=9)
    assert table.schema == full.schema
    assert (len(table), len(rejected), counts) == (0, 3, Counts(0, 3, 0))


def test_only_files_that_are_whole_count_as_finished(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert read_counts(folder, 0, 3) is None
    write(folder, 0, *scored_rows(OUTPUTS, ["", "bad", ""]))
    assert read_counts(folder, 0, 3) == Counts(2, 1, 0)
    assert read_counts(folder, 0, 4) is None
    folder.rejected(0).unlink()
    assert read_counts(folder, 0, 3) is None
    write(folder, 0, *scored_rows(OUTPUTS, ["", "bad", ""]))
    folder.part(0).write_bytes(folder.part(0).read_bytes()[:-9])
    assert read_counts(folder, 0, 3) is None


def test_a_job_goes_on_only_with_the_same_source_and_model(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    begin_job(folder, RECORD)
    (tmp_path / ".part-000000.parquet.0123abcd.tmp").touch()
    begin_job(folder, RECORD)
    assert not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(PipelineError, match="its digest is f+, not e+. Choose another"):
        begin_job(folder, {**RECORD, "digest": "e" * 64})


def test_a_source_that_is_none_leaves_no_folder_and_one_that_was_there_stays(
    made: Chain, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for output in (tmp_path / "new", there):
        result = made.run("score", str(tmp_path / "nothing"), "--output", str(output))
        assert result.exit_code == 1
        assert "nothing" in error_line(result)
    assert list(tmp_path.iterdir()) == [there]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(PipelineError, match="holds other files, but no scoring job"):
        begin_job(Folder(tmp_path), RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_ray_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    result = CliRunner().invoke(main, ["score", str(tmp_path), "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "make .venv" in error_line(result)


def test_scoring_never_imports_torch() -> None:
    code = "import sys, pipeline.scoring.job, pipeline.cli.score; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_that_runs_keeps_others_out_of_its_folder(made: Chain, tmp_path: Path) -> None:
    with locked(Folder(tmp_path).lock):
        result = made.run("score", "data/mnist/t10k-images-idx3-ubyte", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert f"another job is writing {tmp_path}" in error_line(result)


@pytest.fixture(scope="module")
def a_ray() -> Iterator[None]:
    """One Ray for all the tests here that score in this process."""
    with connect(None, 2):
        yield


@pytest.fixture(scope="module")
def digits(made: Chain) -> np.ndarray:
    content = (made.root / "data" / "mnist" / "t10k-images-idx3-ubyte").read_bytes()
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, 28, 28)[:100]


def rows_in(folder: Path) -> dict[Any, dict[str, Any]]:
    rows = pq.read_table(folder).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "pictures"])  # test_shards.py has the others
def test_a_source_gets_the_answers_of_onnx_runtime_in_process(
    a_ray: None, made: Chain, digits: np.ndarray, tmp_path: Path, kind: str
) -> None:
    source, images = tmp_path / kind, digits
    ids: list[Any] = list(range(100))
    if kind == "parquet":
        ids = [f"digit {index}" for index in ids]
        flat = pa.FixedSizeListArray.from_arrays(pa.array(digits.ravel()), 784)
        pq.write_table(pa.table({"id": ids, "image": flat}), source, row_group_size=33)
    else:
        source.mkdir()
        ids = [f"{index:03}.png" for index in range(10)]
        for name, image in zip(ids, digits, strict=False):
            (source / name).write_bytes(png(image))
        images = np.stack([read_image(source / name) for name in ids])
    done = score_source(
        made.paths, source, tmp_path / "out", ScoreConfig(rows=30, workers=1), Columns()
    )
    assert (done.images, done.scored, done.rejected) == (len(ids), len(ids), 0)
    outputs = predict(onnx_predictor(made.paths.onnx.read_bytes(), 1), images, 64)
    rows = rows_in(tmp_path / "out")
    assert set(rows) == set(ids)
    for key, output in zip(ids, outputs, strict=True):
        assert rows[key]["label"] == str(output.argmax())
        assert rows[key]["probability"] == pytest.approx(np.exp(output.max()), rel=1e-5)
        assert (rows[key]["version"], rows[key]["digest"]) == ("1", done.digest)
        assert len(rows[key]["top"]) == 3


def test_what_reads_the_answers_can_be_typed_whatever_the_folder_is_called() -> None:
    command = shlex.split(format_reader_command(Path("it's scored")))
    assert command[:2] == ["python", "-c"]
    compile(command[2], "next", "exec")
    assert repr("it's scored") in command[2]


@pytest.mark.slow
def test_bad_pictures_go_to_the_side_table_and_the_exit_code_is_1(
    a_ray: None, made: Chain, digits: np.ndarray, tmp_path: Path
) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for index in range(3):
        (source / f"{index}.png").write_bytes(png(digits[index]))
    (source / "1.png").write_bytes(png(digits[1])[:70])
    (source / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    result = made.run("--json", "score", str(source), "--output", str(out))
    assert result.exit_code == 1
    assert f"2 of 4 images could not be read; the reasons are in {out}/_rejected" in error_line(
        result
    )
    record = json.loads(result.stdout)
    assert (record["images"], record["scored"], record["rejected"]) == (4, 2, 2)
    assert set(rows_in(out)) == {"0.png", "2.png"}
    reasons = {row["id"]: row["reason"] for row in pq.read_table(out / "_rejected").to_pylist()}
    assert "cannot be read as an image" in reasons["1.png"]
    assert "its format is unknown" in reasons["notes.txt"]


@pytest.mark.slow
def test_ids_that_repeat_are_said(
    a_ray: None, made: Chain, digits: np.ndarray, tmp_path: Path
) -> None:
    source = tmp_path / "a.parquet"
    flat = pa.FixedSizeListArray.from_arrays(pa.array(digits.ravel()), 784)
    ids = [f"digit {index % 98}" for index in range(100)]
    pq.write_table(pa.table({"id": ids, "image": flat}), source, row_group_size=10)
    command = ["score", str(source), "--output", str(tmp_path / "id=1"), "--rows", "10"]
    assert made.record(*command)["repeated"] == 2
    assert ", 2 repeated ids" in made.run(*command).stdout


@pytest.mark.slow
def test_what_is_lost_is_scored_again_and_nothing_else(
    a_ray: None, made: Chain, digits: np.ndarray, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_bytes(idx(digits[:, 0]))
    config = ScoreConfig(rows=30, workers=1)
    score_source(made.paths, source, out, config, Columns())
    first = {path.name: path.read_bytes() for path in out.glob("part-*")}
    kept = (out / "part-000000.parquet").stat().st_mtime_ns
    (out / "part-000001.parquet").unlink()
    (out / "part-000003.parquet").write_bytes(b"cut")
    again = score_source(made.paths, source, out, config, Columns())
    assert (again.images, again.resumed, again.scored) == (100, 60, 100)
    assert {path.name: path.read_bytes() for path in out.glob("part-*")} == first
    assert (out / "part-000000.parquet").stat().st_mtime_ns == kept
    nothing = score_source(made.paths, source, out, config, Columns())
    assert (nothing.resumed, nothing.workers, nothing.images_per_second) == (100, 0, None)
    source.write_bytes(idx(digits[:90, 0]))
    with pytest.raises(PipelineError, match="its source_digest is .*start again"):
        score_source(made.paths, source, out, config, Columns())


@pytest.mark.slow
def test_what_goes_wrong_in_a_worker_is_an_error_in_a_line(
    a_ray: None, made: Chain, digits: np.ndarray, tmp_path: Path
) -> None:
    source = tmp_path / "a.parquet"
    flat = pa.FixedSizeListArray.from_arrays(pa.array(digits.ravel()), 784)
    pq.write_table(pa.table({"image": flat}), source, compression="none")
    content = bytearray(source.read_bytes())
    content[4:60] = b"\xff" * 56  # the header of its first page
    source.write_bytes(content)
    with pytest.raises(CorruptError, match="a.parquet is damaged"):
        score_source(made.paths, source, tmp_path / "out", ScoreConfig(), Columns())


@pytest.mark.slow
def test_what_is_compressed_is_scored_and_goes_on(
    a_ray: None, made: Chain, digits: np.ndarray, tmp_path: Path
) -> None:
    source, out = tmp_path / "images.gz", tmp_path / "out"
    source.write_bytes(gzip.compress(idx(digits[:, 0])))
    config = ScoreConfig(rows=60, workers=1)
    assert score_source(made.paths, source, out, config, Columns()).scored == 100
    (out / "part-000001.parquet").unlink()
    assert score_source(made.paths, source, out, config, Columns()).resumed == 60
    assert set(rows_in(out)) == set(range(100))
    assert not (out / "_unpacked").exists()
    source.write_bytes(damaged(source.read_bytes(), -8))
    result = made.run("score", str(source), "--output", str(tmp_path / "other"))
    assert result.exit_code == 4
    assert "cannot be decompressed" in error_line(result)


@pytest.mark.slow
def test_odd_names_and_links_do_not_stop_a_folder(
    a_ray: None, made: Chain, digits: np.ndarray, tmp_path: Path
) -> None:
    source, out = tmp_path / "pictures", tmp_path / "out"
    source.mkdir()
    (source / os.fsdecode(b"day\xe9.png")).write_bytes(png(digits[0]))
    (source / os.fsdecode(b"no\xe9.png")).touch()
    (source / "gone.png").symlink_to("nowhere")
    done = score_source(made.paths, source, out, ScoreConfig(workers=1), Columns())
    assert (done.images, done.scored, done.rejected) == (3, 1, 2)
    assert set(rows_in(out)) == {"day\\xe9.png"}
    assert set(rows_in(out / "_rejected")) == {"gone.png", "no\\xe9.png"}


@pytest.mark.parametrize("inside", [".", "out", "below/out"])
def test_answers_are_not_put_into_the_folder_that_is_read(
    made: Chain, digits: np.ndarray, tmp_path: Path, inside: str
) -> None:
    (tmp_path / "0.png").write_bytes(png(digits[0]))
    result = made.run("score", str(tmp_path), "--output", str(tmp_path / inside))
    assert result.exit_code == 1
    assert "choose an --output outside it" in error_line(result)
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]


def test_what_the_system_refuses_a_worker_is_an_error_in_a_line(
    made: Chain, digits: np.ndarray, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(idx(digits[:, 0]))
    whole = cut(source, (1, 28, 28), "digit", 100, tmp_path / "unused", Columns())
    source.unlink()
    shard = {"shard": np.array([pickle.dumps(whole.shards[0])], object)}
    error = pickle.loads(Reader(whole)(shard)["failed"][0])
    assert str(error).startswith(f"a worker cannot use {source} (No such file or directory): ")


def test_a_worker_without_its_model_says_so_with_its_first_shard(
    made: Chain, digits: np.ndarray, tmp_path: Path
) -> None:
    model = replace(read_selected_model(made.paths), path=str(tmp_path / "model.onnx"))
    source = tmp_path / "source"
    source.write_bytes(idx(digits[:, 0]))
    whole = cut(source, (1, 28, 28), "digit", 100, tmp_path / "unused", Columns())
    rows = Reader(whole)({"shard": np.array([pickle.dumps(whole.shards[0])], object)})
    scorer = Scorer(model, Folder(tmp_path / "out"), ScoreConfig())
    error = pickle.loads(scorer(rows)["failed"][0])
    assert str(error) == (
        f"cannot read {model.path} (No such file or directory): run the same command again"
    )


@pytest.mark.slow
def test_where_ray_gives_up_one_line_says_why(
    a_ray: None, made: Chain, digits: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import RayError  # not before `a_ray` has set what Ray reads

    def fail(self: object) -> None:
        raise RayError("Traceback\n  many lines\nthe node is low on memory\n")

    monkeypatch.setattr("ray.data.Dataset.iter_rows", fail)
    source = tmp_path / "source"
    source.write_bytes(idx(digits[:, 0]))
    result = made.run("score", str(source), "--output", str(tmp_path / "out"))
    assert result.exit_code == 1
    said = "Ray failed (RayError: the node is low on memory): run the same command again"
    assert said in error_line(result)


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "localhost:99999"])
def test_an_address_where_nothing_listens_is_one_line_and_exit_status_5(
    a_ray: None,
    made: Chain,
    digits: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # as in a process of its own
    source = tmp_path / "source"
    source.write_bytes(idx(digits[:, 0]))
    out = tmp_path / "out"
    result = made.run("score", str(source), "--output", str(out), "--address", address)
    assert result.exit_code == 5
    assert result.stderr.startswith(f"Error: no Ray cluster at {address} (")


def children(pid: int) -> set[int]:
    """All processes below one."""
    found = set[int]()
    for path in Path("/proc").glob("[0-9]*/task/*/children"):
        if int(path.parent.name) == pid:
            below = {int(child) for child in path.read_text().split()}
            found |= below.union(*(children(child) for child in below))
    return found


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """One whose path leaves room for the names of Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_killed_job_goes_on_and_leaves_nothing(
    made: Chain, digits: np.ndarray, tmp_path: Path, short_folder: Path
) -> None:
    source, out = tmp_path / "source.npy", tmp_path / "out"
    np.save(source, np.tile(digits, (100, 1, 1, 1)))
    environment = {**os.environ, "TMPDIR": str(short_folder)}
    command = [sys.executable, "-m", "pipeline", "--root", str(made.root), "--json", "score"]
    command += [str(source), "--output", str(out), "--rows", "250", "--workers", "1"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (parts := list(out.glob("part-*"))) and process.poll() is None:
        time.sleep(0.02)
    below = children(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(parts) < 40
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    record = json.loads(done.stdout)
    assert (record["images"], record["scored"]) == (10_000, 10_000)
    assert 0 < record["resumed"] < 10_000
    assert sorted(rows_in(out)) == list(range(10_000))
    assert done.stderr == "" or "images" in done.stderr
    assert not list(short_folder.glob(f"{SCRATCH}-*"))
    deadline = time.monotonic() + 60
    while any("MapWorker" in _name(pid) for pid in below) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in below if "MapWorker" in _name(pid)]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""

import errno
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.core import files
from pipeline.core.errors import CheckFailedError, CorruptError, PipelineError


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "record"
    files.write_bytes(path, b"old")

    def full(temporary: Path) -> None:
        temporary.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(PipelineError, match=r"No space left on device\); it is unchanged"):
        files.write_with(path, full)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_can_only_be_read_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(PipelineError, match="cannot write .*Read-only file system"):
        files.write_with(tmp_path / "record", refused)


def test_a_folder_where_a_file_should_be_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="Is a directory.* Name a file, not a folder"):
        files.write_bytes(tmp_path, b"content")


def test_a_write_returns_the_digest_of_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    assert files.write_bytes(path, b"content") == files.sha256(path) == files.sha256(b"content")


def test_a_file_that_reads_back_differently_is_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def bad_disk(source: Path, target: Path) -> None:
        replace(source, target)
        target.write_bytes(b"rotten")

    monkeypatch.setattr(os, "replace", bad_disk)
    with pytest.raises(CorruptError, match="does not read back"):
        files.write_bytes(tmp_path / "file", b"content")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"schema": 2}', b"\xff\xfe"])
def test_a_record_that_is_none_of_ours_is_corrupt(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"record\.json .*: make it again"):
        files.read_json(path, "make it again")


def test_a_missing_record_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="run 'pipeline train'"):
        files.read_json(tmp_path / "summary.json", "run 'pipeline train'")


def test_a_manifest_may_not_name_files_elsewhere(tmp_path: Path) -> None:
    files.write_json(tmp_path / "manifest.json", {"files": {"../secret": "0"}})
    with pytest.raises(CorruptError, match="names a file outside"):
        files.check_manifest(tmp_path, "export again")


def test_a_manifest_without_files_is_corrupt(tmp_path: Path) -> None:
    files.write_json(tmp_path / "manifest.json", {"files": None})
    with pytest.raises(CorruptError, match="lists no files"):
        files.check_manifest(tmp_path, "export again")


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "1"

    def interrupted() -> None:
        with files.create_folder(target) as folder:
            (folder / "half").write_bytes(b"")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with files.create_folder(target) as folder:
        (folder / "whole").write_bytes(b"")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_a_folder_that_exists_already_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model").write_bytes(b"kept")
    with pytest.raises(PipelineError, match="cannot write"), files.create_folder(tmp_path / "1"):
        pass
    assert (tmp_path / "1" / "model").read_bytes() == b"kept"


@dataclass(frozen=True)
class Server:
    pid: int
    models: dict[str, int]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"pid": "7", "models": {}}, r"`\$\.pid`"),
        ({"pid": True, "models": {}}, r"`\$\.pid`"),
        ({"pid": 7, "models": {"a": 1.5}}, r"`\$\.models"),
        ({"models": {}}, "`pid`"),
    ],
)
def test_a_record_with_a_wrong_field_is_corrupt_and_the_field_is_named(
    tmp_path: Path, fields: dict[str, object], what: str
) -> None:
    path = tmp_path / "server.json"
    files.write_json(path, fields)
    with pytest.raises(CorruptError, match=f"server.json is damaged .*{what}.*: remove it"):
        files.read_record(path, Server, "remove it")


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    files.write_json(tmp_path / "server.json", {"pid": 7, "models": {"a": 1}, "later": None})
    assert files.read_record(tmp_path / "server.json", Server, "") == Server(7, {"a": 1})


def _count(folder: Path, times: int) -> None:
    for _ in range(times):
        with files.locked(folder / "lock"):
            counter = int((folder / "counter").read_text())
            (folder / "counter").write_text(str(counter + 1))


def test_a_lock_keeps_processes_apart(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_count, args=(tmp_path, 50)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "counter").read_text() == "150"


def test_what_anybody_may_change_is_refused_with_its_path_and_the_mend(tmp_path: Path) -> None:
    model = tmp_path / "repository" / "m"
    (model / "1").mkdir(parents=True)
    file = model / "1" / "model.onnx"
    file.write_bytes(b"")
    files.refuse_shared(model.parent, [model])
    for path in (file, model / "1", model, model.parent):
        mode = path.stat().st_mode & 0o777
        path.chmod(mode | 0o002)
        with pytest.raises(CheckFailedError, match=f"{path} can be changed by .*chmod o-w"):
            files.refuse_shared(model.parent, [model])
        path.chmod(mode)
    files.refuse_shared(model.parent, [model])


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_inside_is_refused_and_one_that_leads_there_is_not(
    tmp_path: Path, target: str
) -> None:
    model = tmp_path / "repository" / "m"
    model.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(model.parent)
    files.refuse_shared(tmp_path / "link", [tmp_path / "link" / "m"])
    (model / "1").symlink_to(tmp_path / target)
    with pytest.raises(CheckFailedError, match=f"{model / '1'} is a link.*{target}"):
        files.refuse_shared(model.parent, [model])

import os
import tarfile
from pathlib import Path

import pytest

from pipeline.core.files import sha256
from pipeline.core.paths import Paths
from pipeline.core.signature import IMAGES, log_probabilities
from pipeline.repository import config_pbtxt, profiles
from pipeline.repository.package import upload_order, write_tar
from pipeline.repository.release import load_selected_releases
from pipeline.repository.settings import PackageConfig
from tests.conftest import Chain


@pytest.fixture
def packaged(tmp_path: Path) -> Path:
    """A model's folder with two versions, made without a model."""
    folder = tmp_path / "repository" / "m"
    for version in ("1", "2"):
        (folder / version).mkdir(parents=True)
        for name in ("model.onnx", "manifest.json", "golden.npz"):
            (folder / version / name).write_text(name + version)
    (folder / "warmup").mkdir()
    (folder / "warmup" / "digit").write_bytes(bytes(784))
    (folder / "labels.txt").write_text("0\n1\n")
    config = PackageConfig(cores=2)
    base = config_pbtxt.base_config("m", IMAGES, log_probabilities(2), "01", config)
    for version in ("1", "2"):
        config_pbtxt.set_parameter(base, f"sha256.{version}", version * 64)
    config_pbtxt.set_parameter(base, config_pbtxt.PREVIOUS, "2")
    config_pbtxt.select(base, 1)
    profiles.write_configs(folder, base, config)
    return folder


def test_a_version_is_uploaded_before_the_config_that_selects_it(packaged: Path) -> None:
    order = [str(path.relative_to(packaged)) for path in upload_order(packaged, 2, "model.onnx")]
    assert order[:5] == [
        "2/golden.npz",
        "2/manifest.json",
        "2/model.onnx",
        "labels.txt",
        "warmup/digit",
    ]
    assert all(name.startswith("configs/") for name in order[5:-1])
    assert order[-1] == "config.pbtxt"


def test_a_tar_has_the_same_bytes_whoever_packs_it_and_when(packaged: Path, tmp_path: Path) -> None:
    first = write_tar(packaged, 2, "model.onnx", tmp_path / "a.tar")
    for path in sorted(packaged.rglob("*")):
        os.utime(path, (1, 1))
        path.chmod(0o700 if path.is_dir() else 0o600)
    again = write_tar(packaged, 2, "model.onnx", tmp_path / "elsewhere" / "b.tar")
    assert first == again == sha256(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar:
            assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
            assert (member.mtime, member.mode) == (0, 0o644)


def test_a_tar_selects_the_version_that_it_has_and_knows_no_other(
    packaged: Path, tmp_path: Path
) -> None:
    write_tar(packaged, 2, "model.onnx", tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    unpacked = tmp_path / "out" / "m"
    assert [path.name for path in unpacked.glob("[0-9]*")] == ["2"]
    for path in config_pbtxt.config_files(unpacked):
        message = config_pbtxt.read(path)
        assert config_pbtxt.selected(message) == [2]
        assert config_pbtxt.digest(message, "2") == "2" * 64
        assert (
            config_pbtxt.digest(message, "1")
            is config_pbtxt.parameter(message, config_pbtxt.PREVIOUS)
            is None
        )
    assert config_pbtxt.selected(config_pbtxt.read(packaged / "config.pbtxt")) == [
        1
    ]  # it only reads


def test_an_unpacked_release_is_a_repository_that_can_be_served(
    chain: Chain, tmp_path: Path
) -> None:
    done = chain.record("package", "--archive")
    assert done["archive"] == str(chain.paths.exported / "handwriting-2.tar")
    assert done["archive_sha256"] == sha256(Path(done["archive"]))
    with tarfile.open(done["archive"]) as tar:
        tar.extractall(tmp_path / "repository", filter="data")
    paths = Paths(tmp_path, repository_folder=tmp_path / "repository")
    releases = load_selected_releases(paths, "latency")
    assert {name: release.version for name, release in releases.items()} == {"handwriting": 2}
    named = chain.record("package", "--archive", str(tmp_path / "mine.tar"))
    assert (named["archive"], named["version"]) == (str(tmp_path / "mine.tar"), 3)
    refused = chain.run("package", "--archive", str(tmp_path))  # a folder, seen before packaging
    assert (refused.exit_code, (chain.paths.packaged / "4").exists()) == (2, False)

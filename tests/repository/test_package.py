import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import sha256
from pipeline.core.paths import Paths
from pipeline.core.signature import IMAGES, TensorSpec, log_probabilities
from pipeline.repository import config_pbtxt
from pipeline.repository.package import package_model
from pipeline.repository.profiles import PROFILES
from pipeline.repository.release import find_versions
from pipeline.repository.settings import PackageConfig
from tests.conftest import Chain, edit_json, error_line, flip_bit

HANG_GUARD = 60.0  # seconds


def config_of(chain: Chain) -> config_pbtxt.ModelConfig:
    return config_pbtxt.read(chain.paths.packaged / "config.pbtxt")


def test_a_packaged_model_has_everything_that_triton_and_an_auditor_need(made: Chain) -> None:
    folder = made.paths.packaged
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [
        *(
            "1/MODEL_CARD.md",
            "1/golden.npz",
            "1/manifest.json",
            "1/model.onnx",
            "1/reference_profile.json",
            "1/validation.json",
        ),
        "config.pbtxt",
        *(f"configs/{name}.pbtxt" for name in sorted(PROFILES) if name != "config"),
        *("labels.txt", "warmup/digit"),
    ]
    assert (folder / "1" / "model.onnx").read_bytes() == made.paths.onnx.read_bytes()
    assert (folder / "labels.txt").read_text().split() == list("0123456789")
    assert len((folder / "warmup" / "digit").read_bytes()) == 28 * 28
    manifest = json.loads((folder / "1" / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        *("MODEL_CARD.md", "golden.npz", "model.onnx", "reference_profile.json", "validation.json")
    }


def test_the_config_is_what_the_graph_says(made: Chain) -> None:
    config = config_of(made)
    assert (config.name, config.backend) == ("handwriting", "onnxruntime")
    assert config.max_batch_size == 64
    (images,), (outputs,) = config.input, config.output
    assert (images.name, list(images.dims)) == ("images", [1, 28, 28])
    assert model_config_pb2.DataType.Name(images.data_type) == "TYPE_UINT8"
    assert model_config_pb2.ModelInput.Format.Name(images.format) == "FORMAT_NCHW"
    assert (outputs.name, list(outputs.dims)) == ("log_probabilities", [10])
    assert outputs.label_filename == "labels.txt"
    assert config.HasField("dynamic_batching")
    assert config.instance_group[0].count == 1
    assert [rung.batch_size for rung in config.model_warmup] == [1, 2, 4, 8, 16, 32, 64]
    assert config.model_warmup[0].inputs["images"].input_data_file == "digit"
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, accelerator.parameters["use_tf32"]) == ("cuda", "0")
    assert config_pbtxt.parameter(config, "intra_op_thread_count") == "1"
    assert config_pbtxt.digest(config, "1") == sha256(made.paths.onnx)
    assert config_pbtxt.selected(config) == [1]
    assert config_pbtxt.classes(config) == tuple("0123456789")


def test_packaging_again_adds_a_version_and_keeps_the_digests_of_the_others(chain: Chain) -> None:
    assert chain.record("package", "--max-batch-size", "8")["version"] == 2
    config = config_of(chain)
    assert config_pbtxt.selected(config) == [2]
    assert config.max_batch_size == 8
    assert (
        config_pbtxt.digest(config, "1")
        == config_pbtxt.digest(config, "2")
        == sha256(chain.paths.onnx)
    )
    assert (chain.paths.packaged / "1" / "model.onnx").exists()


def test_versions_count_as_numbers(tmp_path: Path) -> None:
    for name in ("9", "10", "02", "1a", "notes"):
        (tmp_path / name).mkdir()
    assert find_versions(tmp_path) == [9, 10]


def _package(root: Path, begin: Barrier, count: int) -> None:
    def one() -> int:
        begin.wait(HANG_GUARD)
        return package_model(Paths(root))[0].version

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(one) for _ in range(count)]:
            future.result()


@pytest.mark.slow
def test_sixteen_packagers_at_once_get_a_version_each(chain: Chain) -> None:
    spawn = multiprocessing.get_context("spawn")
    begin = spawn.Barrier(16)  # two processes of eight threads each
    processes = [spawn.Process(target=_package, args=(chain.root, begin, 8)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 2
    folders = sorted(int(path.name) for path in chain.paths.packaged.glob("[0-9]*"))
    assert folders == list(range(1, 18))
    config = config_of(chain)
    assert {config_pbtxt.digest(config, str(n)) for n in folders} == {sha256(chain.paths.onnx)}
    assert (config_pbtxt.selected(config), config_pbtxt.previous(config)) == ([17], 16)


@pytest.mark.parametrize("call", ["rename", "replace", "fsync"])
def test_what_a_killed_packager_left_is_cleared_by_the_next(chain: Chain, call: str) -> None:
    code = (
        f"import os, signal; os.{call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"from pipeline.cli.main import main; main(['--root', {str(chain.root)!r}, 'package'])"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=HANG_GUARD)
    assert killed.returncode == -signal.SIGKILL
    assert list(chain.paths.packaged.rglob(".*.tmp"))
    (chain.paths.packaged / ".notes.tmp").touch()  # not ours
    version = chain.record("package")["version"]
    assert [path.name for path in chain.paths.packaged.rglob(".*.tmp")] == [".notes.tmp"]
    assert (chain.paths.packaged / str(version) / "manifest.json").exists()
    assert config_pbtxt.selected(config_of(chain)) == [version]


def test_what_a_killed_packager_left_of_an_archive_is_cleared_by_the_next(chain: Chain) -> None:
    left = chain.paths.exported / f".handwriting-2.tar.{0:08x}.tmp"
    others = chain.paths.exported / f".handwriting-3.tar.{0:08x}.tmp"
    for path in (left, others):
        path.touch()
    assert chain.run("package", "--archive").exit_code == 0
    assert not left.exists()
    assert others.exists()


def test_an_export_that_was_never_validated_is_refused_with_3(chain: Chain) -> None:
    chain.paths.validation.unlink()
    edit_json(chain.paths.manifest, lambda record: record["files"].pop("validation.json"))
    result = chain.run("package")
    assert result.exit_code == 3
    assert "is not validated: run 'pipeline validate' first" in error_line(result)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "validation.json", "model.pt2"])
def test_a_file_with_a_flipped_bit_is_refused_with_4_and_named(chain: Chain, name: str) -> None:
    shutil.rmtree(chain.paths.repository)
    flip_bit(chain.paths.export / name)
    result = chain.run("package")
    assert result.exit_code == 4
    assert str(chain.paths.export / name) in error_line(result)
    assert "pipeline" in error_line(result)
    assert not chain.paths.repository.exists()


@pytest.mark.slow
def test_a_thousand_bit_flips_of_the_model_are_all_refused(chain: Chain) -> None:
    shutil.rmtree(chain.paths.repository)
    sound = chain.paths.onnx.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(sound), 1000):
        broken = bytearray(sound)
        broken[bit // 8] ^= 1 << (bit % 8)
        chain.paths.onnx.write_bytes(broken)
        with pytest.raises(CorruptError, match=r"model\.onnx does not match its digest"):
            package_model(chain.paths)
    assert not chain.paths.repository.exists()
    chain.paths.onnx.write_bytes(sound)
    assert [one.version for one in package_model(chain.paths)] == [1]


def test_a_batch_larger_than_the_proof_has_tried_is_refused(chain: Chain) -> None:
    result = chain.run("package", "--max-batch-size", "257")
    assert result.exit_code == 1
    assert "--max-batch-size 257 is not validated: use at most 256" in error_line(result)
    assert chain.run("package", "--max-batch-size", "256").exit_code == 0


def test_a_validation_of_other_bytes_is_refused_with_4(chain: Chain) -> None:
    edit_json(chain.paths.validation, lambda r: r["variants"][0].update(sha256="0" * 64))
    digest = sha256(chain.paths.validation)
    edit_json(chain.paths.manifest, lambda r: r["files"].update({"validation.json": digest}))
    result = chain.run("package")
    assert result.exit_code == 4
    assert str(chain.paths.onnx) in error_line(result)


def test_a_validation_that_did_not_pass_is_refused_with_3(chain: Chain) -> None:
    edit_json(chain.paths.validation, lambda record: record.update(passed=False))
    digest = sha256(chain.paths.validation)
    edit_json(chain.paths.manifest, lambda r: r["files"].update({"validation.json": digest}))
    assert chain.run("package").exit_code == 3


def test_a_version_that_changes_what_clients_rely_on_is_refused_with_3(chain: Chain) -> None:
    edit_json(chain.paths.manifest, lambda record: record.update(classes=list("abcdefghij")))
    result = chain.run("package")
    assert result.exit_code == 3
    assert "would change the classes" in error_line(result)
    config = chain.paths.packaged / "config.pbtxt"
    edit_json(chain.paths.manifest, lambda record: record.update(classes=list("0123456789")))
    config.write_text(config.read_text().replace('"log_probabilities"', '"logits"'))
    assert chain.run("package").exit_code == 3
    assert sorted(p.name for p in chain.paths.packaged.glob("[0-9]*")) == ["1"]


def test_a_config_that_does_not_parse_says_where(chain: Chain) -> None:
    config = chain.paths.packaged / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size", "max_bach_size"))
    result = chain.run("package")
    assert result.exit_code == 1
    assert f"{config} does not parse" in error_line(result)
    assert "max_bach_size" in error_line(result)


def test_a_tensor_type_that_is_not_packaged_is_named() -> None:
    odd = TensorSpec("images", "complex64", (1, 28, 28))
    with pytest.raises(PipelineError, match="images is complex64"):
        config_pbtxt.base_config("m", odd, log_probabilities(10), "ab", PackageConfig())


def test_a_config_of_others_has_numbers_for_classes() -> None:
    message = config_pbtxt.base_config("m", IMAGES, log_probabilities(3), "abc", PackageConfig())
    del message.parameters["classes"]
    assert config_pbtxt.classes(message) == ("0", "1", "2")
    assert config_pbtxt.classes(config_pbtxt.ModelConfig()) == ()
    assert config_pbtxt.digest(message, "1") is None


def test_a_repository_that_anybody_may_change_gets_no_version_and_is_not_served(
    chain: Chain,
) -> None:
    folder = chain.paths.packaged / "1"
    folder.chmod(0o777)
    for command in ("package", "serve"):
        result = chain.run(command)
        assert result.exit_code == 3
        assert error_line(result).startswith(f"{folder} can be changed by any user")
    folder.chmod(0o755)
    (chain.paths.packaged / "2").symlink_to(folder)
    assert chain.run("package").exit_code == 3
    assert "is a link" in error_line(chain.run("serve"))


def test_a_missing_repository_says_how_to_make_one(empty: Chain) -> None:
    result = empty.run("serve")
    assert result.exit_code == 1
    assert "run 'pipeline package' first" in error_line(result)

"""Versions at rest; tests/test_swap.py has those under a running server."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline.core.files import sha256
from pipeline.export.runtime import onnx_predictor
from pipeline.repository import config_pbtxt, versions
from pipeline.repository.golden import Golden, pack_golden
from pipeline.repository.release import load_release
from pipeline.repository.running import start_time
from tests.conftest import Chain, edit_json, error_line, flip_bit


def seal(chain: Chain, version: int) -> None:
    """Bring manifest and configs in line with a version's files, as if it was packaged so."""
    folder = chain.paths.packaged / str(version)
    record = json.loads((folder / "manifest.json").read_text())
    digests = {name: sha256(folder / name) for name in record["files"]}
    edit_json(folder / "manifest.json", lambda record: record.update(files=digests))
    for path in config_pbtxt.config_files(chain.paths.packaged):
        message = config_pbtxt.read(path)
        config_pbtxt.set_parameter(message, f"sha256.{version}", digests["model.onnx"])
        path.write_text(config_pbtxt.to_text(message))


def add_another(chain: Chain) -> int:
    """Package a version, and give it another network's weights with a golden set that fits them."""
    version = int(chain.record("package")["version"])
    folder = chain.paths.packaged / str(version)
    model = onnx.load(folder / "model.onnx")
    bias = next(t for t in model.graph.initializer if list(t.dims) == [10])
    changed = numpy_helper.to_array(bias) + np.linspace(-2, 2, 10, dtype=np.float32)
    bias.CopyFrom(numpy_helper.from_array(changed, bias.name))
    onnx.save(model, folder / "model.onnx")
    golden = load_release(chain.paths, 1).golden
    outputs = onnx_predictor(model.SerializeToString())(golden.images).astype(np.float64)
    fitting = Golden(golden.images, golden.labels, outputs, golden.bounds)
    (folder / "golden.npz").write_bytes(pack_golden(fitting))
    seal(chain, version)
    return version


def add_profile(chain: Chain) -> Path:
    """A config of another name beside config.pbtxt."""
    profile = chain.paths.packaged / "configs" / "cpu.pbtxt"
    profile.parent.mkdir(exist_ok=True)
    shutil.copy(chain.paths.packaged / "config.pbtxt", profile)
    return profile


def configs(chain: Chain) -> list[config_pbtxt.ModelConfig]:
    return [config_pbtxt.read(path) for path in config_pbtxt.config_files(chain.paths.packaged)]


def selection(chain: Chain) -> set[tuple[int, int | None]]:
    """What the configs say is selected, and what before; one of it where they agree."""
    return {
        (max(config_pbtxt.selected(config)), config_pbtxt.previous(config))
        for config in configs(chain)
    }


def test_the_first_version_is_selected_and_so_is_one_made_while_no_server_runs(
    chain: Chain,
) -> None:
    assert selection(chain) == {(1, None)}
    record = chain.record("package")
    assert (record["version"], record["is_selected"]) == (2, True)
    assert selection(chain) == {(2, 1)}
    assert config_pbtxt.digest(configs(chain)[0], "1") == record["sha256"]  # the same one again


def test_promote_and_rollback_select_in_every_config_and_remove_nothing(chain: Chain) -> None:
    chain.record("package")
    add_profile(chain)
    for command, expected in (
        (["promote", "1"], (1, 2)),
        (["promote", "1"], (1, 2)),
        (["rollback"], (2, 1)),
        (["rollback"], (1, 2)),
    ):
        change = chain.record("versions", *command)
        assert selection(chain) == {expected}
        assert (change["version"], change["is_served"]) == (expected[0], False)
    folders = sorted(path.name for path in chain.paths.packaged.glob("[0-9]*"))
    assert folders == ["1", "2"]


def test_nothing_but_the_selection_changes_in_a_config(chain: Chain) -> None:
    chain.record("package", "--max-batch-size", "8", "--instances", "2")
    before = [config_pbtxt.run_settings(config) for config in configs(chain)]
    assert chain.run("versions", "promote", "1").exit_code == 0
    assert [config_pbtxt.run_settings(config) for config in configs(chain)] == before


def test_the_list_says_what_each_version_is(chain: Chain) -> None:
    add_another(chain)
    chain.record("package")
    (chain.paths.packaged / "3" / "manifest.json").write_text("{")
    listing = chain.record("versions", "list")
    assert [one["version"] for one in listing["versions"]] == [1, 2, 3]
    first, second, third = listing["versions"]
    assert first["sha256"] == sha256(chain.paths.onnx) != second["sha256"]
    assert 0.9 < first["accuracy"] <= 1
    assert (third["is_selected"], second["is_previous"], listing["served"]) == (True, True, None)
    assert "not readable JSON" in third["problem"]
    text = chain.run("versions", "list").stdout
    assert "previous" in text
    assert "manifest.json is not readable JSON" in text


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "validation.json"])
def test_a_version_with_a_flipped_bit_is_not_promoted(chain: Chain, name: str) -> None:
    chain.record("package")
    flip_bit(chain.paths.packaged / "1" / name)
    result = chain.run("versions", "promote", "1")
    assert result.exit_code == 4
    assert name in error_line(result)
    assert selection(chain) == {(2, 1)}


def test_a_version_whose_digest_one_config_states_otherwise_is_not_promoted(chain: Chain) -> None:
    chain.record("package")
    profile = add_profile(chain)
    profile.write_text(profile.read_text().replace(sha256(chain.paths.onnx), "0" * 64))
    result = chain.run("versions", "promote", "1")
    assert result.exit_code == 3
    assert f"{profile} states digest 000000000000 for version 1, but" in error_line(result)
    assert selection(chain) == {(2, 1)}


def test_a_single_version_is_served_next_and_of_several_one_is_promoted(chain: Chain) -> None:
    assert chain.run("versions", "list").stdout.endswith("next: pipeline serve --detach\n")
    chain.record("package")
    assert chain.run("versions", "list").stdout.endswith("next: pipeline versions promote N\n")


def test_what_cannot_be_promoted_or_gone_back_to_is_one_line(chain: Chain) -> None:
    unknown = chain.run("versions", "promote", "7")
    assert unknown.exit_code == 1
    assert "handwriting has no version 7; its versions: 1" in error_line(unknown)
    back = chain.run("versions", "rollback")
    assert back.exit_code == 1
    assert "has no previous version" in error_line(back)
    assert chain.run("versions", "promote", "0").exit_code == 2
    other = chain.run("versions", "list", "--name", "digits")
    assert "there is no model 'digits' here: there is handwriting" in error_line(other)


def test_prune_keeps_the_selected_the_previous_and_what_is_newer(chain: Chain) -> None:
    for _ in range(4):
        chain.record("package")
    add_profile(chain)
    chain.record("versions", "promote", "2")
    chain.record("versions", "promote", "4")
    assert chain.record("versions", "prune")["removed"] == [1, 3]
    assert sorted(path.name for path in chain.paths.packaged.iterdir() if path.is_dir()) == [
        *("2", "4", "5", "configs", "warmup")
    ]
    for config in configs(chain):
        digests = {key for key in config.parameters if key.startswith("sha256.")}
        assert digests == {"sha256.2", "sha256.4", "sha256.5"}
    assert chain.record("versions", "prune")["removed"] == []
    assert chain.record("package")["version"] == 6


def test_prune_refuses_where_nothing_is_selected(chain: Chain) -> None:
    config = chain.paths.packaged / "config.pbtxt"
    config.write_text(config.read_text().replace("versions: 1", ""))
    assert "selects no version" in error_line(chain.run("versions", "prune"))


def test_a_difference_is_in_records_and_in_answers(chain: Chain) -> None:
    chain.record("package")
    same = versions.diff_versions(chain.paths, 1, 2)
    assert (same.records, same.differing, same.max_abs_diff) == ({}, 0, 0.0)
    other = add_another(chain)
    record = chain.record("versions", "diff", "1", str(other))
    assert record["images"] == 200
    assert record["differing"] > 0
    assert record["max_abs_diff"] > 1
    assert list(record["records"]) == ["files.golden.npz", "files.model.onnx"]
    assert "differing classes" in chain.run("versions", "diff", "1", str(other)).stdout


@pytest.mark.parametrize("spoil", ["a link", "changed by any user"])
def test_a_version_that_others_may_change_is_not_promoted(chain: Chain, spoil: str) -> None:
    chain.record("package")
    model = chain.paths.packaged / "1" / "model.onnx"
    if spoil == "a link":
        model.rename(chain.root / "elsewhere")
        model.symlink_to(chain.root / "elsewhere")
    else:
        model.chmod(0o666)
    result = chain.run("versions", "promote", "1")
    assert result.exit_code == 3
    assert spoil in error_line(result)
    assert selection(chain) == {(2, 1)}


def pretend_to_serve(chain: Chain, name: str = "handwriting") -> None:
    """A record of a server whose process, this one, is alive."""
    pid = os.getpid()
    record = dict.fromkeys(("http_port", "grpc_port", "metrics_port"), 1)
    record |= {"pid": pid, "supervisor_pid": pid}
    record |= dict.fromkeys(("start_time", "supervisor_start_time"), start_time(pid) or 0)
    said: dict[str, object] = {"schema": 1, "id": f"handwriting-{0:012x}", "admin_key": ""}
    said |= {
        "runtime": "wheel",
        "is_ready": True,
        "profile": "",
        "ready_at": 0.0,
        "restarts": 0,
        "why": "",
    }
    said["root"] = str(chain.root.resolve())
    chain.paths.server.write_text(json.dumps({**record, **said, "models": {name: 1}}))


def test_a_version_packaged_while_a_server_runs_waits_for_its_promotion(chain: Chain) -> None:
    add_profile(chain)
    before = [
        (config_pbtxt.run_settings(one), config_pbtxt.selected(one)) for one in configs(chain)
    ]
    digit = (chain.paths.packaged / "warmup" / "digit").stat()
    pretend_to_serve(chain)
    record = chain.record("package")
    assert (record["version"], record["is_selected"]) == (2, False)
    assert [
        (config_pbtxt.run_settings(one), config_pbtxt.selected(one)) for one in configs(chain)
    ] == before
    assert {config_pbtxt.digest(one, "2") for one in configs(chain)} == {record["sha256"]}
    assert (chain.paths.packaged / "warmup" / "digit").stat() == digit
    result = chain.run("package")
    assert "next: pipeline versions promote 3" in result.stdout
    changed = chain.run("package", "--max-batch-size", "8", "--intra-op-threads", "2")
    assert changed.exit_code == 1
    assert "would change (intra_op_thread_count, max_batch_size" in error_line(changed)
    chain.paths.server.unlink()
    assert chain.record("package", "--max-batch-size", "8")["is_selected"]
    assert selection(chain) == {(4, 1)}


def test_a_server_of_other_models_or_a_dead_one_does_not_keep_a_version_waiting(
    chain: Chain,
) -> None:
    pretend_to_serve(chain, "digits")
    assert chain.record("package")["is_selected"]
    pretend_to_serve(chain)
    dead = dict.fromkeys(("start_time", "supervisor_start_time"), 1)
    edit_json(chain.paths.server, lambda record: record.update(dead))
    assert chain.record("package")["is_selected"]


def test_prune_keeps_what_a_server_answers_with(chain: Chain) -> None:
    for _ in range(3):
        chain.record("package")
    pretend_to_serve(chain)
    assert chain.record("versions", "prune")["removed"] == [2]

import errno
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import sha256
from pipeline.core.paths import Paths
from pipeline.data.splits import Split
from pipeline.training import loop
from pipeline.training.checkpoint import RunState, load_checkpoint, load_state, save_state
from pipeline.training.device import choose_placement
from pipeline.training.recipes import RECIPES, TrainConfig, make_recipe
from pipeline.training.run import read_run_config
from tests.conftest import Chain, edit_json
from tests.ranks import Forked, run_pipeline, start
from tools import prove_resume

FLIPS, CUTS = 100, 20  # of each file


def damaged(content: bytes) -> Iterator[bytes]:
    """The content with one bit flipped, and cut short, at places drawn from a seed."""
    rng = random.Random(0)
    for _ in range(FLIPS):
        copy = bytearray(content)
        copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
        yield bytes(copy)
    for _ in range(CUTS):
        yield content[: rng.randrange(len(content))]


def refused(file: Path, load: Callable[[], object]) -> int:
    """How many kinds of damage to `file` `load` refuses as corrupt."""
    content = file.read_bytes()
    count = 0
    for copy in damaged(content):
        file.write_bytes(copy)
        with pytest.raises(CorruptError):
            load()
        count += 1
    file.write_bytes(content)
    load()
    return count


@pytest.fixture
def states() -> list[RunState]:
    """Three states of a short run on made images."""
    split = Split(np.zeros((64, 1, 28, 28), np.uint8), np.arange(64) % 10, tuple("0123456789"))
    saved: list[RunState] = []
    settings = make_recipe("quick", epochs=4, batch_size=32)
    loop.train(
        TrainConfig(settings=settings), split, split, choose_placement("cpu"), save=saved.append
    )
    return saved


@pytest.mark.slow
def test_flipped_bits_and_cuts_of_the_weights_are_all_refused(
    chain: Chain,
) -> None:
    paths = chain.paths
    assert refused(paths.weights, lambda: load_checkpoint(paths)) == FLIPS + CUTS


@pytest.mark.slow
def test_flipped_bits_and_cuts_of_a_checkpoint_are_all_refused(
    tmp_path: Path, states: list[RunState]
) -> None:
    paths = Paths(tmp_path)
    save_state(paths, states[0], {})
    (file,) = paths.checkpoint.glob("step-*.safetensors")
    assert refused(file, lambda: load_state(paths, {})) == FLIPS + CUTS


def test_what_points_at_the_checkpoint_is_refused_or_read_as_it_was_written(
    tmp_path: Path, states: list[RunState]
) -> None:
    paths = Paths(tmp_path)
    save_state(paths, states[0], {})
    pointer = paths.checkpoint / "latest.json"
    content = pointer.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            copy = bytearray(content)
            copy[position] ^= 1 << bit
            pointer.write_bytes(bytes(copy))
            try:
                state = load_state(paths, {})
            except CorruptError:
                continue
            assert state is not None
            assert state.step == states[0].step
            before, after = (json.loads(text) for text in (content, bytes(copy)))
            assert before == after  # white space, or a digit's other spelling


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_leaves_the_old_checkpoint_and_says_so_in_a_sentence(
    tmp_path: Path, states: list[RunState], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    paths = Paths(tmp_path)
    save_state(paths, states[0], {})

    def fail(file: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    fix = "Check its folder's permissions" if number == errno.EROFS else "Free some space"
    with pytest.raises(PipelineError, match=rf"cannot write .*it is unchanged\. {fix}, or"):
        save_state(paths, states[1], {})
    monkeypatch.undo()
    state = load_state(paths, {})
    assert state is not None
    assert state.step == states[0].step
    assert not list(paths.checkpoint.glob(".*"))


@pytest.mark.slow
def test_a_run_that_cannot_write_ends_with_1_and_goes_on_when_there_is_space_again(
    made: Chain, empty: Chain
) -> None:
    train = ["train", "--recipe", "quick", "--epochs", "0.125", "--save-every", "10"]

    log = empty.root / "log"
    # So many bytes and no more: the config and the metrics fit, a checkpoint does not.
    command = ["--root", str(empty.root), *train]
    assert start(run_pipeline, *command, log=log, largest_file=100_000).wait() == 1
    said = log.read_text()
    assert "Traceback" not in said
    assert "cannot write" in said
    assert "it is unchanged" in said
    assert empty.run(*train, "--resume").exit_code == 0
    assert sha256(empty.paths.weights) == sha256(made.paths.weights)


@pytest.mark.slow
def test_a_kill_changes_no_bit_of_the_weights(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork(root: Path, epochs: float, *options: str) -> Forked:
        command = ["--root", str(root), "-q", *prove_resume.TRAIN, *options]
        return start(run_pipeline, *command, "--epochs", str(epochs), log=root / "log")

    monkeypatch.setattr(prove_resume, "start", fork)  # which imports torch for each process
    outcome = prove_resume.prove(empty.root, kills=1, inside=1, epochs=0.06)
    assert outcome.is_perfect, outcome
    assert outcome.kills == 1


def test_a_state_of_another_identity_is_refused_with_the_differences(
    tmp_path: Path, states: list[RunState]
) -> None:
    paths = Paths(tmp_path)
    then = {"seed": 0, "threads": 2, "torch": "2.13.0", "data": {"a": "1"}}
    save_state(paths, states[0], then)
    for key, value in (("threads", 1), ("torch", "2.14.0"), ("data", {"a": "2"}), ("seed", 7)):
        with pytest.raises(PipelineError, match=f"cannot resume exactly: {key} was .*, is "):
            load_state(paths, {**then, key: value})
    assert load_state(replace(paths, run="other"), then) is None


def test_records_of_other_versions_are_read_and_values_of_another_type_are_named(
    chain: Chain,
) -> None:
    paths = chain.paths

    def of_another_version(record: dict[str, Any]) -> None:
        record["later"] = {"a": 1}
        record.pop("python", None)

    for file in (paths.summary, paths.run_config):
        edit_json(file, of_another_version)
    assert load_checkpoint(paths).summary.python == ""
    config = read_run_config(paths)
    assert config == load_checkpoint(paths).config
    edit_json(paths.summary, lambda record: record.update(steps="7"))
    with pytest.raises(CorruptError, match=r"summary\.json is damaged .*steps"):
        load_checkpoint(paths)
    edit_json(paths.run_config, lambda record: record["settings"].update(epochs="7"))
    with pytest.raises(CorruptError, match=r"config\.json is damaged .*settings\.epochs"):
        read_run_config(paths)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_config_that_was_read_back_is_written_with_the_same_bytes(recipe: str) -> None:
    written = json.dumps(TrainConfig.of(recipe, epochs=2).record())
    assert json.dumps(TrainConfig.from_record(json.loads(written)).record()) == written

import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from pipeline.core.errors import LostError, PipelineError
from pipeline.core.files import sha256
from pipeline.data.splits import Split
from pipeline.training.device import Placement, process_group, synchronize
from pipeline.training.loop import Batches
from pipeline.training.networks import build
from pipeline.training.recipes import make_recipe
from tests import one_step
from tests.conftest import Chain
from tests.ranks import exit_codes, run_pipeline, run_torchrun, start, start_two

CPU = torch.device("cpu")
TRAIN = ["train", "--recipe", "quick", "--epochs", "0.04"]


@pytest.mark.slow
def test_a_step_of_two_processes_is_the_step_of_one_on_the_same_batch(tmp_path: Path) -> None:
    one_step.main(tmp_path / "one")
    processes = start_two(one_step.main, tmp_path / "two", log=tmp_path / "log")
    assert exit_codes(processes) == [0, 0], (tmp_path / "log").read_text()
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.pop("images").item() == 128
    assert two.pop("images").item() == 64
    assert one.keys() == two.keys()
    torch.manual_seed(0)
    fresh = build(make_recipe("quick"), 10).state_dict()
    weight = "classifier.weight"
    assert not torch.allclose(one[weight], fresh[weight], rtol=0, atol=1e-3)  # it did learn
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=0, atol=1e-6), name


@pytest.mark.slow
def test_a_lost_process_ends_the_job_with_a_message_and_the_rest_is_resumed(empty: Chain) -> None:
    # After "--" torchrun does not take our --run for the beginning of its own --run-path.
    options = ["--standalone", "--nproc-per-node", "2", "-m", "--", "pipeline"]
    root, log = ["--root", str(empty.root)], empty.root / "log"
    whole = start(run_torchrun, *options, *root, *TRAIN, "--run", "whole", log=log)
    assert whole.wait() == 0, log.read_text()
    said = log.read_text()
    assert said.count("training whole with") == 1  # the first process speaks for all
    assert "1 thread in each of 2 processes" in said
    cut = [*root, *TRAIN, "--save-every", "1", "--run", "cut"]
    job = start_two(run_pipeline, *cut, log=log)
    checkpoint = empty.root / "runs" / "cut" / "checkpoint" / "latest.json"
    while not checkpoint.exists():
        assert job[0].is_alive(), log.read_text()
        time.sleep(0.01)
    job[1].kill()
    assert exit_codes(job) == [LostError.exit_code, -signal.SIGKILL]
    assert re.search("Error: process 0 of 2 lost another process .* --resume", log.read_text())
    assert exit_codes(start_two(run_pipeline, *cut, "--resume", log=log)) == [0, 0], log.read_text()
    assert "resuming after step" in log.read_text()
    runs = [empty.root / "runs" / run / "model.safetensors" for run in ("whole", "cut")]
    assert sha256(runs[0]) == sha256(runs[1])
    alone = empty.run(*TRAIN, "--run", "cut", "--resume")
    assert alone.exit_code == 0  # it is finished: how many processes made it is no setting


def test_the_processes_share_each_batch_without_overlap() -> None:
    images = np.zeros((64, 1, 28, 28), np.uint8)
    split = Split(images, np.arange(64), tuple("0123456789"))
    settings = replace(make_recipe("quick"), batch_size=32)

    def labels(rank: int, processes: int) -> list[int]:
        placement = Placement(CPU, "", rank=rank, processes=processes)
        return Batches(split, settings, 0, placement).at(1)[1].tolist()

    assert sorted(labels(0, 2) + labels(1, 2)) == sorted(labels(0, 1))
    with pytest.raises(PipelineError, match="a batch of 32 cannot be divided among 3 processes"):
        labels(0, 3)


def test_a_single_process_asks_nobody() -> None:
    placement = Placement(CPU, "")
    with process_group(placement):
        assert synchronize(placement, 0.5, True) == (0.5, True)


def test_a_bug_in_a_job_of_several_is_not_taken_for_a_lost_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "init_process_group", lambda *_, **__: None)
    with (
        pytest.raises(RuntimeError, match="shapes"),
        process_group(Placement(CPU, "", processes=2)),
    ):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    lost = "[../gloo/transport/tcp/pair.cc:544] Connection closed by peer"
    with (
        pytest.raises(LostError, match="process 0 of 2"),
        process_group(Placement(CPU, "", processes=2)),
    ):
        raise RuntimeError(lost)

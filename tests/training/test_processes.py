import os
import re
import signal
import subprocess
import sys
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
from tests.conftest import REPOSITORY, Chain

CPU = torch.device("cpu")
TWO = [
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--standalone", "--nproc-per-node", "2"),
]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def in_two_processes(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TWO, *command], env=environment(), capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_step_of_two_processes_is_the_step_of_one_on_the_same_batch(tmp_path: Path) -> None:
    one_step.main(tmp_path / "one")
    shared = in_two_processes(one_step.__file__, str(tmp_path / "two"))
    assert shared.returncode == 0, shared.stderr
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
    train = [
        "-m",
        "--",
        "pipeline",
        "--root",
        str(empty.root),
        "train",
        "--recipe",
        "quick",
        "--epochs",
        "0.04",
    ]
    whole = in_two_processes(*train, "--run", "whole")
    assert whole.returncode == 0, whole.stderr
    assert whole.stderr.count("training whole with") == 1  # the first process speaks for all
    assert "1 thread in each of 2 processes" in whole.stderr
    train += ["--save-every", "1", "--run", "cut"]
    job = subprocess.Popen([*TWO, *train], env=environment(), stderr=subprocess.PIPE, text=True)
    checkpoint = empty.root / "runs" / "cut" / "checkpoint" / "latest.json"
    while not checkpoint.exists():
        assert job.poll() is None
        time.sleep(0.01)
    os.kill(second_process(job.pid), signal.SIGKILL)
    _, errors = job.communicate()
    assert job.returncode != 0
    assert re.search("Error: process 0 of 2 lost another process .* --resume", errors)
    resumed = in_two_processes(*train, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step" in resumed.stderr
    runs = [empty.root / "runs" / run / "model.safetensors" for run in ("whole", "cut")]
    assert sha256(runs[0]) == sha256(runs[1])
    alone = empty.run("train", "--recipe", "quick", "--epochs", "0.04", "--run", "cut", "--resume")
    assert alone.exit_code == 0  # it is finished: how many processes made it is no setting


def second_process(parent: int) -> int:
    """The process of rank 1 among the children of torchrun's."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError("no process of rank 1")


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

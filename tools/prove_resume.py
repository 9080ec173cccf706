"""Kill training repeatedly, also while it writes, and check that the weights are always the same.

Run by `make prove-resume`, a hundred times; by the tests, once.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from pipeline.core.errors import PipelineError
from pipeline.core.files import remove, sha256
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.data.splits import load_split
from pipeline.training.checkpoint import load_state
from pipeline.training.device import choose_placement
from pipeline.training.run import read_run_config, run_identity
from tools.provenance import write_figure
from tools.readme import render_pages

TRAIN = ["train", "--recipe", "quick", "--save-every", "2"]
EPOCHS = 0.25
KILLS_A_RUN = 5  # then the run may finish, and is compared
HANG_SECONDS = 300.0
LOOK_SECONDS = 0.0002  # interval of the checks for a file that is being written


@dataclass
class Outcome:
    """Results of the kills."""

    kills: int = 0
    inside_a_write: int = 0  # a half-written file was left behind
    with_checkpoint: int = 0  # a checkpoint had been saved by then
    loadable: int = 0  # the checkpoint can be resumed from, or none was saved
    runs: int = 0  # runs that were killed, resumed and finished
    identical_runs: int = 0  # with the same weights as the run that was never killed
    damage: str = ""

    @property
    def is_perfect(self) -> bool:
        """Whether every kill left a resumable state, and every run made the same weights."""
        return self.loadable == self.kills and self.identical_runs == self.runs > 0


def start(root: Path, epochs: float, *options: str) -> "subprocess.Popen[bytes]":
    """Start training in a separate process."""
    command = [sys.executable, "-m", "pipeline", "--root", str(root), "-q", *TRAIN, *options]
    command += ["--epochs", str(epochs)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def half_written(folder: Path) -> set[Path]:
    """List the temporary files below `folder`."""
    try:
        return set(folder.glob("**/.*.tmp"))
    except FileNotFoundError:  # a run that starts over removes the folder meanwhile
        return set()


def wait_for_a_write(process: "subprocess.Popen[bytes]", folder: Path, skip: int) -> None:
    """Wait until a file is being written, the first one after `skip` others; or until the end."""
    old, seen = half_written(folder), set[Path]()
    deadline = time.monotonic() + HANG_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        seen |= half_written(folder / "checkpoint") - old
        if len(seen) > skip:
            return
        time.sleep(LOOK_SECONDS)


def kill_once(
    paths: Paths, epochs: float, rng: random.Random, inside: bool, seconds: float
) -> bool:
    """Start or resume the run and kill it; return whether it was killed before it finished."""
    process = start(paths.root, epochs, "--run", paths.run, "--resume")
    if inside:
        wait_for_a_write(process, paths.run_folder, rng.randrange(20))
        time.sleep(rng.random() * 0.001)
    else:
        time.sleep(rng.random() * seconds)
    process.kill()
    return process.wait() == -signal.SIGKILL


def what_is_wrong(paths: Paths) -> str:
    """Return why the state after a kill cannot be resumed from; empty if it can."""
    config = read_run_config(paths)
    if config is None:
        return ""  # killed before it wrote anything
    try:
        load_state(paths, run_identity(paths, config, choose_placement(config.device)))
    except PipelineError as error:
        return str(error)
    return ""


def prove(
    root: Path,
    kills: int,
    inside: int,
    seed: int = 0,
    report: Callable[[str], object] = lambda line: None,
    epochs: float = EPOCHS,
) -> Outcome:
    """Kill a run `kills` times, aiming at `inside` kills during writes; compare its weights.

    `root` has the data set. The times are drawn from `seed`; the state at a kill depends on the
    machine.
    """
    rng = random.Random(seed)
    paths = Paths(root, run="killed")
    whole = replace(paths, run="whole")
    begin = time.monotonic()
    assert start(root, epochs, "--run", whole.run).wait(HANG_SECONDS) == 0
    seconds = time.monotonic() - begin
    outcome, since = Outcome(), 0
    while outcome.kills < kills or since:
        must_end = since >= KILLS_A_RUN or outcome.kills >= kills
        if must_end:
            assert start(root, epochs, "--run", paths.run, "--resume").wait(HANG_SECONDS) == 0
        before = half_written(paths.run_folder)
        wants_write = outcome.inside_a_write * kills < inside * (outcome.kills + 1) * 1.2
        if not must_end and kill_once(paths, epochs, rng, wants_write, seconds):
            since += 1
            outcome.kills += 1
            outcome.inside_a_write += bool(half_written(paths.run_folder) - before)
            outcome.with_checkpoint += (paths.checkpoint / "latest.json").exists()
            problem = what_is_wrong(paths)
            outcome.loadable += not problem
            outcome.damage = outcome.damage or problem
            continue
        is_identical = sha256(paths.weights) == sha256(whole.weights)
        outcome.runs += since > 0
        outcome.identical_runs += since > 0 and is_identical
        since = 0
        report(f"{outcome}")
        remove(paths.run_folder)
    return outcome


def main(result: Path, kills: int, inside: int) -> None:
    """Run the check on the real MNIST in a temporary folder, and keep the result."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "data").mkdir()
        (root / "data" / "mnist").symlink_to(Path("data/mnist").resolve())
        load_split("mnist", root / "data" / "mnist", "test")  # its error says how to fetch it
        outcome = prove(root, kills, inside, report=lambda line: print(line, flush=True))
    write_figure("resume", result, {"command": "make prove-resume", **machine(), **asdict(outcome)})
    render_pages()
    print(f"wrote {result}")
    if not outcome.is_perfect or outcome.inside_a_write < inside:
        raise SystemExit(3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

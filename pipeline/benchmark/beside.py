"""What a benchmark serves: a packaged model alone, and beside it what it is measured against."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths
from pipeline.repository import config_pbtxt
from pipeline.serving import tritonserver

NOOP = "no-op"
PROFILE = "throughput"  # which large requests are meant for
MANY = 64  # images in a large request


def profiled(name: str) -> str:
    """What the model is called that runs under the throughput profile."""
    return f"{name}-{PROFILE}"


@dataclass(frozen=True)
class Beside:
    """A repository for the occasion, and the configs of its models."""

    served: Paths  # the packaged model, which is there from the start
    configs: dict[str, config_pbtxt.ModelConfig]  # of all that can be asked, by name

    @property
    def added(self) -> list[str]:
        """The models that are to be loaded once the server runs."""
        return [name for name in self.configs if name != self.served.name]

    @property
    def threads(self) -> int:
        """How many threads compute under the profile: those of a session, times the sessions."""
        return threads_of(self.configs[profiled(self.served.name)])


def copied(paths: Paths, repository: Path) -> Paths:
    """The packaged model alone, in a repository of its own."""
    if not (paths.packaged / "config.pbtxt").exists():
        raise PipelineError(f"no model at {paths.packaged}: run 'pipeline package' first")
    largest = config_pbtxt.read(paths.packaged / "config.pbtxt").max_batch_size
    if largest < MANY:
        raise PipelineError(
            f"{paths.packaged} takes batches of {largest} at most, and {MANY} are measured: "
            f"package it with --max-batch-size {MANY}"
        )
    shutil.copytree(paths.packaged, repository / paths.name)
    return replace(paths, repository_folder=repository)


def put_beside(served: Paths) -> Beside:
    """Put a model that computes nothing, and the model under its profile, beside the served one."""
    own = config_pbtxt.read(served.packaged / "config.pbtxt")
    messages = (own, _add_noop(served.repository, served), _add_profiled(served.repository, served))
    return Beside(served, {message.name: message for message in messages})


def _add_profiled(repository: Path, served: Paths) -> config_pbtxt.ModelConfig:
    """Put the model beside itself, under its throughput profile; that config."""
    message = config_pbtxt.read(config_pbtxt.profile_file(served.packaged, PROFILE))
    message.name = profiled(served.name)
    folder = repository / message.name
    shutil.copytree(served.packaged, folder)
    (folder / "config.pbtxt").write_text(config_pbtxt.to_text(message))
    return message


def _add_noop(repository: Path, served: Paths) -> config_pbtxt.ModelConfig:
    """Put a model beside it that computes nothing, configured as it is; that config."""
    noop = config_pbtxt.read(served.packaged / "config.pbtxt")
    noop.name, noop.backend = NOOP, "python"
    for only_ours in ("version_policy", "model_warmup", "optimization", "parameters"):
        noop.ClearField(only_ours)
    for output in noop.output:
        output.ClearField("label_filename")
    folder = repository / NOOP
    (folder / "1").mkdir(parents=True)
    shutil.copy(tritonserver.BACKENDS / "noop.py", folder / "1" / "model.py")
    (folder / "config.pbtxt").write_text(config_pbtxt.to_text(noop))
    return noop


def threads_of(message: config_pbtxt.ModelConfig) -> int:
    """How many threads compute for a model: those of a session, times the sessions."""
    of_session = int(config_pbtxt.parameter(message, "intra_op_thread_count") or 0)
    instances = sum(int(group.count) for group in message.instance_group)
    return of_session * instances

"""Weights with their config, and the state to resume a run from, as safetensors with digests."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import check_digest, read_record, write_bytes, write_json
from pipeline.core.paths import Paths
from pipeline.training.networks import Network, build
from pipeline.training.recipes import TrainConfig
from pipeline.training.runs import RETRAIN

START_OVER = "run 'pipeline train' without --resume to start over"


@dataclass(frozen=True)
class Summary:
    """Metrics of a finished run, and what produced it."""

    run: str
    recipe: str
    dataset: str
    seed: int
    device: str
    threads: int
    torch: str
    steps: int
    parameters: int
    classes: tuple[str, ...]
    train_seconds: float  # in the training loop; evaluation is not counted
    validation_accuracy: float  # fraction of images, 0 to 1
    test_accuracy: float  # fraction of images, 0 to 1
    test_loss: float  # mean negative log-likelihood, in nats
    test_calibration_error: float  # expected, over 15 bins, 0 to 1
    temperature: float  # fitted on the validation split
    uncalibrated_loss: float  # test_loss before the temperature was fitted
    uncalibrated_error: float  # test_calibration_error before
    weights_sha256: str
    data_sha256: dict[str, str]
    predictions_sha256: str = ""  # older runs lack this field and the next three
    min_probability: float | None = None  # a lower answer is unsure; None: too few images to tell
    python: str = ""
    finished_at: str = ""  # in UTC, ISO 8601
    system: str = ""
    validation_images: int | None = None  # that temperature and min_probability were fitted on
    notes: tuple[str, ...] = ()  # sentences on what could not be fitted well
    processes: int | None = None  # that trained together; older runs lack this and the next two
    processor: str | None = None
    instructions: str | None = None  # of vectors, that the libraries used: see device.py
    # Of each part of the test split, if it is joined of two: the images, and the accuracy on them.
    parts: dict[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A trained network, with the config and the summary of its run."""

    model: Network  # in evaluation mode, on the CPU
    config: TrainConfig
    classes: tuple[str, ...]
    summary: Summary


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to continue exactly where it stopped."""

    step: int  # optimizer steps done
    seconds: float  # of training so far
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Latest:
    """Content of `latest.json`: the newest checkpoint file and its digest."""

    file: str
    sha256: str


def _write(path: Path, tensors: dict[str, Tensor], record: str) -> str:
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_bytes(path, save(values, metadata={"record": record}))


def _unpack(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    return load(content), json.loads(header["__metadata__"]["record"])


def save_weights(paths: Paths, model: nn.Module, config: TrainConfig, names: Sequence[str]) -> str:
    """Write the weights with their config; return the file's SHA-256.

    The bytes depend only on the weights, the config and the classes' names.
    """
    record = json.dumps({"config": config.record(), "classes": names}, sort_keys=True)
    return _write(paths.weights, model.state_dict(), record)


def load_checkpoint(paths: Paths) -> Checkpoint:
    """Load the network of the finished run.

    Raises PipelineError when the run is missing or unfinished, and CorruptError when the weights
    are not the bytes that training wrote.
    """
    if not paths.run_folder.exists():
        raise PipelineError(f"there is no run {paths.run!r} here: {paths.explain_runs()}")
    fix = f"the run is not finished; finish it with 'pipeline train --run {paths.run} --resume'"
    summary = read_record(paths.summary, Summary, fix)
    content = check_digest(paths.weights, summary.weights_sha256, RETRAIN)
    try:
        tensors, record = _unpack(content)
        config, classes = TrainConfig.from_record(record["config"]), tuple(record["classes"])
        model = build(config.settings, len(classes))
        model.load_state_dict(tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptError(f"{paths.weights} is not a valid checkpoint: {RETRAIN}") from error
    return Checkpoint(model.eval(), config, classes, summary)


def start_from(start: Checkpoint, config: TrainConfig, classes: Sequence[str]) -> RunState:
    """Return the state before the first step of a run that starts from a finished run's weights.

    The last layer is new, from the config's seed, if the classes or its shape differ.
    """
    torch.manual_seed(config.seed)
    tensors = build(config.settings, len(classes)).state_dict()  # with a temperature of 1
    weights = start.model.state_dict()
    head = [name for name, _ in start.model.named_parameters()][-2:]  # weight and bias
    is_same = start.classes == tuple(classes) and weights[head[1]].shape == tensors[head[1]].shape
    left = {"temperature"} if is_same else {"temperature", *head}
    tensors |= {name: value for name, value in weights.items() if name not in left}
    copies = {f"{copy}.{n}": tensors[n] for copy in ("model", "average.module") for n in tensors}
    return RunState(0, 0.0, {**copies, "average.n_averaged": torch.tensor(0)})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as one flat dictionary of tensors."""
    states = optimizer.state_dict()["state"].items()
    return {f"optimizer.{i}.{key}": value for i, state in states for key, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state of `optimizer` from the result of `optimizer_tensors`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            like = parameters[int(index)]
            if value.shape == like.shape:
                # In the parameter's memory layout: a fused step reads both in memory order.
                value = torch.empty_like(like, dtype=value.dtype).copy_(value)
            states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def save_state(paths: Paths, state: RunState, identity: dict[str, Any]) -> None:
    """Write the state to a new file, point `latest.json` at it, and delete older files.

    `identity` has all settings that must be the same for an exact resume.
    """
    record = {"step": state.step, "seconds": state.seconds, "identity": identity}
    file = paths.checkpoint / f"step-{state.step:07d}.safetensors"
    digest = _write(file, state.tensors, json.dumps(record))
    write_json(paths.checkpoint / "latest.json", {"file": file.name, "sha256": digest})
    for other in paths.checkpoint.glob("step-*.safetensors"):
        if other != file:
            other.unlink()


def load_state(paths: Paths, identity: dict[str, Any]) -> RunState | None:
    """Load the state to resume from, or return None when nothing was saved yet.

    Raises PipelineError when it was saved under another identity, and CorruptError when its bytes
    changed.
    """
    pointer_file = paths.checkpoint / "latest.json"
    if not pointer_file.exists():
        return None
    latest = read_record(pointer_file, _Latest, START_OVER)
    file = paths.checkpoint / latest.file
    if not file.is_file():
        raise CorruptError(f"{pointer_file} names {file}, which is missing: {START_OVER}")
    content = check_digest(file, latest.sha256, START_OVER)
    try:
        tensors, record = _unpack(content)
        state = RunState(int(record["step"]), float(record["seconds"]), tensors)
        saved = dict(record["identity"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CorruptError(f"{file} is not a valid checkpoint: {START_OVER}") from error
    keys = [key for key in sorted({*saved, *identity}) if saved.get(key) != identity.get(key)]
    if keys:
        changes = "; ".join(
            f"{key} was {saved.get(key)!r}, is {identity.get(key)!r}" for key in keys
        )
        raise PipelineError(
            f"cannot resume exactly: {changes}. Use the same settings, or {START_OVER}"
        )
    return state

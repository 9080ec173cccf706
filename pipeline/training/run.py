"""Training of a run in its folder: records, resume, and one evaluation on the test split."""

# Shape letters: N images, K classes.

import contextlib
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import numpy as np
import torch

from pipeline.core import evaluate
from pipeline.core.errors import PipelineError
from pipeline.core.files import read_record, write_json
from pipeline.core.machine import machine
from pipeline.core.paths import JOINED, Paths, data_name
from pipeline.core.text import Lines
from pipeline.data.splits import digests, load_split
from pipeline.training import checkpoint, device
from pipeline.training.device import Placement, choose_placement, process_group
from pipeline.training.loop import TrainingProgress, train
from pipeline.training.networks import Network, eager_predictor
from pipeline.training.recipes import TrainConfig
from pipeline.training.records import Records
from pipeline.training.runs import save_predictions


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Defer Ctrl-C and SIGTERM; yield a function that tells whether one came.

    The first lets the step end; the second raises KeyboardInterrupt immediately.
    """
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train_run(
    paths: Paths,
    config: TrainConfig,
    resume: bool = False,
    report: Callable[[str], None] = lambda line: None,
    on_epoch: Callable[[TrainingProgress], None] = lambda progress: None,
    on_step: Callable[[TrainingProgress], None] = lambda progress: None,
    save_every: int = 0,
) -> checkpoint.Summary:
    """Train into `runs/<run>/` and score the result on the test split, which is read once.

    With `resume`, a finished run is returned unchanged and an interrupted one continues exactly. Of
    several processes, only the first writes; all return the same summary.
    """
    if resume and paths.summary.exists():
        return _load_finished(paths, config)
    if config.init == paths.run:
        raise PipelineError(f"run {config.init} cannot start from itself: choose another --run")
    placement = choose_placement(config.device)
    folder = paths.data(config.dataset)
    with process_group(placement):
        if placement.is_first:
            report(f"training {paths.run} with recipe {config.recipe} on {placement}")
        train_split = load_split(config.dataset, folder, "train")
        validation = load_split(config.dataset, folder, "validation")
        inputs = (config, train_split, validation, placement)
        identity = run_identity(paths, config, placement)
        if placement.is_first:
            if not resume and paths.summary.exists():
                report(f"the previous run {paths.run} is kept in {paths.previous}")
            records = Records(paths, config, identity, resume, on_epoch, on_step)
            state = records.state
            if resume:
                start = f"after step {state.step}" if state else "from the start: no checkpoint yet"
                report(f"resuming {start}")
            state = state or _start(paths, config, train_split.classes, report)
            with deferred_interrupt() as is_stopped:
                callbacks = (records.progress, records.save, is_stopped)
                model, last = train(*inputs, state, *callbacks, save_every)
            _conclude(paths, config, placement, model, last)
            records.close()
        else:
            state = checkpoint.load_state(paths, identity) if resume else None
            state = state or _start(paths, config, train_split.classes, lambda line: None)
            with deferred_interrupt() as is_stopped:
                train(*inputs, state, is_stopped=is_stopped)
    return _load_finished(paths, config)


def _start(
    paths: Paths, config: TrainConfig, classes: tuple[str, ...], report: Callable[[str], None]
) -> checkpoint.RunState | None:
    """Return the state to start from the config's finished run, or None if it names no run."""
    if not config.init:
        return None
    start = checkpoint.load_checkpoint(paths.of_run(config.init))
    if start.summary.weights_sha256 != config.init_sha256:
        changed = f"run {config.init} was trained again since this run started from it"
        raise PipelineError(f"{changed}: {checkpoint.START_OVER}")
    report(f"starting from the weights of run {config.init} ({config.init_sha256[:12]})")
    if start.classes != classes:
        new = f"the last layer starts from random weights, for {len(classes)} classes"
        report(f"the classes differ from those of run {config.init}: {new}")
    elif config.dataset.startswith(JOINED):
        test = load_split(config.dataset, paths.data(config.dataset), "test")
        outputs = evaluate.predict(eager_predictor(start.model), test.images)
        report(Lines("before:", *format_parts(_score_parts(config, outputs, test.labels))))
    return checkpoint.start_from(start, config, classes)


def _score_parts(
    config: TrainConfig, outputs: np.ndarray, labels: np.ndarray
) -> dict[str, tuple[int, float]]:
    """Return the images and the accuracy of log-probabilities (N, K), on MNIST and on the folder.

    Of a data set that is not joined, there are no parts; a folder may have no test images.
    """
    if not config.dataset.startswith(JOINED):
        return {}
    is_right, end = outputs.argmax(axis=1) == labels, 10_000  # MNIST's come first
    parts = {"mnist": is_right[:end], data_name(config.dataset): is_right[end:]}
    return {name: (len(part), float(part.mean())) for name, part in parts.items() if len(part)}


def format_parts(parts: dict[str, tuple[int, float]]) -> list[str]:
    """Return a line for the accuracy on each part of a joined test split."""
    return [
        f"  {accuracy:.2%} of the {count:,} test images of {name}"
        for name, (count, accuracy) in parts.items()
    ]


def _conclude(
    paths: Paths, config: TrainConfig, placement: Placement, model: Network, last: TrainingProgress
) -> None:
    """Fit the temperature, score on the test split, write the weights, and the summary last."""
    folder = paths.data(config.dataset)
    predictor = eager_predictor(model, placement.device)
    validation = load_split(config.dataset, folder, "validation")
    unscaled = evaluate.predict(predictor, validation.images)
    temperature = evaluate.fit_temperature(unscaled, validation.labels)
    scaled = evaluate.apply_temperature(unscaled, temperature)
    min_probability, count, notes = evaluate.fit_min_probability(scaled), len(validation), []
    if min_probability is None:
        notes.append(
            f"too few images to tell when the model is not sure: the validation split has {count}, "
            f"at least {evaluate.FEWEST} are needed"
        )
    if not 1.001 * evaluate.COLDEST < temperature < evaluate.HOTTEST / 1.001:
        notes.append(
            f"the temperature ran into its limit, {temperature:.2f}: the probabilities may be "
            "wrong. Train for longer, or with another recipe or more pictures"
        )
    test = load_split(config.dataset, folder, "test")
    raw = evaluate.predict(predictor, test.images)
    outputs = evaluate.apply_temperature(raw, temperature)
    model.temperature.fill_(temperature)
    metrics = evaluate.score(outputs, test.labels)
    summary = checkpoint.Summary(
        run=paths.run,
        recipe=config.recipe,
        dataset=config.dataset,
        seed=config.seed,
        device=placement.description,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        steps=last.step,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=test.classes,
        train_seconds=round(last.seconds, 3),
        validation_accuracy=last.validation_accuracy or 0.0,
        test_accuracy=metrics.accuracy,
        test_loss=metrics.loss,
        test_calibration_error=evaluate.calibration_error(outputs, test.labels),
        temperature=temperature,
        min_probability=min_probability,
        uncalibrated_loss=evaluate.score(raw, test.labels).loss,
        uncalibrated_error=evaluate.calibration_error(raw, test.labels),
        weights_sha256=checkpoint.save_weights(paths, model, config, test.classes),
        data_sha256=digests(config.dataset, folder),
        predictions_sha256=save_predictions(paths, outputs, test.labels),
        python=platform.python_version(),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        system=f"{platform.system()} {platform.machine()}",
        validation_images=count,
        notes=tuple(notes),
        processes=placement.processes,
        processor=machine()["machine"]["processor"],
        instructions=device.describe_instructions(),
        parts=_score_parts(config, outputs, test.labels),
    )
    write_json(paths.summary, asdict(summary))


def read_run_config(paths: Paths) -> TrainConfig | None:
    """Return the config that the run in this folder was started with, or None without a run."""
    if not paths.run_config.exists():
        return None
    return read_record(paths.run_config, TrainConfig, checkpoint.START_OVER)


def run_identity(paths: Paths, config: TrainConfig, placement: Placement) -> dict[str, Any]:
    """Return all that decides the weights bit for bit; a resume under another one is refused."""
    record = config.record()
    return {
        **record.pop("settings"),
        **record,
        "device": placement.device.type,
        "precision": str(placement.precision),
        "processes": placement.processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "data": digests(config.dataset, paths.data(config.dataset)),
    }


def _load_finished(paths: Paths, config: TrainConfig) -> checkpoint.Summary:
    run = checkpoint.load_checkpoint(paths)
    if run.config.record() != config.record():
        raise PipelineError(
            f"run {paths.run} is finished, with other settings (see {paths.run_config}): choose "
            "another --run, or train without --resume to replace it"
        )
    return run.summary

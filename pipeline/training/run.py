"""A run in its folder: its records, its resume, and the one look at the test split."""

import contextlib
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.evaluate import (
    calibration_error,
    fit_min_probability,
    fit_temperature,
    predict,
    score,
    tempered,
)
from pipeline.core.files import read_json, write_json
from pipeline.core.paths import Paths
from pipeline.data.splits import Split, digests, load_split
from pipeline.training.checkpoint import START_OVER, load_checkpoint, load_state, save_weights
from pipeline.training.device import Placement, choose, together
from pipeline.training.loop import Progress, train
from pipeline.training.networks import Network, eager_predictor
from pipeline.training.recipes import TrainConfig
from pipeline.training.records import Records, save_predictions


@dataclass(frozen=True)
class Summary:
    """What a finished run is worth, and what it was made of."""

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
    predictions_sha256: str = ""  # this and the next three: runs of old did not keep them
    min_probability: float | None = None  # below it an answer is not sure; fitted on validation
    python: str = ""
    system: str = ""


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came: the first one lets the step end, the second is at once."""
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
    on_epoch: Callable[[Progress], None] = lambda progress: None,
    on_step: Callable[[Progress], None] = lambda progress: None,
    save_every: int = 0,
) -> Summary:
    """Train into `runs/<run>/` and score the result on the test split, which is read once.

    With `resume`, a finished run is returned as it is and an interrupted one goes on exactly. Of
    several processes the first one alone writes; all return the same.
    """
    if resume and paths.summary.exists():
        return _finished(paths, config)
    placement = choose(config.device)
    with together(placement):
        if placement.is_first:
            _train(paths, config, placement, resume, report, on_epoch, on_step, save_every)
        else:
            _take_part(paths, config, placement, resume)
    return _finished(paths, config)


def _train(
    paths: Paths,
    config: TrainConfig,
    placement: Placement,
    resume: bool,
    report: Callable[[str], None],
    on_epoch: Callable[[Progress], None],
    on_step: Callable[[Progress], None],
    save_every: int,
) -> None:
    """Train as the process that writes."""
    report(f"training {paths.run} with recipe {config.recipe} on {placement}")
    train_split, validation = _splits(paths, config)
    if not resume and paths.summary.exists():
        report(f"the finished run {paths.run} is kept in {paths.previous}, until the next one")
    records = Records(paths, config, identity(paths, config, placement), resume, on_epoch, on_step)
    if resume:
        state = records.state
        report(
            f"resuming after step {state.step}" if state else "no checkpoint yet: from the start"
        )
    with deferred_interrupt() as is_stopped:
        model, last = train(
            config,
            train_split,
            validation,
            placement,
            records.state,
            records.progress,
            records.save,
            is_stopped,
            save_every,
        )
    _conclude(paths, config, placement, model, last)
    records.close()


def _take_part(paths: Paths, config: TrainConfig, placement: Placement, resume: bool) -> None:
    """Train beside the process that writes, and write nothing."""
    train_split, validation = _splits(paths, config)
    state = load_state(paths, identity(paths, config, placement)) if resume else None
    with deferred_interrupt() as is_stopped:
        train(config, train_split, validation, placement, state, is_stopped=is_stopped)


def _splits(paths: Paths, config: TrainConfig) -> tuple[Split, Split]:
    folder = paths.data(config.dataset)
    train_split = load_split(config.dataset, folder, "train")
    return train_split, load_split(config.dataset, folder, "validation")


def _conclude(
    paths: Paths, config: TrainConfig, placement: Placement, model: Network, last: Progress
) -> None:
    """Fit the temperature, score on the test split, write the weights, say last that it is done."""
    folder = paths.data(config.dataset)
    predictor = eager_predictor(model, placement.device)
    validation = load_split(config.dataset, folder, "validation")
    said = predict(predictor, validation.images)
    temperature = fit_temperature(said, validation.labels)
    test = load_split(config.dataset, folder, "test")
    raw = predict(predictor, test.images)
    outputs = tempered(raw, temperature)
    model.temperature.fill_(temperature)
    metrics = score(outputs, test.labels)
    summary = Summary(
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
        test_calibration_error=calibration_error(outputs, test.labels),
        temperature=temperature,
        min_probability=fit_min_probability(tempered(said, temperature)),
        uncalibrated_loss=score(raw, test.labels).loss,
        uncalibrated_error=calibration_error(raw, test.labels),
        weights_sha256=save_weights(paths, model, config, test.classes),
        data_sha256=digests(config.dataset, folder),
        predictions_sha256=save_predictions(paths, outputs, test.labels),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
    )
    write_json(paths.summary, asdict(summary))


def recorded_config(paths: Paths) -> TrainConfig | None:
    """What the run in this folder was begun with; None where there is none."""
    if not paths.run_config.exists():
        return None
    record = read_json(paths.run_config, START_OVER)
    try:
        return TrainConfig.from_record(record)
    except (KeyError, TypeError) as error:
        raise CorruptError(f"{paths.run_config} is no run of ours: {START_OVER}") from error


def identity(paths: Paths, config: TrainConfig, placement: Placement) -> dict[str, Any]:
    """What decides the weights bit for bit: a resume under another one is refused."""
    return {
        **config.record()["settings"],
        "recipe": config.recipe,
        "dataset": config.dataset,
        "seed": config.seed,
        "device": placement.device.type,
        "precision": str(placement.precision),
        "compiled": config.compiled,
        "processes": placement.processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "data": digests(config.dataset, paths.data(config.dataset)),
    }


def _finished(paths: Paths, config: TrainConfig) -> Summary:
    checkpoint = load_checkpoint(paths)
    if checkpoint.config.record() != config.record():
        raise PipelineError(
            f"run {paths.run} is finished, with other settings (see {paths.run_config}): "
            "choose another --run, or train without --resume to replace it"
        )
    known = Summary.__dataclass_fields__.keys() & checkpoint.summary.keys()
    return Summary(**{name: checkpoint.summary[name] for name in known})

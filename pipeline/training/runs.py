"""Finished runs: their predictions for the test images, and how two of them differ.

Imports no torch: `pipeline runs` answers without waiting for it.
"""

# Shape letters: N images, K classes.

import io
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.evaluate import apply_temperature, mcnemar, read_answers, wilson_interval
from pipeline.core.files import check_digest, pack_arrays, read_json, write_bytes
from pipeline.core.paths import Paths
from pipeline.core.text import Lines, columns

RETRAIN = "run 'pipeline train' again"


@dataclass(frozen=True)
class Predictions:
    """The final network's answers to the test split, in the split's order."""

    log_probabilities: np.ndarray  # float32 (N, K), after the temperature
    labels: np.ndarray  # int64 (N,)

    def remove_temperature(self, temperature: float) -> np.ndarray:
        """Return the log-probabilities (N, K) from before the temperature was applied."""
        return apply_temperature(self.log_probabilities, 1 / temperature)


def save_predictions(paths: Paths, outputs: np.ndarray, labels: np.ndarray) -> str:
    """Write log-probabilities (N, K) with labels (N,); return the file's SHA-256.

    The bytes depend only on the values.
    """
    arrays = {"log_probabilities": outputs.astype(np.float32), "labels": labels}
    return write_bytes(paths.predictions, pack_arrays(arrays))


def load_predictions(paths: Paths, digest: str) -> Predictions:
    """Load the run's predictions, whose SHA-256 must be `digest`, without unpickling.

    Raises PipelineError when the file is missing and CorruptError when its bytes changed.
    """
    content = check_digest(paths.predictions, digest, RETRAIN)
    try:
        arrays = np.load(io.BytesIO(content), allow_pickle=False)
        outputs, labels = arrays["log_probabilities"], arrays["labels"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{paths.predictions} has no predictions: {RETRAIN}") from error
    if outputs.ndim not in (2, 3) or labels.shape != (len(outputs),):
        raise CorruptError(f"{paths.predictions} has arrays of different lengths: {RETRAIN}")
    return Predictions(outputs, labels)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its results, and the settings that it was trained with."""

    run: str
    dataset: str
    recipe: str
    seed: int
    test_accuracy: float  # fraction of the test images, 0 to 1
    interval: tuple[float, float]  # of that accuracy, 95 %
    train_seconds: float
    finished_at: str  # UTC, ISO 8601
    settings: dict[str, Any]  # all that was chosen, and the versions and threads
    test_images: int

    def __str__(self) -> Lines:
        low, high = self.interval
        accuracy = f"{self.test_accuracy:.2%} (95 % interval: {low:.2%} to {high:.2%})"
        rows = [
            ("test accuracy", f"{accuracy} of {self.test_images:,} images"),
            ("training", f"{self.train_seconds:,.1f} s, finished {self.finished_at or 'unknown'}"),
            *self.settings.items(),
        ]
        return columns((self.run, ""), rows, "ll")


@dataclass(frozen=True)
class RunList:
    """All finished runs of a project, by name."""

    runs: tuple[FinishedRun, ...]

    def __str__(self) -> Lines:
        header = ("run", "data set", "recipe", "seed", "accuracy", "95 % interval", "training")
        rows = [
            (
                *(run.run, run.dataset, run.recipe, run.seed, f"{run.test_accuracy:.2%}"),
                " to ".join(f"{end:.2%}" for end in run.interval),
                f"{run.train_seconds:,.1f} s",
            )
            for run in self.runs
        ]
        return columns(header, rows, "lllrrrr")


@dataclass(frozen=True)
class RunComparison:
    """How a second run differs from a first one, on the same test images."""

    first: FinishedRun
    second: FinishedRun
    settings: dict[str, tuple[Any, Any]]  # those that differ, of the first and of the second
    only_first: int  # test images that only the first classifies correctly
    only_second: int
    mcnemar_p: float  # probability of counts at least as uneven if both are equally accurate

    def __str__(self) -> Lines:
        names = (self.first.run, self.second.run)
        pairs = {
            "test accuracy": [f"{run.test_accuracy:.2%}" for run in (self.first, self.second)],
            "training": [f"{run.train_seconds:,.1f} s" for run in (self.first, self.second)],
            "only this one is right": [
                f"{n:,} images" for n in (self.only_first, self.only_second)
            ],
            **self.settings,
        }
        is_clear = self.mcnemar_p < 0.05
        verdict = f"{'a clear' if is_clear else 'no clear'} difference in accuracy"
        return Lines(
            columns(("", *names), [(name, *pair) for name, pair in pairs.items()], "lll"),
            f"McNemar's p is {self.mcnemar_p:.2g}: {verdict} on {self.first.test_images:,} images",
        )


def list_runs(paths: Paths) -> RunList:
    """Return the finished runs of the project."""
    folders = sorted(file.parent.name for file in paths.runs.glob("*/summary.json"))
    return RunList(tuple(load_run(paths.of_run(name))[0] for name in folders))


def load_run(paths: Paths) -> tuple[FinishedRun, Predictions]:
    """Return a finished run with its predictions.

    Raises PipelineError if it is not finished, CorruptError if a file changed.
    """
    if not paths.summary.exists():
        raise PipelineError(f"run {paths.run} is not finished: {paths.explain_runs()}")
    summary = read_json(paths.summary, RETRAIN)
    predictions = load_predictions(paths, summary["predictions_sha256"])
    record, images = read_json(paths.run_config, RETRAIN), len(predictions.labels)
    options = {key: value for key, value in record.items() if key not in ("schema", "settings")}
    shown = ("torch", "python", "system", "device", "threads", "parameters", "steps")
    run = FinishedRun(
        paths.run,
        summary["dataset"],
        summary["recipe"],
        summary["seed"],
        summary["test_accuracy"],
        wilson_interval(round(summary["test_accuracy"] * images), images),
        summary["train_seconds"],
        summary.get("finished_at", ""),
        {**options, **record["settings"], **{key: summary.get(key) for key in shown}},
        images,
    )
    return run, predictions


def compare_runs(paths: Paths, first: str, second: str) -> RunComparison:
    """Compare two finished runs on their test images; raise PipelineError if those differ."""
    (one, answers), (other, others) = (load_run(paths.of_run(name)) for name in (first, second))
    if one.dataset != other.dataset or not np.array_equal(answers.labels, others.labels):
        raise PipelineError(
            f"{first} was tested on {one.dataset} and {second} on {other.dataset}: only runs with "
            "the same test images can be compared"
        )
    rights = [read_answers(each.log_probabilities)[0] == each.labels for each in (answers, others)]
    return RunComparison(
        one,
        other,
        {
            key: (value, other.settings.get(key))
            for key, value in one.settings.items()
            if value != other.settings.get(key)
        },
        int((rights[0] & ~rights[1]).sum()),
        int((rights[1] & ~rights[0]).sum()),
        mcnemar(*rights),
    )

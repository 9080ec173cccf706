"""The path of each artifact: no other module spells a file name."""

import difflib
import os
import re
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path

from pipeline.core.errors import PipelineError, SettingError

CHECKOUT = Path(__file__).parents[2]  # the folder that holds this package
MODEL_NAMES = {"mnist": "handwriting"}
FOLDER = "folder:"  # prefix of a data set's name that is the path of a folder of pictures
JOINED = f"mnist+{FOLDER}"  # the same for a folder of own pictures of digits, joined with MNIST
# Names with a fixed meaning under runs/ or exported/.
TAKEN = ("handwriting", "model_repository", "failed", "deploy")
NAME_RULE = "up to 64 letters, digits, '-', '_' and '.', a letter or digit first"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def is_name(value: str) -> bool:
    """Return whether `value` is a valid name for a model, a run or a cached data set."""
    return _NAME.fullmatch(value) is not None


def require_printable(path: Path) -> None:
    """Raise PipelineError if the absolute path has characters that would garble printed text.

    Those are control characters, line breaks, and bytes that are not UTF-8.
    """
    try:
        name = str(path.absolute())
    except FileNotFoundError as error:
        raise PipelineError("the current folder was deleted: change to another one") from error
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise PipelineError(f"the path {name!a} is not printable UTF-8: rename the folder")


def format_make(targets: str) -> str:
    """Return the shell command that makes `targets` of our Makefile, for the current folder."""
    makefile, here = CHECKOUT / "Makefile", Path("Makefile")
    if makefile.exists() and here.exists() and here.samefile(makefile):
        return f"make {targets}"
    return f"make -C {shlex.quote(str(CHECKOUT)) if makefile.exists() else 'CLONE'} {targets}"


NONE = "none exists yet"


def list_names(name: str, names: Sequence[str]) -> str:
    """Return a sentence with the names that exist, and the closest one to `name`, if any do."""
    close = difflib.get_close_matches(name, names, n=1)
    hint = f". Did you mean {close[0]!r}?" if close else ""
    return f"there {'are' if names[1:] else 'is'} {', '.join(names)}{hint}" if names else NONE


def data_name(dataset: str) -> str:
    """Return the name of a data set's cache: for `folder:PATH`, the folder's name.

    For `mnist+folder:PATH`, it is `mnist-` and the folder's name.
    """
    joined, is_folder, path = dataset.partition(FOLDER)
    return joined.replace("+", "-") + Path(path).name if is_folder else dataset


def model_name(dataset: str) -> str:
    """Return the default name of a model of the data set."""
    return MODEL_NAMES.get(dataset) or data_name(dataset)


def packaged_name(name: str, precision: str) -> str:
    """Return a variant's name in a model repository: `name` for fp32, else `name-precision`."""
    return name if precision == "fp32" else f"{name}-{precision}"


class _Below:
    """An attribute of `Paths`: a path below one of its folders.

    `{name}` and `{run}` in it stand for the model's and the run's name.
    """

    def __init__(self, folder: str, path: str) -> None:
        self.folder, self.path = folder, path

    def __get__(self, paths: "Paths", owner: type["Paths"]) -> Path:
        folder: Path = getattr(paths, self.folder)
        return folder / self.path.format(name=paths.name, run=paths.run)


@dataclass(frozen=True)
class Paths:
    """The paths of all artifacts of one model under the project's root."""

    root: Path = Path()
    name: str = "handwriting"
    run: str = "handwriting"
    repository_folder: Path | None = None  # a model repository at another place
    data_folder: Path | None = None  # data sets at another place

    def __post_init__(self) -> None:
        for value in (self.name, self.run):
            if not is_name(value):
                raise SettingError(f"{value!r} is not a valid name: use {NAME_RULE}")

    runs = _Below("root", "runs")
    run_folder = _Below("runs", "{run}")
    weights = _Below("run_folder", "model.safetensors")
    checkpoint = _Below("run_folder", "checkpoint")
    run_config = _Below("run_folder", "config.json")
    metrics = _Below("run_folder", "metrics.jsonl")
    summary = _Below("run_folder", "summary.json")
    board = _Below("run_folder", "tensorboard")
    previous = _Below("run_folder", "previous")  # the finished run that a new one has replaced
    trial = _Below("run_folder", "trial.json")
    predictions = _Below("run_folder", "predictions.npz")
    page = _Below("run_folder", "report.html")

    exported = _Below("root", "exported")
    export = _Below("exported", "{name}")
    program = _Below("export", "model.pt2")
    onnx = _Below("export", "model.onnx")
    golden = _Below("export", "golden.npz")
    evidence = _Below("export", "evidence.npz")
    images = _Below("export", "images.npz")
    card = _Below("export", "MODEL_CARD.md")
    failed = _Below("export", "failed")
    worst = _Below("failed", "worst.npz")
    validation = _Below("export", "validation.json")
    agreement = _Below("export", "agreement.json")
    replay = _Below("export", "replay.json")
    inference = _Below("export", "inference.json")
    serving = _Below("export", "serving.json")
    drift = _Below("export", "drift.json")
    manifest = _Below("export", "manifest.json")

    packaged = _Below("repository", "{name}")
    lock = _Below("exported", ".{name}.lock")  # held while the packaged model is changed
    server = _Below("exported", "server.json")
    server_log = _Below("exported", "server.log")
    supervisor_log = _Below("exported", "supervisor.log")
    supervisor_lock = _Below("exported", ".supervisor.lock")  # held while a supervisor runs

    @property
    def triton_environment(self) -> Path:
        """The server's environment: in the project's folder, else next to this package."""
        here, checkout = self.root / ".venv-triton", CHECKOUT / ".venv-triton"
        return checkout if checkout.exists() and not os.path.lexists(here) else here

    @property
    def repository(self) -> Path:
        return self.repository_folder or self.exported / "model_repository"

    def find_models(self) -> list[str]:
        """Return the names of the models that are exported or packaged."""
        files = (*self.exported.glob("*/manifest.json"), *self.repository.glob("*/config.pbtxt"))
        return sorted({file.parent.name for file in files})

    def explain_runs(self) -> str:
        """Return which runs there are, and how to train this one, for a message."""
        runs = sorted(file.parent.name for file in self.runs.glob("*/config.json"))
        return f"{list_names(self.run, runs)}; 'pipeline train --run {self.run}' trains it"

    def named(self, name: str) -> "Paths":
        """Return the paths of another model of the same project."""
        return replace(self, name=name)

    def of_run(self, run: str) -> "Paths":
        """Return the paths of another run of the same project."""
        return replace(self, run=run)

    @property
    def name_option(self) -> str:
        """The option that a command needs for this model; empty for the default name."""
        return "" if self.name == MODEL_NAMES["mnist"] else f" --name {self.name}"

    def data(self, dataset: str) -> Path:
        return (self.data_folder or self.root / "data") / data_name(dataset)

    def _of_precision(self, stem: str, suffix: str, precision: str) -> Path:
        middle = "" if precision == "fp32" else f".{precision}"
        return self.export / f"{stem}{middle}.{suffix}"

    # Each takes a precision.
    variant = partialmethod(_of_precision, "model", "onnx")
    variant_golden = partialmethod(_of_precision, "golden", "npz")
    variant_profile = partialmethod(_of_precision, "reference_profile", "json")
    variant_agreement = partialmethod(_of_precision, "agreement", "json")

    def deployment(self, kind: str) -> Path:
        return self.exported / "deploy" / self.name / kind

    def archive(self, version: int) -> Path:
        return self.exported / f"{self.name}-{version}.tar"


PRECISIONS = ("fp32", "fp16", "int8", "exact")

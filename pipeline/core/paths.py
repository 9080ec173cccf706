"""Where each artifact lies: no other module spells a file name."""

import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.errors import PipelineError

MODEL_NAMES = {"mnist": "handwriting"}
FOLDER = "folder:"  # stands before the path of a folder of pictures, where a data set is named
# Under runs/ or exported/.
TAKEN = ("handwriting", "model_repository", "failed", "deploy")
NAME_RULE = "up to 64 letters, digits, '-', '_' and '.', a letter or digit first"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def is_name(value: str) -> bool:
    """Whether a model, a run or a cached data set can be called so."""
    return _NAME.fullmatch(value) is not None


def require_printable(path: Path) -> None:
    """Raise PipelineError if the absolute path has characters that would garble what is printed.

    Those are control characters, line breaks, and bytes that are not UTF-8.
    """
    try:
        name = str(path.absolute())
    except FileNotFoundError as error:
        raise PipelineError("the current folder was removed: change to another one") from error
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise PipelineError(
            f"the path {name!a} has control characters or is not UTF-8: rename the folder"
        )


def data_name(dataset: str) -> str:
    """What a data set's cache is called; the set `folder:PATH` is called as its folder."""
    return Path(dataset).name if dataset.startswith(FOLDER) else dataset


def model_name(dataset: str) -> str:
    """What a model of the data set is called, unless it has a name of its own."""
    return MODEL_NAMES.get(dataset) or data_name(dataset)


def packaged_name(name: str, precision: str) -> str:
    """What a variant is called in a model repository: fp32 as the model, the others beside it."""
    return name if precision == "fp32" else f"{name}-{precision}"


@dataclass(frozen=True)
class Paths:
    """Where each artifact of one model lies under the project's root."""

    root: Path = Path()
    name: str = "handwriting"
    run: str = "handwriting"
    repository_folder: Path | None = None  # a model repository that lies elsewhere

    def __post_init__(self) -> None:
        for value in (self.name, self.run):
            if not is_name(value):
                raise PipelineError(f"{value!r} is no name: use {NAME_RULE}")

    def named(self, name: str) -> "Paths":
        """The paths of another model of the same project."""
        return replace(self, name=name)

    def data(self, dataset: str) -> Path:
        return self.root / "data" / data_name(dataset)

    @property
    def run_folder(self) -> Path:
        return self.root / "runs" / self.run

    @property
    def weights(self) -> Path:
        return self.run_folder / "model.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.run_folder / "checkpoint"

    @property
    def run_config(self) -> Path:
        return self.run_folder / "config.json"

    @property
    def metrics(self) -> Path:
        return self.run_folder / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.run_folder / "summary.json"

    @property
    def board(self) -> Path:
        return self.run_folder / "tensorboard"

    @property
    def previous(self) -> Path:
        """The finished run that a new one of the same name has replaced."""
        return self.run_folder / "previous"

    @property
    def trial(self) -> Path:
        return self.run_folder / "trial.json"

    @property
    def predictions(self) -> Path:
        return self.run_folder / "predictions.npz"

    @property
    def page(self) -> Path:
        return self.run_folder / "report.html"

    @property
    def exported(self) -> Path:
        return self.root / "exported"

    @property
    def export(self) -> Path:
        return self.exported / self.name

    @property
    def program(self) -> Path:
        return self.export / "model.pt2"

    @property
    def onnx(self) -> Path:
        return self.export / "model.onnx"

    def variant(self, precision: str) -> Path:
        return self.onnx if precision == "fp32" else self.export / f"model.{precision}.onnx"

    @property
    def golden(self) -> Path:
        return self.export / "golden.npz"

    def variant_golden(self, precision: str) -> Path:
        return self.golden if precision == "fp32" else self.export / f"golden.{precision}.npz"

    def variant_profile(self, precision: str) -> Path:
        name = "reference_profile" if precision == "fp32" else f"reference_profile.{precision}"
        return self.export / f"{name}.json"

    @property
    def evidence(self) -> Path:
        return self.export / "evidence.npz"

    @property
    def images(self) -> Path:
        return self.export / "images.npz"

    @property
    def card(self) -> Path:
        return self.export / "MODEL_CARD.md"

    @property
    def worst(self) -> Path:
        return self.failed / "worst.npz"

    @property
    def validation(self) -> Path:
        return self.export / "validation.json"

    @property
    def failed(self) -> Path:
        return self.export / "failed"

    @property
    def agreement(self) -> Path:
        return self.export / "agreement.json"

    def variant_agreement(self, precision: str) -> Path:
        return (
            self.agreement if precision == "fp32" else self.export / f"agreement.{precision}.json"
        )

    @property
    def replay(self) -> Path:
        return self.export / "replay.json"

    @property
    def inference(self) -> Path:
        return self.export / "inference.json"

    @property
    def serving(self) -> Path:
        return self.export / "serving.json"

    @property
    def drift(self) -> Path:
        return self.export / "drift.json"

    @property
    def manifest(self) -> Path:
        return self.export / "manifest.json"

    @property
    def repository(self) -> Path:
        return self.repository_folder or self.exported / "model_repository"

    @property
    def packaged(self) -> Path:
        return self.repository / self.name

    def deployment(self, kind: str) -> Path:
        return self.exported / "deploy" / self.name / kind

    @property
    def lock(self) -> Path:
        """Held by whoever changes the packaged model."""
        return self.exported / f".{self.name}.lock"

    def archive(self, version: int) -> Path:
        return self.exported / f"{self.name}-{version}.tar"

    @property
    def server(self) -> Path:
        return self.exported / "server.json"

    @property
    def server_log(self) -> Path:
        return self.exported / "server.log"

    @property
    def supervisor_log(self) -> Path:
        return self.exported / "supervisor.log"

    @property
    def triton_environment(self) -> Path:
        return self.root / ".venv-triton"


PRECISIONS = ("fp32", "fp16", "int8")

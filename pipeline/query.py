"""Ask a served model about files, and predictors that ask a server."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.client import Client, Prediction
from pipeline.errors import PipelineError
from pipeline.images import fit, read_gray

FILES_AT_ONCE = 64


@dataclass(frozen=True)
class Answer:
    """What became of one file: a prediction, or why there is none."""

    file: Path
    prediction: Prediction | None
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """The answer as one line of JSON has it."""
        return {"file": str(self.file), **(self.prediction.record() if self.prediction else {})}

    def __str__(self) -> str:
        if not self.prediction:
            return f"{self.file}: {self.error}"
        others = ", ".join(f"{label} {chance:.2%}" for label, chance in self.prediction.top[1:])
        also = f"  (then {others})" if others else ""
        return f"{self.file}: {self.prediction.label}  {self.prediction.probability:.2%}{also}"


def ask_files(
    connect: Callable[[], Client], files: Sequence[Path], top: int = 3
) -> Iterator[Answer]:
    """An answer for each file, in order; a file that is no image does not stop the others.

    Connects when there is something to ask, so that unreadable files are named in any case.
    """
    with contextlib.ExitStack() as stack:
        client: Client | None = None
        for start in range(0, len(files), FILES_AT_ONCE):
            part = files[start : start + FILES_AT_ONCE]
            grays, answers = _readable(part)
            if grays:
                client = client or stack.enter_context(connect())
                images = _fitted(grays, client.pictures(), answers)
                predictions = client.classify(list(images.values()), top)
                for file, prediction in zip(images, predictions, strict=True):
                    answers[file] = Answer(file, prediction)
            yield from (answers[file] for file in part)


def _readable(files: Sequence[Path]) -> tuple[dict[Path, np.ndarray], dict[Path, Answer]]:
    """The gray levels of each file that shows something, and an answer for each that cannot."""
    grays: dict[Path, np.ndarray] = {}
    answers: dict[Path, Answer] = {}
    for file in files:
        try:
            gray = read_gray(file)
        except PipelineError as error:
            answers[file] = Answer(file, None, str(error))
            continue
        if np.ptp(gray):
            grays[file] = gray
        else:  # whatever the model is, there is nothing to ask about
            answers[file] = _blank(file)
    return grays, answers


def _blank(file: Path) -> Answer:
    return Answer(file, None, f"{file} shows no ink on its paper: try another")


def _fitted(
    grays: dict[Path, np.ndarray], pictures: str, answers: dict[Path, Answer]
) -> dict[Path, np.ndarray]:
    """The images to ask about; a blank one has no digit, which is its answer."""
    images = {file: fit(gray, pictures) for file, gray in grays.items()}
    for file, image in images.items():
        if pictures == "digit" and not image.any():
            answers[file] = _blank(file)
    return {file: image for file, image in images.items() if file not in answers}


def triton_predictor(client: Client) -> Callable[[np.ndarray], np.ndarray]:
    """A predictor that asks a served model."""
    return lambda images: client.infer(images)[0]

"""Queries of a served model about many files, and a predictor that asks a served model."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.client.client import Client, Prediction
from pipeline.core.text import Lines
from pipeline.images.ahead import Batches, Seen, read_ahead
from pipeline.images.inputs import Source, look, read_source
from pipeline.images.read import Prepared, read_picture

NOT_SURE = "not sure"


@dataclass(frozen=True)
class Answer:
    """The result for one picture: a prediction, or the reason why there is none."""

    file: str
    prediction: Prediction | None
    error: str | None = None
    image: np.ndarray | None = field(default=None, compare=False, repr=False)  # as it was sent
    is_picture: bool = True  # False: a folder, or standard input, without pictures

    def record(self) -> dict[str, Any]:
        """Return the answer as a JSON object, for one line of output."""
        return {"file": self.file, **(self.prediction.record() if self.prediction else {})}

    def __str__(self) -> str:
        if not self.prediction:
            return f"{self.file}: {self.error}"
        ranked = [f"{label} {chance:.2%}" for label, chance in self.prediction.top]
        also = f"  (then {', '.join(ranked[1:])})" if ranked[1:] else ""
        text = f"{self.prediction.label}  {self.prediction.probability:.2%}{also}"
        if self.prediction.is_sure is False:
            text = f"{NOT_SURE}  (perhaps {', '.join(ranked)})"
        if len(parts := self.prediction.parts) > 1:
            left, top, right, bottom = parts[0]
            where = f"x {left} to {right}, y {top} to {bottom} (pixels)"
            read = f"the answer is for the one with the most ink, at {where}"
            note = f"  {len(parts)} parts found; {read}"
            return Lines(f"{self.file}: {text}", note)
        return f"{self.file}: {text}"


@dataclass
class Count:
    """The numbers of pictures so far, by the kind of their answer."""

    answered: int = 0
    unsure: int = 0  # of those answered
    failed: int = 0  # pictures without an answer
    empty: int = 0  # folders, or standard input, without pictures

    def add(self, answer: Answer) -> None:
        self.empty += not answer.is_picture
        self.failed += answer.is_picture and answer.prediction is None
        self.answered += answer.prediction is not None
        self.unsure += answer.prediction is not None and answer.prediction.is_sure is False

    def __str__(self) -> str:
        unsure = f" ({self.unsure} of them {NOT_SURE})" if self.unsure else ""
        return f"{self.answered} answered{unsure}"

    @property
    def total(self) -> int:
        return self.answered + self.failed


def ask_files(
    connect: Callable[[], Client],
    sources: Iterable[Source],
    top: int = 3,
    min_confidence: float | None = None,
) -> Generator[Answer, None, None]:
    """Yield an answer for each picture, in order; an unreadable one does not stop the others.

    At most a few batches are in memory. `min_confidence` replaces the model's own threshold.
    Connects only when there is an image to send, so that unreadable pictures are reported even
    without a server. After the first batches, a process for each core reads ahead; closing the
    iterator ends them immediately.
    """
    with contextlib.ExitStack() as stack:
        batches = Batches(sources)
        client: Client | None = None
        while (client is None or batches.is_starting) and (batch := batches.take(wait=True)):
            seen: Seen = []
            if client is None:  # connect only if there is a picture to ask about
                checked = [read_source(source, read_picture) for source in batch]
                seen = [problem for problem in checked if isinstance(problem, str)]
            if len(seen) < len(batch):
                client = client or stack.enter_context(connect())
                pictures = client.pictures()
                seen = look(batch, pictures)
            yield from _answers(client, batch, seen, top, min_confidence)
        if client is None:
            return
        for batch, seen in stack.enter_context(contextlib.closing(read_ahead(batches, pictures))):
            yield from _answers(client, batch, seen, top, min_confidence)


def _answers(
    client: Client | None, batch: list[Source], seen: Seen, top: int, min_confidence: float | None
) -> Iterator[Answer]:
    images = [prepared.image for prepared in seen if isinstance(prepared, Prepared)]
    predictions = iter(client.classify(images, top) if client and images else ())
    for source, prepared in zip(batch, seen, strict=True):
        if isinstance(prepared, str):
            yield Answer(source.name, None, prepared, is_picture=source.error is None)
            continue
        prediction = replace(next(predictions), parts=prepared.parts)
        if min_confidence is not None:
            is_sure = prediction.probability >= min_confidence
            prediction = replace(prediction, is_sure=is_sure)
        yield Answer(source.name, prediction, image=prepared.image)


def triton_predictor(client: Client, output: str = "") -> Callable[[np.ndarray], np.ndarray]:
    """Return a predictor that asks a served model for its first output, or for one by name."""
    return lambda images: client.infer(images, output=output)[0]

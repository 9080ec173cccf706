"""What a client does, step by step, without a connection: splits, retries, deadline, meaning.

Each public method of `Asking` is a generator: it yields what is to be done next (send a call,
wait, work on pictures) and is sent what came of it. So the client that blocks and the client
that awaits are this one, with another hand at the wire.
"""

# Shape letters: N images, K classes.

import random
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from google.protobuf import json_format
from google.protobuf.message import Message

from pipeline.client import wire
from pipeline.client.endpoint import Endpoint
from pipeline.client.faults import PASSING, Asked, Fault, explained
from pipeline.client.log import PredictionLog
from pipeline.client.prediction import (
    Image,
    Prediction,
    listed,
    predicted,
    prepared,
    require_fit,
    singles,
)
from pipeline.core.errors import PipelineError, SlowError
from pipeline.repository import config_pbtxt

TIMEOUT = 10.0  # seconds for a whole call
LONGEST = 86_400  # seconds, a day: what no system takes for infinite, or too much
RETRIES = 3
FIRST_PAUSE = 0.1  # seconds before the first retry, about; each further one is twice as long
T = TypeVar("T")


@dataclass(frozen=True)
class Attempt:
    """Send the call; the answer is its message or a Fault, after `seconds` at the latest."""

    call: wire.Call
    seconds: float


@dataclass(frozen=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Do what takes a while and needs no connection."""

    do: Callable[[], Any]


Steps = Generator[Attempt | Pause | Work, Any, T]


class Deadline:
    """The end of a whole call, whatever it consists of."""

    def __init__(self, timeout: float) -> None:
        if not 0 < timeout <= LONGEST:
            raise PipelineError(
                f"the timeout must be above 0 and at most {LONGEST:,} seconds, got {timeout}"
            )
        self.timeout = timeout
        self._end = time.monotonic() + timeout

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


class Asking:
    """How to ask one server about one model."""

    def __init__(
        self,
        target: Endpoint,
        name: str,
        version: str,
        timeout: float,
        retries: int,
        log: PredictionLog | None = None,
    ) -> None:
        Deadline(timeout)  # refuses nonsense
        if retries < 0:
            raise PipelineError(f"retries must be 0 or more, got {retries}")
        if version and not version.isdecimal():
            raise PipelineError(
                f"a version is a whole number, got {version!r}: leave it out for the one served"
            )
        self.endpoint, self.name, self.version = target, name, version
        self.timeout, self.retries, self.log = timeout, retries, log
        self._config: config_pbtxt.ModelConfig | None = None
        self._undescribed: set[str] = set()  # versions of which a config said nothing

    def call(self, call: wire.Call, deadline: Deadline) -> Steps[Message]:
        """The answer to a call; what may pass is tried again, if asking twice does no harm."""
        for times in range(1, self.retries + 2):
            left = deadline.left
            answer = (yield Attempt(call, left)) if left > 0 else Fault("slow", "no time left")
            if not isinstance(answer, Fault):
                return answer  # type: ignore[no-any-return]
            if answer.kind in ("unreached", "lost", "unloaded", "unknown"):
                self._config = None  # what comes back may be another
            pause = max(answer.pause, FIRST_PAUSE * 2 ** (times - 1) * random.uniform(0.5, 1.5))
            may_retry = call.may_repeat and answer.kind in PASSING and times <= self.retries
            if not may_retry or pause >= deadline.left:
                break
            yield Pause(pause)
        raise self._failed(answer, deadline, times) from answer.error

    def config(self, deadline: Deadline) -> Steps[config_pbtxt.ModelConfig]:
        """The served model's configuration, asked for once."""
        config = self._config
        if config is None:
            answer: Any = yield from self.call(wire.model_config(self.name, self.version), deadline)
            config = answer.config
            if not config.name:
                raise self._failed(Fault("alien", "a config without a name"), deadline)
            self._config = config
        return config

    def metadata(self, of_model: bool, deadline: Deadline) -> Steps[dict[str, Any]]:
        """What the server says of itself, or of the model."""
        call = wire.model_metadata(self.name, self.version) if of_model else wire.server_metadata()
        answer = yield from self.call(call, deadline)
        return dict(json_format.MessageToDict(answer, preserving_proto_field_name=True))

    def classify(
        self, images: Image | Iterable[Image], top: int, deadline: Deadline
    ) -> Steps[list[Prediction]]:
        """A prediction for each image; no more are prepared at once than a request takes."""
        given = listed(images)
        if not given:
            return []
        config = yield from self._one_tensor(deadline)
        pictures = [single for image in given for single in singles(image, config)]
        size, answers, asked = max(1, config.max_batch_size), [], []
        for start in range(0, len(pictures), size):
            arrays = yield Work(partial(_ready, pictures, start, size, config, deadline))
            outputs, version = yield from self._infer(arrays, deadline)
            if not _is_of_classes(outputs):
                shape = list(outputs.shape[1:])
                raise PipelineError(f"{self.name} gives {shape} for an image: ask with infer()")
            answers.append((outputs, version))
            asked += [arrays] if self.log else []
        predictions = yield from self._predictions(answers, top, deadline)
        for index, arrays in enumerate(asked):
            yield from self._logged(arrays, predictions[index * size :][:size])
        return predictions

    def _predictions(
        self, answers: list[tuple[np.ndarray, str]], top: int, deadline: Deadline
    ) -> Steps[list[Prediction]]:
        """What the outputs of each batch say."""
        predictions = []
        for outputs, version in answers:
            config = yield from self._describing(version, deadline)
            classes = self._classes(config, deadline)
            predictions += [predicted(row, config, classes, version, top) for row in outputs]
        return predictions

    def _logged(self, images: np.ndarray, predictions: list[Prediction]) -> Steps[None]:
        """Write them to the prediction log, if there is one."""
        if log := self.log:
            yield Work(lambda: log.add(self.name, images, predictions))

    def infer(self, images: np.ndarray, deadline: Deadline) -> Steps[tuple[np.ndarray, str]]:
        """Outputs (N, K) of images (N, ...), and the version that answered last."""
        try:
            images = np.asarray(images)
        except ValueError as error:
            raise PipelineError(f"images are no array ({error}): give one, (N, ...)") from error
        answers = yield from self._batches(images, deadline)
        if self.log and all(_is_of_classes(outputs) for outputs, _ in answers):
            yield from self._logged(images, (yield from self._predictions(answers, 1, deadline)))
        return np.concatenate([outputs for outputs, _ in answers]), answers[-1][1]

    def labels(self, image: np.ndarray, deadline: Deadline) -> Steps[tuple[str, ...]]:
        """What the server calls each class when it is asked to classify an image."""
        config = yield from self._one_tensor(deadline)
        count = int(config.output[0].dims[-1])
        answer, _ = yield from self._infer(image[np.newaxis], deadline, count)
        names: dict[int, str] = {}
        try:
            for entry in answer.reshape(-1):  # bytes value:index:label
                _, index, *label = entry.decode().split(":", 2)
                names[int(index)] = label[0] if label else index
        except (ValueError, AttributeError) as error:
            raise self._failed(wire.alien(error), deadline) from error
        return tuple(names.get(index, str(index)) for index in range(count))

    def _batches(
        self, images: np.ndarray, deadline: Deadline
    ) -> Steps[list[tuple[np.ndarray, str]]]:
        """The outputs of images (N, ...) with the version that gave them, batch by batch."""
        config = yield from self._one_tensor(deadline)
        if not images.ndim or not len(images):
            raise PipelineError("no images to ask about: give at least one, as (N, ...)")
        require_fit(images, config)
        size, answers = max(1, config.max_batch_size), []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            answers.append((yield from self._infer(part, deadline)))
        return answers

    def _infer(
        self, images: np.ndarray, deadline: Deadline, class_count: int = 0
    ) -> Steps[tuple[np.ndarray, str]]:
        config = yield from self._one_tensor(deadline)
        call = wire.infer(self.name, self.version, config, images, class_count)
        answer: Any = yield from self.call(call, deadline)
        outputs = wire.outputs(answer, config.output[0].name, len(images))
        if isinstance(outputs, Fault):
            raise self._failed(outputs, deadline) from outputs.error
        return outputs, str(answer.model_version)

    def _one_tensor(self, deadline: Deadline) -> Steps[config_pbtxt.ModelConfig]:
        """The config of a model that can be asked here."""
        config = yield from self.config(deadline)
        if len(config.input) != 1 or not config.output:
            raise PipelineError(
                f"{self.name} at {self.endpoint} does not take just one tensor: ask it with "
                "Triton's own client"
            )
        return config

    def _describing(self, version: str, deadline: Deadline) -> Steps[config_pbtxt.ModelConfig]:
        """The config that states this version's digest: it may be newer than the one at hand."""
        config = yield from self.config(deadline)
        if config_pbtxt.digest(config, version) is None and version not in self._undescribed:
            self._config = None
            config = yield from self.config(deadline)
            if config_pbtxt.digest(config, version) is None:
                self._undescribed.add(version)
        return config

    def _classes(self, config: config_pbtxt.ModelConfig, deadline: Deadline) -> tuple[str, ...]:
        try:
            return config_pbtxt.classes(config)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._failed(wire.alien(error), deadline) from error

    def _failed(self, fault: Fault, deadline: Deadline, times: int = 1) -> PipelineError:
        asked = Asked(self.endpoint, self.name, self.version, deadline.timeout, times)
        return explained(fault, asked)


def _ready(
    pictures: list[Image],
    start: int,
    size: int,
    config: config_pbtxt.ModelConfig,
    deadline: Deadline,
) -> np.ndarray:
    """So many pictures from `start` on as the model takes them, if there is time for that."""
    arrays = []
    for picture in pictures[start : start + size]:
        arrays.append(prepared(picture, config))
        if deadline.left <= 0:
            raise SlowError(
                f"{start + len(arrays)} of {len(pictures)} pictures were ready in "
                f"{deadline.timeout:g} s: raise timeout, or ask about fewer at once"
            )
    return np.stack(arrays)


def _is_of_classes(outputs: np.ndarray) -> bool:
    """Whether outputs (N, ...) say something of classes, (N, K)."""
    return outputs.ndim == 2 and outputs.shape[1] > 0

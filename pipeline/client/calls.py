"""Protocol-independent request logic: batching, retries, deadlines, predictions.

Methods that return `Steps` are generators: they yield the next step (send a call, wait, process
pictures) and are sent its result. The synchronous and the asynchronous client execute the same
steps, each over its own connections.
"""

# Shape letters: N images, K classes.

import random
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from google.protobuf import json_format
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2

from pipeline.client import wire
from pipeline.client.endpoint import Certificates, endpoint, require_usable
from pipeline.client.faults import PASSING, Fault, explained
from pipeline.client.log import PredictionLog, opened
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
LONGEST = 86_400  # seconds, a day: small enough that no system rejects it or treats it as infinite
RETRIES = 3
FIRST_PAUSE = 0.1  # seconds before the first retry, on average; doubled for each further retry
T = TypeVar("T")


@dataclass(frozen=True)
class Attempt:
    """A step: send the call; its result, within `seconds`, is the answer's message or a Fault."""

    call: wire.Call
    seconds: float


@dataclass(frozen=True)
class Pause:
    """A step: wait."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """A step: run a function that may take a while and needs no connection."""

    do: Callable[[], Any]


Steps = Generator[Attempt | Pause | Work, Any, T]


class Deadline:
    """The deadline of a whole call, with all its requests and retries."""

    def __init__(self, timeout: float) -> None:
        if not 0 < timeout <= LONGEST:
            raise PipelineError(
                f"the timeout must be above 0 and at most {LONGEST:,} seconds, got {timeout}"
            )
        self.timeout = timeout
        self._end = time.monotonic() + timeout

    @property
    def left(self) -> float:
        """The seconds that are left; below 0 after the deadline."""
        return self._end - time.monotonic()


class BaseClient:
    """The logic that the synchronous and the asynchronous client share: all but the connections."""

    _wires: tuple[Any, Any]  # the classes that open connections, over HTTP and over gRPC

    def __init__(
        self,
        url: str,
        name: str = "handwriting",
        timeout: float = TIMEOUT,
        *,
        version: int | str = "",
        certificates: Certificates = Certificates(),
        headers: Mapping[str, str] | None = None,
        retries: int = RETRIES,
        prediction_log: PredictionLog | str | Path | None = None,
    ) -> None:
        self.endpoint, self.name, self.timeout = endpoint(url), name, timeout
        self._log, self._version, self._retries = opened(prediction_log), str(version), retries
        self._deadline()  # raises PipelineError for an invalid timeout
        if retries < 0:
            raise PipelineError(f"retries must be 0 or more, got {retries}")
        if self._version and not self._version.isdecimal():
            raise PipelineError(
                f"a version is a whole number, got {version!r}: leave it out for the one served"
            )
        self._config: config_pbtxt.ModelConfig | None = None
        self._undescribed: set[str] = set()  # versions whose digest the config does not state
        require_usable(self.endpoint, certificates, headers or {})
        wire_class = self._wires[self.endpoint.is_grpc]
        self._wire = wire_class(self.endpoint, certificates, dict(headers or {}))

    def _deadline(self, timeout: float | None = None) -> Deadline:
        return Deadline(self.timeout if timeout is None else timeout)

    def _ask(self, call: wire.Call, deadline: Deadline) -> Steps[Message]:
        """Return the answer to a call; after a temporary fault, repeat the call if that is safe."""
        for times in range(1, self._retries + 2):
            left = deadline.left
            answer = (yield Attempt(call, left)) if left > 0 else Fault("slow", "no time left")
            if not isinstance(answer, Fault):
                return answer  # type: ignore[no-any-return]
            if answer.kind in ("unreached", "lost", "unloaded", "unknown"):
                self._config = None  # the server may come back with another model
            pause = max(answer.pause, FIRST_PAUSE * 2 ** (times - 1) * random.uniform(0.5, 1.5))
            may_retry = call.may_repeat and answer.kind in PASSING and times <= self._retries
            if not may_retry or pause >= deadline.left:
                break
            yield Pause(pause)
        raise self._failed(answer, deadline, times) from answer.error

    def _ask_config(self, deadline: Deadline) -> Steps[config_pbtxt.ModelConfig]:
        """Return the served model's configuration, which is requested once."""
        config = self._config
        if config is None:
            request = service_pb2.ModelConfigRequest(name=self.name, version=self._version)
            answer: Any = yield from self._ask(wire.Call("ModelConfig", request), deadline)
            config = answer.config
            if not config.name:
                raise self._failed(Fault("alien", "a config without a name"), deadline)
            self._config = config
        return config

    def _ask_metadata(self, of_model: bool, deadline: Deadline) -> Steps[dict[str, Any]]:
        """Return metadata of the server, or of the model."""
        call = wire.Call("ServerMetadata", service_pb2.ServerMetadataRequest())
        if of_model:
            request = service_pb2.ModelMetadataRequest(name=self.name, version=self._version)
            call = wire.Call("ModelMetadata", request)
        answer = yield from self._ask(call, deadline)
        return dict(json_format.MessageToDict(answer, preserving_proto_field_name=True))

    def _ask_predictions(
        self, images: Image | Iterable[Image], top: int, deadline: Deadline
    ) -> Steps[list[Prediction]]:
        """Return a prediction for each image; prepare only one request's images at a time."""
        given = listed(images)
        if not given:
            return []
        config = yield from self._one_tensor(deadline)
        pictures = [single for image in given for single in singles(image, config)]
        size, answers, asked = max(1, config.max_batch_size), [], []
        for start in range(0, len(pictures), size):
            arrays = yield Work(partial(_ready, pictures, start, config, deadline))
            outputs, version = yield from self._infer(arrays, deadline)
            if not _is_of_classes(outputs):
                shape = list(outputs.shape[1:])
                raise PipelineError(f"{self.name} gives {shape} for an image: ask with infer()")
            answers.append((outputs, version))
            asked += [arrays] if self._log else []
        predictions = yield from self._predictions(answers, top, deadline)
        for index, arrays in enumerate(asked):
            yield from self._logged(arrays, predictions[index * size :][:size])
        return predictions

    def _predictions(
        self, answers: list[tuple[np.ndarray, str]], top: int, deadline: Deadline
    ) -> Steps[list[Prediction]]:
        """Convert the outputs of each batch to predictions."""
        predictions = []
        for outputs, version in answers:
            config = yield from self._ask_config(deadline)
            if config_pbtxt.digest(config, version) is None and version not in self._undescribed:
                self._config = None  # the known config may be older than this version
                config = yield from self._ask_config(deadline)
                if config_pbtxt.digest(config, version) is None:
                    self._undescribed.add(version)
            try:
                classes = config_pbtxt.classes(config)
            except (ValueError, TypeError, RecursionError) as error:
                raise self._failed(wire.alien(error), deadline) from error
            predictions += [predicted(row, config, classes, version, top) for row in outputs]
        return predictions

    def _logged(self, images: np.ndarray, predictions: list[Prediction]) -> Steps[None]:
        """Append the predictions to the prediction log, if there is one."""
        if log := self._log:
            yield Work(lambda: log.add(self.name, images, predictions))

    def _ask_outputs(self, images: np.ndarray, deadline: Deadline) -> Steps[tuple[np.ndarray, str]]:
        """Return outputs (N, K) of images (N, ...), and the version that answered last."""
        try:
            images = np.asarray(images)
        except ValueError as error:
            raise PipelineError(f"images are no array ({error}): give one, (N, ...)") from error
        config = yield from self._one_tensor(deadline)
        if not images.ndim or not len(images):
            raise PipelineError("no images to ask about: give at least one, as (N, ...)")
        require_fit(images, config)
        size, answers = max(1, config.max_batch_size), []
        for start in range(0, len(images), size):
            answers.append((yield from self._infer(images[start : start + size], deadline)))
        if self._log and all(_is_of_classes(outputs) for outputs, _ in answers):
            yield from self._logged(images, (yield from self._predictions(answers, 1, deadline)))
        return np.concatenate([outputs for outputs, _ in answers]), answers[-1][1]

    def _ask_labels(self, image: np.ndarray, deadline: Deadline) -> Steps[tuple[str, ...]]:
        """Return the name that the server gives each class when it classifies an image."""
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

    def _infer(
        self, images: np.ndarray, deadline: Deadline, class_count: int = 0
    ) -> Steps[tuple[np.ndarray, str]]:
        config = yield from self._one_tensor(deadline)
        call = wire.infer(self.name, self._version, config, images, class_count)
        answer: Any = yield from self._ask(call, deadline)
        outputs = wire.read_outputs(answer, config.output[0].name, len(images))
        if isinstance(outputs, Fault):
            raise self._failed(outputs, deadline) from outputs.error
        return outputs, str(answer.model_version)

    def _one_tensor(self, deadline: Deadline) -> Steps[config_pbtxt.ModelConfig]:
        """Return the model's config; raise PipelineError unless it takes exactly one tensor."""
        config = yield from self._ask_config(deadline)
        if len(config.input) != 1 or not config.output:
            raise PipelineError(
                f"{self.name} at {self.endpoint} does not take one tensor: ask with Triton's client"
            )
        return config

    def _failed(self, fault: Fault, deadline: Deadline, times: int = 1) -> PipelineError:
        return explained(
            fault,
            self.endpoint,
            name=self.name,
            version=self._version,
            timeout=deadline.timeout,
            times=times,
        )


def _ready(
    pictures: list[Image], start: int, config: config_pbtxt.ModelConfig, deadline: Deadline
) -> np.ndarray:
    """Prepare the batch of pictures from `start` on; raise SlowError if the time is up."""
    arrays = []
    for picture in pictures[start : start + max(1, config.max_batch_size)]:
        arrays.append(prepared(picture, config))
        if deadline.left <= 0:
            raise SlowError(
                f"{start + len(arrays)} of {len(pictures)} pictures were ready in "
                f"{deadline.timeout:g} s: raise timeout, or ask about fewer at once"
            )
    return np.stack(arrays)


def _is_of_classes(outputs: np.ndarray) -> bool:
    """Return whether outputs (N, ...) are one value per class, (N, K)."""
    return outputs.ndim == 2 and outputs.shape[1] > 0

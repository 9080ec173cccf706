"""The asynchronous client of one served model: batching, retries, and one deadline for a call."""

# Shape letters: N images, K classes.

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from pipeline.client.connection import Connection, open_connection
from pipeline.client.endpoint import Certificates, Endpoint, RemoteModel, endpoint
from pipeline.client.faults import PASSING, Fault, explain_fault
from pipeline.client.log import PredictionLog, open_log
from pipeline.client.prediction import (
    Image,
    Prediction,
    as_list,
    as_sent,
    fit_input,
    split_images,
    to_input,
    to_prediction,
)
from pipeline.core.errors import PipelineError, SlowError
from pipeline.images.read import Box, Prepared
from pipeline.repository import config_pbtxt

TIMEOUT = 10.0  # seconds for a whole call
LONGEST = 86_400  # seconds, a day: small enough that no system rejects it or treats it as infinite
RETRIES = 3
FIRST_PAUSE = 0.1  # seconds before the first retry, on average; doubled for each further retry
T = TypeVar("T")


@dataclass
class Deadline:
    """The deadline of a whole call, with its preparation, requests and retries."""

    timeout: float  # seconds
    end: float = field(init=False)  # by time.monotonic()
    preparing: tuple[int, int] | None = None  # pictures that are ready, and all of them

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= LONGEST:
            raise PipelineError(
                f"the timeout must be above 0 and at most {LONGEST:,} seconds, got {self.timeout}"
            )
        self.end = time.monotonic() + self.timeout

    @property
    def left(self) -> float:
        """The seconds that are left; below 0 after the deadline."""
        return self.end - time.monotonic()


class AsyncClient:
    """A client of one served model, over HTTP or gRPC, that tasks of one event loop may share.

    Otherwise it is like `Client`: see there for URLs, errors, the deadline and retries.
    """

    loop: asyncio.AbstractEventLoop | None = None  # of the open connection
    _connection: Connection | None = None

    def __init__(
        self,
        url: str | Endpoint,
        name: str = "handwriting",
        timeout: float = TIMEOUT,
        *,
        version: int | str = "",
        certificates: Certificates = Certificates(),
        headers: Mapping[str, str] | None = None,
        retries: int = RETRIES,
        prediction_log: PredictionLog | str | Path | None = None,
    ) -> None:
        self.endpoint = url if isinstance(url, Endpoint) else endpoint(url)
        self.name, self.timeout = name, timeout
        self._log, self._retries = open_log(prediction_log), retries
        Deadline(timeout)  # raises PipelineError for an invalid timeout
        if retries < 0:
            raise PipelineError(f"retries must be 0 or more, got {retries}")
        self._config: config_pbtxt.ModelConfig | None = None
        self._undescribed: set[str] = set()  # versions whose digest the config does not state
        self._target = RemoteModel(self.endpoint, name, str(version), headers or {}, certificates)
        self.connect = open_connection  # a LocalClient's returns a model in this process

    async def classify(self, images: Image | Iterable[Image], top: int = 3) -> list[Prediction]:
        """Return a prediction for each image, one or many: see `Client.classify`.

        Prepares only one request's images at a time.
        """
        given = as_list(images)
        if not given:
            return []
        async with self._call() as deadline:
            config = await self._one_tensor(deadline)
            pictures = [single for image in given for single in split_images(image, config)]
            size, answers, asked = max(1, config.max_batch_size), [], []
            parts = list[tuple[Box, ...]]()
            for start in range(0, len(pictures), size):
                batch = await _prepare(pictures, slice(start, start + size), config, deadline)
                arrays = np.stack([prepared.image for prepared in batch])
                parts += [prepared.parts for prepared in batch]
                outputs, version = await self._ask_outputs(arrays, deadline)
                if not _is_answer(outputs, config):
                    shape = list(outputs.shape[1:])
                    raise PipelineError(
                        f"{self.name} gives no value per class, but shape {shape}: use infer()"
                    )
                answers.append((outputs, version))
                asked += [arrays] if self._log else []
            predictions = await self._predictions(answers, top, deadline)
            predictions = [
                replace(prediction, parts=boxes)
                for prediction, boxes in zip(predictions, parts, strict=True)
            ]
            for index, arrays in enumerate(asked):
                await self._write_log(arrays, predictions[index * size :][:size])
        return predictions

    async def infer(
        self, images: np.ndarray, timeout: float | None = None, output: str = ""
    ) -> tuple[np.ndarray, str]:
        """Return log-probabilities (N, K) of images (N, ...): see `Client.infer`."""
        async with self._call(timeout) as deadline:
            try:
                images = np.asarray(images)
            except ValueError as error:
                raise PipelineError(
                    f"images are not an array ({error}): give one, (N, ...)"
                ) from error
            config = await self._one_tensor(deadline)
            if not images.ndim or not len(images):
                raise PipelineError("images is empty: give at least one, as (N, ...)")
            images = fit_input(images, config)
            size, answers = max(1, config.max_batch_size), []
            for start in range(0, len(images), size):
                batch = images[start : start + size]
                answers.append(await self._ask_outputs(batch, deadline, output=output))
            if (
                self._log
                and not output
                and all(_is_answer(outputs, config) for outputs, _ in answers)
            ):
                await self._write_log(images, await self._predictions(answers, 1, deadline))
        return np.concatenate([outputs for outputs, _ in answers]), answers[-1][1]

    async def labels(self, image: np.ndarray) -> tuple[str, ...]:
        """Return the name that the server gives each class: see `Client.labels`."""
        async with self._call() as deadline:
            config = await self._one_tensor(deadline)
            count = int(config.output[0].dims[-1])
            answer, _ = await self._ask_outputs(image[np.newaxis], deadline, count)
            names: dict[int, str] = {}
            try:
                for entry in answer.reshape(-1):  # bytes value:index:label
                    _, index, *label = entry.decode().split(":", 2)
                    names[int(index)] = label[0] if label else index
            except (ValueError, AttributeError) as error:
                raise Fault("alien", str(error)) from error
        return tuple(names.get(index, str(index)) for index in range(count))

    async def config(self) -> config_pbtxt.ModelConfig:
        """Return the model's configuration, requested once, and again after a lost server."""
        async with self._call() as deadline:
            return await self._get_config(deadline)

    async def metadata(self, of_model: bool = False) -> dict[str, Any]:
        """Return metadata of the server, or of the model: name, version or versions, and more."""
        return await self.ask(lambda asked: asked.metadata(of_model))

    async def ask(
        self, request: Callable[[Connection], Awaitable[T]], may_repeat: bool = True
    ) -> T:
        """Return the answer to a request; repeat it after a temporary fault if `may_repeat`."""
        async with self._call() as deadline:
            return await self._ask(request, deadline, may_repeat)

    async def close(self) -> None:
        """Close the connections; a further call opens new ones."""
        connection, self._connection, self.loop = self._connection, None, None
        if connection:
            await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @contextlib.asynccontextmanager
    async def _call(self, timeout: float | None = None) -> AsyncIterator[Deadline]:
        """Enter a call with its deadline; raise PipelineError for a fault, or if it is late."""
        loop = asyncio.get_running_loop()
        if self.loop not in (None, loop):
            raise PipelineError(
                "this client belongs to another event loop: make a client in each loop"
            )
        self.loop = loop
        deadline = Deadline(self.timeout if timeout is None else timeout)
        try:
            async with asyncio.timeout(deadline.timeout):
                yield deadline
        except TimeoutError as error:
            if deadline.preparing:
                ready, count = deadline.preparing
                raise SlowError(
                    f"{ready} of {count} pictures were ready in {deadline.timeout:g} s: "
                    "raise the timeout, or ask about fewer pictures in a call"
                ) from error
            slow = Fault("slow", "no answer in time")
            raise explain_fault(slow, self._target, deadline.timeout) from error
        except Fault as fault:
            raise explain_fault(fault, self._target, deadline.timeout) from fault

    async def _ask(
        self,
        request: Callable[[Connection], Awaitable[T]],
        deadline: Deadline,
        may_repeat: bool = True,
    ) -> T:
        times = 0
        while True:
            times += 1
            if self._connection is None:
                self._connection = self.connect(self._target)
            try:
                return await request(self._connection)
            except Fault as fault:
                if fault.kind in ("unreached", "lost", "unloaded", "unknown"):
                    self._config = None  # the server may come back with another model
                fault.times = times
                pause = max(fault.pause, FIRST_PAUSE * 2 ** (times - 1) * random.uniform(0.5, 1.5))
                may_retry = may_repeat and fault.kind in PASSING and times <= self._retries
                if not may_retry or pause >= deadline.left:
                    raise
            await asyncio.sleep(pause)

    async def _get_config(self, deadline: Deadline) -> config_pbtxt.ModelConfig:
        config = self._config
        if config is None:
            config = self._config = await self._ask(lambda asked: asked.config(), deadline)
        return config

    async def _one_tensor(self, deadline: Deadline) -> config_pbtxt.ModelConfig:
        """Return the model's config; raise PipelineError unless it takes exactly one tensor."""
        config = await self._get_config(deadline)
        if len(config.input) != 1 or not config.output:
            raise PipelineError(
                f"{self.name} at {self.endpoint} does not take one tensor: use tritonclient"
            )
        return config

    async def _ask_outputs(
        self, images: np.ndarray, deadline: Deadline, class_count: int = 0, output: str = ""
    ) -> tuple[np.ndarray, str]:
        """Return the outputs of one request's images, and the version that answered.

        They are the model's first output, or the one with the name `output`.
        """
        config = await self._one_tensor(deadline)
        if output:
            chosen = [tensor for tensor in config.output if tensor.name == output]
            if not chosen:
                raise PipelineError(f"{self.name} at {self.endpoint} has no output {output!r}")
            config = config_pbtxt.ModelConfig(name=config.name, input=config.input, output=chosen)
        return await self._ask(lambda asked: asked.infer(config, images, class_count), deadline)

    async def _predictions(
        self, answers: list[tuple[np.ndarray, str]], top: int, deadline: Deadline
    ) -> list[Prediction]:
        """Convert the outputs of each batch to predictions."""
        predictions = []
        for outputs, version in answers:
            config = await self._get_config(deadline)
            if config_pbtxt.digest(config, version) is None and version not in self._undescribed:
                self._config = None  # the known config may be older than this version
                config = await self._get_config(deadline)
                if config_pbtxt.digest(config, version) is None:
                    self._undescribed.add(version)
            try:
                classes = config_pbtxt.classes(config)
            except (ValueError, TypeError, RecursionError) as error:
                raise Fault("alien", str(error)) from error
            predictions += [to_prediction(row, config, classes, version, top) for row in outputs]
        return predictions

    async def _write_log(self, images: np.ndarray, predictions: list[Prediction]) -> None:
        """Append the predictions to the prediction log, if there is one."""
        if self._log:
            await asyncio.to_thread(self._log.add, self.name, images, predictions)


async def _prepare(
    pictures: list[Image], batch: slice, config: config_pbtxt.ModelConfig, deadline: Deadline
) -> list[Prepared]:
    """Return a batch of pictures as the model takes them; the deadline counts them."""

    def prepare() -> list[Prepared]:
        prepared = []
        for picture in pictures[batch]:
            if deadline.left <= 0:
                break  # the call was given up
            prepared.append(to_input(picture, config))
            deadline.preparing = batch.start + len(prepared), len(pictures)
        return prepared

    if all(as_sent(picture, config) for picture in pictures[batch]):
        prepared = prepare()  # immediately: a thread costs more
    else:
        deadline.preparing = batch.start, len(pictures)
        prepared = await asyncio.to_thread(prepare)
    deadline.preparing = None
    return prepared


def _is_answer(outputs: np.ndarray, config: config_pbtxt.ModelConfig) -> bool:
    """Return whether outputs (N, ...) are one value per class, (N, K), or strings of classes."""
    is_of_classes = outputs.ndim == 2 and outputs.shape[1] > 0
    return is_of_classes or (outputs.ndim == 3 and config_pbtxt.answers_strings(config))

"""Queries of a served model about many files, and a predictor that asks a served model."""

import contextlib
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from pipeline.client.client import Client, Prediction
from pipeline.core.errors import PipelineError
from pipeline.core.machine import cores
from pipeline.core.text import Lines
from pipeline.images.inputs import Source, look, read_source
from pipeline.images.read import Prepared, read_picture

FILES_AT_ONCE = 64
# Sizes of the first batches, which this process reads: the first answer does not wait for others,
# and a few pictures need no further processes, which take a second to start.
FIRST_BATCHES = (1, 8, FILES_AT_ONCE)
UNDER_WAY = 6  # batches that are being read, or wait to be sent
LINGER = 0.02  # seconds that a batch waits for one more name
NOT_SURE = "not sure"
Seen = list[Prepared | str]  # for each picture, the reason why there is none, or what is sent


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
            note = f"  {len(parts)} parts found; the answer is for the heaviest, at {where}"
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
    workers: int | None = None,
) -> Generator[Answer, None, None]:
    """Yield an answer for each picture, in order; an unreadable one does not stop the others.

    At most a few batches are in memory. `min_confidence` replaces the model's own threshold.
    Connects only when there is an image to send, so that unreadable pictures are reported even
    without a server. After the first batches, `workers` processes (default: one per core) read
    ahead; closing the iterator ends them immediately.
    """
    with contextlib.ExitStack() as stack:
        names = _Names(sources)
        client: Client | None = None
        while (client is None or names.is_starting) and (batch := names.take(wait=True)):
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
        readers = stack.enter_context(_Readers(pictures, workers or cores()))
        for batch, seen in _read(names, readers):
            yield from _answers(client, batch, seen, top, min_confidence)


def _read(names: "_Names", readers: "_Readers") -> Iterator[tuple[list[Source], Seen]]:
    """Yield every batch with its images, in order, while the next few are being read."""
    under_way: deque[tuple[list[Source], Future[Seen]]] = deque()
    while True:
        while len(under_way) < UNDER_WAY and (batch := names.take(wait=not under_way)):
            under_way.append((batch, readers.submit(batch)))
        if not under_way:
            return
        batch, future = under_way.popleft()
        try:
            seen = future.result()
        except BrokenProcessPool as error:
            raise PipelineError(
                f"a process that reads pictures died at {batch[0].name} or soon after: is there "
                "enough memory?"
            ) from error
        yield batch, seen


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


class _Names:
    """Batches of sources that a thread takes from an iterator: a slow one delays no answer."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._queue: queue.Queue[Source | BaseException | None] = queue.Queue(4 * FILES_AT_ONCE)
        self._end: BaseException | bool = False
        self._sizes = list(FIRST_BATCHES)
        # A daemon thread, since nothing can interrupt a wait for standard input.
        threading.Thread(target=self._fill, args=(sources,), daemon=True).start()

    @property
    def is_starting(self) -> bool:
        """Whether the next batch is one of the first."""
        return bool(self._sizes)

    def take(self, wait: bool) -> list[Source]:
        """Return the next batch; empty at the end, or if none is ready and `wait` is false."""
        size = self._sizes.pop(0) if self._sizes else FILES_AT_ONCE
        batch: list[Source] = []
        while not self._end and len(batch) < size:
            try:
                source = self._queue.get(timeout=None if wait and not batch else LINGER)
            except queue.Empty:
                break
            if isinstance(source, Source):
                batch.append(source)
            else:
                self._end = source or True
        if not batch and isinstance(self._end, BaseException):
            raise self._end
        return batch

    def _fill(self, sources: Iterable[Source]) -> None:
        try:
            for source in sources:
                self._queue.put(source)
        except BaseException as error:  # take() raises it
            self._queue.put(error)
        else:
            self._queue.put(None)


class _Readers:
    """Processes that read pictures; Ctrl-C reaches only the main process, which ends them."""

    def __init__(self, pictures: str, workers: int) -> None:
        self._pictures = pictures
        # Windows has no signal masks: there each process ignores Ctrl-C as soon as it runs.
        ignore = (signal.SIGINT, signal.SIG_IGN)
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, ignore)

    def submit(self, batch: list[Source]) -> Future[Seen]:
        if sys.platform == "win32":
            return self._pool.submit(look, batch, self._pictures)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:  # a process that starts here inherits the signal mask
            return self._pool.submit(look, batch, self._pictures)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> "_Readers":
        return self

    def __exit__(self, *exception: object) -> None:
        processes, results = self._pool._processes, self._pool._result_queue
        thread: Any = self._pool._executor_manager_thread  # its type in typeshed is wrong
        self._pool.shutdown(wait=False, cancel_futures=True)
        if any(exception):
            # At exit Python would wait for these processes. From 3.14 on: terminate_workers().
            for process in list((processes or {}).values()):
                process.terminate()
            # The pool must not wait for the rest of a result that a process was sending.
            results._writer.close()  # type: ignore[attr-defined]
        if thread:  # at exit Python would wake it, and fail if it closes its pipe at that moment
            thread.join()


def triton_predictor(client: Client, output: str = "") -> Callable[[np.ndarray], np.ndarray]:
    """Return a predictor that asks a served model for its first output, or for one by name."""
    return lambda images: client.infer(images, output=output)[0]

"""Reading of many pictures ahead, in processes, while others are being answered."""

import contextlib
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.machine import cores
from pipeline.images.inputs import Source, look
from pipeline.images.read import Prepared

FILES_AT_ONCE = 64
# Sizes of the first batches, which this process reads: the first answer does not wait for others,
# and a few pictures need no further processes, which take a second to start.
FIRST_BATCHES = (1, 8, FILES_AT_ONCE)
UNDER_WAY = 6  # batches that are being read, or wait to be sent
LINGER = 0.02  # seconds that a batch waits for one more name
Seen = list[Prepared | str]  # for each picture, the reason why there is none, or what is sent


class Batches:
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


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read_ahead(batches: Batches, pictures: str) -> Generator[tuple[list[Source], Seen], None, None]:
    """Yield every further batch with its images, while a process for each core reads the next.

    The batches keep their order. Closing the iterator ends the processes immediately.
    """
    # Windows has no signal masks: there each process ignores Ctrl-C as soon as it runs.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(cores(), get_context("spawn"), signal.signal, ignore)
    is_whole = False
    under_way: deque[tuple[list[Source], Future[Seen]]] = deque()
    try:
        while True:
            while len(under_way) < UNDER_WAY and (batch := batches.take(wait=not under_way)):
                with _without_ctrl_c():  # a process that starts here inherits the mask
                    under_way.append((batch, pool.submit(look, batch, pictures)))
            if not under_way:
                break
            batch, future = under_way.popleft()
            try:
                seen = future.result()
            except BrokenProcessPool as error:
                raise PipelineError(
                    f"a process that reads pictures died at {batch[0].name} or soon after: is "
                    "there enough memory?"
                ) from error
            yield batch, seen
        is_whole = True
    finally:
        processes, results = pool._processes, pool._result_queue
        thread: Any = pool._executor_manager_thread  # its type in typeshed is wrong
        pool.shutdown(wait=False, cancel_futures=True)
        if not is_whole:
            # At exit Python would wait for these processes. From 3.14 on: terminate_workers().
            for process in list((processes or {}).values()):
                process.terminate()
            # The pool must not wait for the rest of a result that a process was sending.
            results._writer.close()  # type: ignore[attr-defined]
        if thread:  # at exit Python would wake it, and fail if it closes its pipe at that moment
            thread.join()
